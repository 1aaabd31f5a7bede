"""`megavlm data`: demonstration data, indexes and samples, seen from the terminal."""

import re

import pytest

from megavlm.cli.main import main

RECIPE = """\
run: {dir: unused}
model:
  vision: {image_size_px: 48, patch_size_px: 8, num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64}
  language: {vocab_size: 600, num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64}
data:
  tokenizer: DEMO/tokenizer.model
  seq_len_tokens: 512
  sources:
    pages: {path: DEMO/pages}
    patches: {path: DEMO/patches}
    heldout: {path: DEMO/pages, split: heldout}
    unused: {path: /no/such/folder}
stages:
  - {name: encoder, objective: vision_classification, num_classes: 11, steps: 2, mixture: {patches: 1.0}, vision: {train: full}}
  - {name: tune, steps: 2, mixture: {pages: 1.0, unused: 0.0}}
evaluation: {sources: [heldout]}
"""


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert run("data", "make-quickstart", folder / "demo", "--num-train", 100, "--num-held-out", 100) == 0
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("DEMO", str(folder / "demo")))
    return path


def test_index_counts_every_source_that_the_run_reads_in_80_columns(recipe_file, capsys):
    assert run("data", "index", recipe_file) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    counted = {line.split()[0]: line.split()[1] for line in lines if len(line.split()) == 6}
    assert counted.pop("source") == "samples"
    assert set(counted) - {"-" * len(name) for name in counted} == {"patches", "pages", "heldout"}
    assert counted["pages"] == counted["heldout"] == "100"
    assert any(line.startswith("pages: ") and "reading" in line for line in lines)
    assert {"vision_classification", "multimodal"} <= set(lines)


def test_show_marks_what_is_trained_on(recipe_file, capsys):
    assert run("data", "show", recipe_file, "pages", "--count", 4) == 0
    out = capsys.readouterr().out
    assert out.count("task ") == 4
    assert "<image> x 36" in out
    for target in re.findall("\u27e6(.*?)\u27e7", out):
        assert target.endswith("<|end|>") and len(target) > len("<|end|>")


def test_show_of_labelled_patches_and_their_pictures(recipe_file, capsys, tmp_path):
    from PIL import Image

    assert run("data", "show", recipe_file, "patches", "--pictures", tmp_path) == 0
    assert "object " in capsys.readouterr().out
    (picture,) = tmp_path.iterdir()
    assert Image.open(picture).size == (48, 48)


def test_show_refuses_what_is_not_there(recipe_file, capsys):
    assert run("data", "show", recipe_file, "page") == 2
    assert "did you mean 'pages'?" in capsys.readouterr().err
    assert run("data", "show", recipe_file, "pages", "--row", 100) == 2
    assert "100 is not below the 100 rows" in capsys.readouterr().err
