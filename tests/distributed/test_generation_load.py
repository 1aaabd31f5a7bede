"""A model comes back from a run's folder, from one of its checkpoints and from a Hugging Face folder, ready to talk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from megavlm.checkpoint import store
from megavlm.config.schema import ParallelConfig
from megavlm.inference.load import LoadError, load_for_inference
from megavlm.inference.loaded import LoadedModel
from megavlm.inference.sampling import GenerationError
from megavlm.inference.stream import TextStream
from megavlm.models.init import initialise
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.context import enter_grid, leave_grid, stop_process_group
from megavlm.testing.in_rank import in_rank
from megavlm.testing.runs import write_tiny_run


def make_run(folder: Path) -> None:
    ctx = enter_grid(ParallelConfig(), torch.device("cpu"), 1)
    recipe = write_tiny_run(folder)
    model = recipe.model
    text = VisionLanguageModel(model, recipe.precision, ParallelConfig(), ctx, text_only=True)
    initialise([text], model, 1, ctx)
    state = {"modules": {"language": "00000001-text", "latest": "00000001-text"}}
    store.save(folder / "checkpoints" / "00000001-text", [text], None, state, ctx)
    # What encoder pretraining leaves: a checkpoint without a language model.
    rest = VisionLanguageModel(model, recipe.precision, ParallelConfig(), ctx)
    initialise([rest], model, 2, ctx)
    rest.language = None
    state = {"modules": {"language": "00000001-text", "vision": "00000002-rest", "projector": "00000002-rest", "latest": "00000002-rest"}}
    store.save(folder / "checkpoints" / "00000002-rest", [rest], None, state, ctx)


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory) -> Path:
    """A run of two stages: the language model alone (seed 1), then everything but it (vision and projector, seed 2)."""
    folder = tmp_path_factory.mktemp("run")
    pool.run(make_run, folder)
    return folder


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@in_rank
def test_each_module_comes_from_the_newest_checkpoint_that_holds_it(run, ctx):
    loaded = load_for_inference(run, ctx=ctx)
    recipe = loaded.recipe
    made = {}
    for seed in (1, 2, 3):
        made[seed] = VisionLanguageModel(recipe.model, recipe.precision, ParallelConfig(), ctx)
        initialise([made[seed]], recipe.model, seed, ctx)
    found = weights(loaded.model)
    for name in found:
        seed = 1 if name.startswith("language") else 2
        assert torch.equal(found[name], weights(made[seed])[name]), name
    early = weights(load_for_inference(run / "checkpoints" / "00000001-text", ctx=ctx).model)
    for name in early:
        seed = 1 if name.startswith("language") else 3  # what no stage has trained is as the run started
        assert torch.equal(early[name], weights(made[seed])[name]), name
    assert not loaded.model.training


@in_rank
def test_it_answers_questions_about_pictures(run, ctx):
    model, tokenizer, chat, recipe = loaded = load_for_inference(run, ctx=ctx)
    pictures = [Image.effect_noise((40, 20), 60).convert("RGB"), Image.new("RGB", (16, 16), "red")]
    prompts = [loaded.prompt("What is this?", pictures), loaded.prompt("What <image> is this? <image>", pictures), loaded.prompt("What?")]
    assert [p.ids.count(tokenizer.image_token_id) for p in prompts] == [8, 8, 0]
    answers = loaded.generate(prompts, max_new_tokens=20)
    assert answers[0] != loaded.generate([loaded.prompt("What is this?", pictures[::-1])], max_new_tokens=20)[0]
    assert loaded.text([*tokenizer.encode("A digit.").ids, *chat.stop_ids[:1]]) == "A digit."
    assert model.model == recipe.model


@in_rank
def test_the_command_streams_the_answer(run, ctx, tmp_path):
    import typer

    from megavlm.cli.generate import generate

    Image.effect_noise((30, 30), 80).save(tmp_path / "a.png")
    expected = load_for_inference(run, ctx=ctx)
    answer = expected.generate([expected.prompt("What is this?", [tmp_path / "a.png"])], max_new_tokens=12)[0]
    app = typer.Typer()
    app.command()(generate)
    line = [str(run), "--prompt", "What is this?", "--image", str(tmp_path / "a.png"), "--max-new-tokens", "12"]
    leave_grid()
    result = CliRunner().invoke(app, line, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.rstrip("\n") == expected.text(answer).rstrip("\n")


@in_rank
def test_a_process_loads_again_and_again(run, tmp_path):
    """As in a notebook: also after a load that failed, and the model of an earlier load still answers."""
    picture = Image.effect_noise((30, 30), 80)
    first = load_for_inference(run)
    answer = first.ask("What is this?", [picture], max_new_tokens=8)
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("tokenizer.model", "none.model"))
    with pytest.raises(ValueError, match="none.model' does not exist"):
        load_for_inference(tmp_path)
    assert load_for_inference(run).ask("What is this?", [picture], max_new_tokens=8) == answer
    assert first.ask("What is this?", [picture], max_new_tokens=8) == answer
    stop_process_group()
    assert load_for_inference(run).ask("What is this?", [picture], max_new_tokens=8) == answer


@in_rank
def test_a_grid_that_is_not_its_own_is_left_alone(run, ctx):
    with pytest.raises(LoadError, match="in a parallel grid already: give its ParallelContext as ctx"):
        load_for_inference(run)
    load_for_inference(run, ctx=ctx)


@in_rank
def test_a_split_that_does_not_divide_is_refused_before_anything_is_built(run):
    with pytest.raises(ValueError, match="parallel.tensor=3 does not divide model.language's 2 attention heads"):
        load_for_inference(run, parallel=ParallelConfig(tensor=3))


@in_rank
def test_a_language_model_sees_no_pictures(run, ctx):
    loaded = load_for_inference(run, ctx=ctx)
    alone = loaded.recipe.model.model_copy(update={"text_only": True, "family": "qwen2"})
    loaded = LoadedModel(loaded.model, loaded.tokenizer, loaded.chat, loaded.recipe.model_copy(update={"model": alone}))
    with pytest.raises(GenerationError, match=r"language model alone \(model.family=qwen2\): it sees no pictures; leave out --image"):
        loaded.prompt("What?", [Image.new("RGB", (8, 8))])
    assert loaded.prompt("What?").ids


@pytest.mark.parametrize("text", ["A digit.", "naïve – 数字 🙂!", ""])
@in_rank
def test_streamed_pieces_join_to_the_whole(run, ctx, text):
    loaded = load_for_inference(run, ctx=ctx)
    ids = [*loaded.tokenizer.encode(text).ids, loaded.chat.stop_ids[0]]
    pieces = []
    stream = TextStream(loaded.text, pieces.append)
    for i in ids:
        stream.add(i)
    stream.close()
    assert "".join(pieces) == text
    assert not any("\ufffd" in p for p in pieces)


@in_rank
def test_folders_that_hold_no_model_are_refused(run, ctx, tmp_path):
    with pytest.raises(LoadError, match="no such folder"):
        load_for_inference(tmp_path / "nothing", ctx=ctx)
    with pytest.raises(LoadError, match="neither a run"):
        load_for_inference(tmp_path, ctx=ctx)
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(LoadError, match="without a complete checkpoint"):
        load_for_inference(tmp_path, ctx=ctx)
    with pytest.raises(LoadError, match="pipeline=2"):
        load_for_inference(run, parallel=ParallelConfig(pipeline=2))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(LoadError, match="'x' is none of megavlm"):
        load_for_inference(tmp_path, ctx=ctx, chat_template="x")
