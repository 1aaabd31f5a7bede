"""`megavlm generate` as a process: answers to a file on two tensor ranks, and a conversation through a pipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from megavlm.config.schema import ParallelConfig
from megavlm.inference.conversation import Conversation
from megavlm.inference.load import load_for_inference
from megavlm.inference.requests import read_requests
from megavlm.inference.sampling import GenerationError
from megavlm.models.init import initialise
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.context import enter_grid, leave_grid
from megavlm.testing.pool import RankPool
from megavlm.testing.runs import write_tiny_run

QUESTIONS = [("What is this?", ["a.png"]), ("A digit.", []), ("What <image> is <image>?", ["b.png", "a.png"])]
TURNS = ["What is this?", "A digit. What?"]


def make_run(folder: Path) -> tuple[list[str], list[str]]:
    """A random model with its checkpoint; its answers to QUESTIONS, and to TURNS of one conversation about a.png."""
    from megavlm.checkpoint import store

    ctx = enter_grid(ParallelConfig(), torch.device("cpu"), 1)
    recipe = write_tiny_run(folder)
    model = recipe.model
    chunk = VisionLanguageModel(model, recipe.precision, ParallelConfig(), ctx)
    initialise([chunk], model, 1, ctx)
    name = "00000001-only"
    state = {"modules": {"vision": name, "projector": name, "language": name, "latest": name}}
    store.save(folder / "checkpoints" / name, [chunk], None, state, ctx)
    for i, picture in enumerate(("a.png", "b.png")):
        Image.effect_noise((30 + 9 * i, 20), 80).save(folder / picture)
    loaded = load_for_inference(folder, ctx=ctx)
    prompts = [loaded.prompt(text, [folder / p for p in pictures]) for text, pictures in QUESTIONS]
    answers = [loaded.text(ids) for ids in loaded.generate(prompts, max_new_tokens=12)]
    talk, said = Conversation(loaded), []
    for turn, text in enumerate(TURNS):
        asked = talk.prompt(text, [folder / "a.png"] if turn == 0 else [])
        said.append(loaded.text(loaded.generate([asked], max_new_tokens=12)[0]))
        talk.answered(said[-1])
    leave_grid()
    return answers, said


@pytest.fixture(scope="module")
def run(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    folder = tmp_path_factory.mktemp("run")
    answers, said = pool.run(make_run, folder)[0]
    return folder, answers, said


def megavlm(*line: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megavlm.cli", *line], input=stdin, capture_output=True, text=True, timeout=240, check=False
    )


def test_a_file_of_questions_on_two_tensor_ranks(run: tuple[Path, list[str], list[str]], tmp_path: Path) -> None:
    folder, answers, _ = run
    lines = [{"id": i, "prompt": text, "images": [str(folder / p) for p in pictures]} for i, (text, pictures) in enumerate(QUESTIONS)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    line = ["generate", str(folder), "--file", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "a.jsonl"), "--batch-size", "2"]
    done = megavlm(*line, "--max-new-tokens", "12", "--tensor", "2")
    assert done.returncode == 0, done.stderr
    found = [json.loads(text) for text in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["id"], record["answer"]) for record in found] == list(enumerate(answers))
    assert done.stderr.count(f"3 answers -> {tmp_path / 'a.jsonl'}") == 1


def test_a_number_of_ranks_that_does_not_divide_is_one_message(run: tuple[Path, list[str], list[str]]) -> None:
    done = megavlm("generate", str(run[0]), "--prompt", "hi", "--tensor", "3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "parallel.tensor=3 does not divide model.language's 2 attention heads" in done.stderr


def test_every_broken_line_of_a_file_is_named(tmp_path: Path) -> None:
    lines = ['{"prompt": "a"}', "{", '{"prompt": "b", "images": ["no.png", "none.png"]}', *["[]"] * 5]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    with pytest.raises(GenerationError) as refused:
        read_requests(tmp_path / "q.jsonl")
    said = str(refused.value)
    assert "q.jsonl, line 2: not JSON" in said and f"line 3: there is no picture {tmp_path / 'no.png'}, {tmp_path / 'none.png'}" in said
    assert "line 4: each line is" in said and "line 6" in said and "line 7" not in said and said.endswith("and 2 more lines")


def test_a_conversation_remembers_its_picture(run: tuple[Path, list[str], list[str]]) -> None:
    folder, _, said = run
    talk = f"/image {folder / 'none.png'}\n/image {folder / 'a.png'}\n{TURNS[0]}\n{TURNS[1]}\n/new\n/what\n/quit\nnot read\n"
    done = megavlm("generate", str(folder), "--chat", "--max-new-tokens", "12", stdin=talk)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{text}\n" for text in said)
    assert "there is no such picture" in done.stderr and "/what: /image FILE" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--prompt", "a", "--chat"], "give one of --prompt TEXT, --chat and --file FILE"),
        (["--file", "none.jsonl"], "none.jsonl: there is no such file"),
        (["--prompt", "<image> and <image>", "--image", "a.png"], '--prompt places 2 "<image>": give as many --image, not 1'),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty=0.0 must be positive"),
        (["--prompt", "a", "--stop", ""], "a stop string is empty"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_weights_are_read(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from megavlm.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["generate", str(tmp_path), *line])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
