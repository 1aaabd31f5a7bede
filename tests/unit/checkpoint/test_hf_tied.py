"""Is the head the embedding? transformers' own models are the oracle, whatever their configs leave unsaid."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavlm.checkpoint.hf import config_from_hf
from megavlm.checkpoint.hf.export import export_hf
from megavlm.checkpoint.hf.importing import import_hf
from megavlm.checkpoint.hf.load import links_of, open_weights
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.testing.families import CASES
from megavlm.testing.families.case import make_hf

BY_NAME = {case.name: case for case in CASES}
CLASSES = (
    "LLaVA-1.5",
    "LLaVA-NeXT",
    "LLaVA-OneVision",
    "ViP-LLaVA",
    "InternVL3",
    "Idefics2",
    "Idefics3",
    "Qwen2-VL",
    "Qwen2.5-VL",
    "Qwen3-VL",
)
SAID = (None, False, True)


def tied_at_hugging_face(hf: Any) -> bool:
    return bool(hf.get_input_embeddings().weight.data_ptr() == hf.get_output_embeddings().weight.data_ptr())


def say(folder: Path, top: bool | None, text: bool | None) -> None:
    """Write tie_word_embeddings into a config.json and into its text block; None: leave it out."""
    values = json.loads((folder / "config.json").read_text())
    for block, said in ((values, top), (values["text_config"], text)):
        block.pop("tie_word_embeddings", None)
        if said is not None:
            block["tie_word_embeddings"] = said
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", [name for name in CLASSES if name in BY_NAME])
def test_tied_as_the_class_is(tmp_path: Path, name: str) -> None:
    """Every combination of what the config and its text block say."""
    case = BY_NAME[name]
    make_hf(case, tmp_path)
    tf = quiet_transformers()
    for top in SAID:
        for text in SAID:
            say(tmp_path, top, text)
            (tmp_path / "empty").mkdir(exist_ok=True)
            (tmp_path / "empty" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
            with torch.device("meta"):
                hf = getattr(tf, case.kind.hf_class)(tf.AutoConfig.from_pretrained(str(tmp_path)))
            theirs = hf.get_input_embeddings().weight is hf.get_output_embeddings().weight
            assert config_from_hf(tmp_path / "empty").language.tie_embeddings == theirs, f"top={top}, text={text}"


@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA-NeXT", "InternVL3", "Idefics3"])
@pytest.mark.parametrize("stored", ["the same", "another"])
def test_both_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, stored: str) -> None:
    """A config that ties, weights that need not: transformers' loaded model decides."""
    case = BY_NAME[name]
    hf = make_hf(case, tmp_path)
    assert not tied_at_hugging_face(hf)
    say(tmp_path, True, True)
    weights = load_file(tmp_path / "model.safetensors")
    (head,) = (key for key in weights if key.endswith("lm_head.weight"))
    (embedding,) = (key for key in weights if key.endswith("embed_tokens.weight"))
    if stored == "the same":
        weights[head] = weights[embedding].clone()
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = tied_at_hugging_face(case.kind.hf_model(tmp_path))
    assert theirs == (stored == "the same")
    with caplog.at_level(logging.WARNING):
        model = config_from_hf(tmp_path)
    assert model.language.tie_embeddings == theirs
    assert ("taken as untied" in caplog.text and head in caplog.text and embedding in caplog.text) == (not theirs)
    with open_weights(tmp_path, model) as opened:
        assert {part.name for link in links_of(model, tmp_path) for part in link.parts} <= opened.names


@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2-VL"])
def test_untied_by_its_weights_there_and_back(tmp_path: Path, name: str) -> None:
    """The import keeps both tensors, and the export says that they are two."""
    case = BY_NAME[name]
    make_hf(case, tmp_path / "hf")
    say(tmp_path / "hf", True, True)
    import_hf(tmp_path / "hf", tmp_path / "imported")
    export_hf(tmp_path / "imported", tmp_path / "out")
    back, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "hf"))
    assert back.keys() == given.keys()
    assert all(torch.equal(back[key], given[key]) for key in given)
    assert not tied_at_hugging_face(case.kind.hf_model(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
