"""A model comes back from a run's folder, from one of its checkpoints and from a Hugging Face folder, ready to talk."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from megavlm.checkpoint import store
from megavlm.config.load import dump_recipe
from megavlm.config.schema import DataConfig, ModelConfig, ParallelConfig, PrecisionConfig, Recipe, RunConfig, SourceConfig, StageConfig
from megavlm.data.chat import TEMPLATES
from megavlm.data.tokenizer import train_sentencepiece
from megavlm.inference.load import LoadError, load_for_inference
from megavlm.inference.stream import TextStream
from megavlm.models.init import initialise
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.context import enter_grid, leave_grid, start_process_group, stop_process_group


@pytest.fixture(scope="module")
def ctx():
    start_process_group(torch.device("cpu"), 60)
    yield enter_grid(ParallelConfig(), torch.device("cpu"), 1)
    leave_grid()
    stop_process_group()


def fill(model, seed, ctx):
    initialise([model], model.model, seed, ctx)


@pytest.fixture(scope="module")
def run(tmp_path_factory, ctx) -> tuple[Path, Recipe]:
    """A run of two stages: the language model alone (seed 1), then everything but it (vision and projector, seed 2)."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_sentencepiece(["What is this? A digit. " * 3], folder / "tokenizer.model", 300, TEMPLATES["megavlm"].special_tokens)
    model = ModelConfig(
        init_std=0.25,
        vision={
            "image_size_px": 16,
            "patch_size_px": 8,
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "ffn_hidden_size": 32,
        },
        language={
            "vocab_size": tokenizer.vocab_size,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "max_positions": 128,
        },
    )
    recipe = Recipe(
        run=RunConfig(dir=str(folder), device="cpu", seed=3),
        model=model,
        precision=PrecisionConfig(dtype="fp32"),
        data=DataConfig(tokenizer=str(folder / "tokenizer.model"), sources={"a": SourceConfig(path="a")}),
        stages=[StageConfig(name="only", steps=1, mixture={"a": 1})],
    )
    dump_recipe(recipe, folder / "recipe.yaml")
    text = VisionLanguageModel(model, recipe.precision, ParallelConfig(), ctx, text_only=True)
    fill(text, 1, ctx)
    state = {"modules": {"language": "00000001-text", "latest": "00000001-text"}}
    store.save(folder / "checkpoints" / "00000001-text", [text], None, state, ctx)
    whole = VisionLanguageModel(model, recipe.precision, ParallelConfig(), ctx)
    fill(whole, 2, ctx)
    state = {"modules": {"language": "00000001-text", "vision": "00000002-rest", "projector": "00000002-rest", "latest": "00000002-rest"}}
    store.save(folder / "checkpoints" / "00000002-rest", [whole], None, state, ctx)
    return folder, recipe


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_each_module_comes_from_the_newest_checkpoint_that_holds_it(run, ctx):
    folder, recipe = run
    loaded = load_for_inference(folder, ctx=ctx)
    made = {}
    for seed in (1, 2, 3):
        made[seed] = VisionLanguageModel(recipe.model, recipe.precision, ParallelConfig(), ctx)
        fill(made[seed], seed, ctx)
    found = weights(loaded.model)
    for name in found:
        seed = 1 if name.startswith("language") else 2
        assert torch.equal(found[name], weights(made[seed])[name]), name
    early = weights(load_for_inference(folder / "checkpoints" / "00000001-text", ctx=ctx).model)
    for name in early:
        seed = 1 if name.startswith("language") else 3  # what no stage has trained is as the run started
        assert torch.equal(early[name], weights(made[seed])[name]), name
    assert not loaded.model.training


def test_it_answers_questions_about_pictures(run, ctx):
    model, tokenizer, chat, recipe = loaded = load_for_inference(run[0], ctx=ctx)
    pictures = [Image.effect_noise((40, 20), 60).convert("RGB"), Image.new("RGB", (16, 16), "red")]
    prompts = [loaded.prompt("What is this?", pictures), loaded.prompt("What <image> is this? <image>", pictures), loaded.prompt("What?")]
    assert [p.ids.count(tokenizer.image_token_id) for p in prompts] == [8, 8, 0]
    answers = loaded.generate(prompts, max_new_tokens=20)
    assert answers[0] != loaded.generate([loaded.prompt("What is this?", pictures[::-1])], max_new_tokens=20)[0]
    assert loaded.text([*tokenizer.encode("A digit.").ids, *chat.stop_ids[:1]]) == "A digit."
    assert model.model == recipe.model


def test_the_command_streams_the_answer(run, ctx, tmp_path, monkeypatch):
    import typer

    from megavlm.cli.generate import generate
    from megavlm.inference import load

    Image.effect_noise((30, 30), 80).save(tmp_path / "a.png")
    expected = load_for_inference(run[0], ctx=ctx)
    answer = expected.generate([expected.prompt("What is this?", [tmp_path / "a.png"])], max_new_tokens=12)[0]
    # The test's process has entered its grid already.
    monkeypatch.setattr(load, "load_for_inference", lambda path, **options: load_for_inference(path, ctx=ctx, **options))
    app = typer.Typer()
    app.command()(generate)
    line = [str(run[0]), "--prompt", "What is this?", "--image", str(tmp_path / "a.png"), "--max-new-tokens", "12"]
    result = CliRunner().invoke(app, line, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.rstrip("\n") == expected.text(answer).rstrip("\n")


@pytest.mark.parametrize("text", ["A digit.", "naïve – 数字 🙂!", ""])
def test_streamed_pieces_join_to_the_whole(run, ctx, text):
    loaded = load_for_inference(run[0], ctx=ctx)
    ids = [*loaded.tokenizer.encode(text).ids, loaded.chat.stop_ids[0]]
    pieces = []
    stream = TextStream(loaded.text, pieces.append)
    for i in ids:
        stream.add(i)
    stream.close()
    assert "".join(pieces) == text
    assert not any("\ufffd" in p for p in pieces)


def test_folders_that_hold_no_model_are_refused(run, ctx, tmp_path):
    with pytest.raises(LoadError, match="no such folder"):
        load_for_inference(tmp_path / "nothing", ctx=ctx)
    with pytest.raises(LoadError, match="neither a run"):
        load_for_inference(tmp_path, ctx=ctx)
    (tmp_path / "recipe.yaml").write_text((run[0] / "recipe.yaml").read_text())
    with pytest.raises(LoadError, match="without a complete checkpoint"):
        load_for_inference(tmp_path, ctx=ctx)
    with pytest.raises(LoadError, match="pipeline=2"):
        load_for_inference(run[0], parallel=ParallelConfig(pipeline=2))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(LoadError, match="has no chat_template.jinja"):
        load_for_inference(tmp_path, ctx=ctx)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(LoadError, match="not one of ours: say which format"):
        load_for_inference(tmp_path, ctx=ctx)
    with pytest.raises(LoadError, match="'x' is not one of megavlm"):
        load_for_inference(tmp_path, ctx=ctx, chat_template="x")
