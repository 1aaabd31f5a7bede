"""`megavlm train` as a user meets it: processes, files, Ctrl-C, torchrun, mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megavlm.config.load import dump_recipe, load_recipe
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read
from megavlm.tracking.metrics import read_metrics

ROOT = Path(__file__).parents[2]
FIELDS = (
    *("step", "stage", "stage_step", "loss", "grad_norm", "lr", "tokens", "useful_tokens", "target_tokens", "images", "tiles"),
    *("step_time_s", "data_wait_s", "tokens_per_s", "mfu", "pack_fill", "task_loss"),
)


def write_recipe(folder: Path, data_dir: Path, steps: int = 4, **blocks: Any) -> Path:
    recipe = tiny_recipe(folder / "run", data_dir, [tiny_stage(steps=steps)], **blocks)
    path = folder / "recipe.yaml"
    dump_recipe(recipe, path)
    return path


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "launchers")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def megavlm(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megavlm.cli", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False)


def test_two_ranks_write_a_complete_run_folder_that_reruns_itself(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, data_dir, run={"num_ranks": 2})
    done = megavlm("train", str(path), "run.max_steps=2")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "run"
    records = read_metrics(run_dir)
    assert [r["step"] for r in records] == [1, 2]
    for field in FIELDS:
        assert field in records[0], field
    assert json.loads((run_dir / "environment.json").read_text())["world_size"] == 2
    assert len([p for p in (run_dir / "checkpoints").iterdir() if p.is_dir()]) == 1
    # The resolved recipe reruns the run, here as a single rank in another folder.
    (again,) = pool.run(train_and_read, load_recipe(run_dir / "recipe.yaml", [f"run.dir={tmp_path / 'again'}"]))
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in records], rel=1e-5)


def test_ctrl_c_saves_and_the_next_start_resumes(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, data_dir, steps=5000, run={"num_ranks": 2})
    command = [sys.executable, "-m", "megavlm.cli", "train", str(path)]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, "no step within 200 s"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=100) == 130
    finally:
        process.kill()
        process.wait()
        log.close()
    done_steps = len(read_metrics(tmp_path / "run"))
    assert 2 <= done_steps < 5000
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    (after,) = pool.run(train_and_read, load_recipe(path, [f"run.max_steps={done_steps + 1}"]))
    assert [record["step"] for record in after] == list(range(1, done_steps + 2))
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(before), "no step was made again"


def test_torchrun_brings_the_ranks(data_dir: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, data_dir, parallel={"tensor": 2})
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megavlm.cli", "train", str(path), "run.max_steps=1"),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_metrics(tmp_path / "run")) == 1


def test_dry_run_shows_grid_parameters_memory_and_plan(data_dir: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, data_dir, parallel={"tensor": 2, "pipeline": 2})
    done = megavlm("train", str(path), "--dry-run", "--nproc", "8")
    assert done.returncode == 0, done.stderr
    for words in ("tensor 2", "pipeline 2", "data 2", "parameters", "memory of a rank", "activations", "pack_fill"):
        assert words in done.stdout, words
    assert not (tmp_path / "run").exists(), "a dry run leaves nothing behind"


def test_dry_run_shows_pipeline_stages_and_the_bubble(data_dir: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, data_dir, parallel={"pipeline": 2})
    shown = {}
    for split in ("split=balanced", "layers_per_stage=[4,0]"):
        done = megavlm("train", str(path), f"parallel.{split}", "--dry-run", "--nproc", "2")
        assert done.returncode == 0, done.stderr
        shown[split] = done.stdout
        assert "pipeline stages (mean FLOPs of a microbatch" in done.stdout and "expected bubble: ranks idle" in done.stdout
    idle = {split: float(text.split("ranks idle ")[1].split(" %")[0]) for split, text in shown.items()}
    assert idle["split=balanced"] < idle["layers_per_stage=[4,0]"] < 100
    rows = [line.split() for line in shown["layers_per_stage=[4,0]"].split("pipeline stages")[1].splitlines()[3:5]]
    assert [row[2] for row in rows] == ["0-3", "none"]


def test_a_mistake_in_two_ranks_ends_with_one_message_and_code_2(data_dir: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, data_dir)
    done = megavlm("train", str(path), "data.sources.pages.path=nowhere", "--nproc", "2")
    message = done.stderr + "".join(p.read_text() for p in (tmp_path / "run" / "logs").glob("*"))
    assert done.returncode == 2, message
    assert "nowhere" in message and "Traceback" not in message


MISTAKES = [
    (["parallel.tensor=3"], ["parallel.tensor=3"]),
    (["parallel.tensr=2"], ["parallel.tensr", "tensor"]),
    (["stages.all.steps=many"], ["steps", "many"]),
    (["data.tokenizer=nowhere.model"], ["nowhere.model"]),
    (["data.sources.pages.path=nowhere"], ["nowhere"]),
    (["data.sources.pages.split=trian"], ["trian"]),
    (["data.seq_len_tokens=20"], ["seq_len_tokens=20"]),
    (["stages.all.packs_per_step=7", "parallel.pipeline=2", "parallel.virtual_pipeline=2"], ["packs_per_step"]),
    (["parallel.pipeline=3"], ["3", "parallel.split=balanced"]),
    (["parallel.pipeline=2", "parallel.layers_per_stage=[1,2]"], ["layers_per_stage=[1, 2] adds up to 3", "num_layers=4"]),
    (["parallel.pipeline=2", "parallel.layers_per_stage=[1,2,1]"], ["has 3 numbers", "2 chunks"]),
    (["run.device=cuda"], ["run.device"]),
    (["init.from_hf=nowhere"], ["nowhere", "no such folder"]),
]


@pytest.mark.parametrize(("changes", "words"), MISTAKES, ids=lambda x: x[0] if "=" in x[0] else "")
def test_mistakes_end_with_one_message_and_code_2(
    changes: list[str], words: list[str], data_dir: Path, tmp_path: Path, pool: RankPool
) -> None:
    """The command's own code in ranks that have their imports behind them, as torchrun would start it."""
    path = write_recipe(tmp_path, data_dir)
    ranks = next((int(c.rsplit("=", 1)[1]) for c in changes if c.startswith("parallel.pipeline")), 1)
    results = pool.run(command_in_rank, ["train", str(path), *changes], world_size=ranks)
    message = "".join(text for _, text in results)
    assert [code for code, _ in results] == [2] * ranks, message
    for word in words:
        assert word in message
    assert "Traceback" not in message


def command_in_rank(arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of `megavlm ...` in this process."""
    from megavlm.cli.main import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0), shown.getvalue()


def test_missing_recipe_and_broken_yaml(tmp_path: Path) -> None:
    done = megavlm("train", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "none.yaml" in done.stderr
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: {dir: x\nstages: [")
    done = megavlm("train", str(broken))
    assert done.returncode == 2
    assert "broken.yaml" in done.stderr


def test_a_truncated_picture_costs_its_own_sample(data_dir: Path, tmp_path: Path, pool: RankPool) -> None:
    """The run goes on, the sample is named, and its targets do not count."""
    damaged = tmp_path / "pages"
    damaged.mkdir()
    shard = sorted((data_dir / "pages").glob("shard-*.tar"))[0]
    hit = ""
    with tarfile.open(shard) as source, tarfile.open(damaged / shard.name, "w", format=tarfile.USTAR_FORMAT) as target:
        for member in source:
            content = source.extractfile(member).read()  # type: ignore[union-attr]
            is_train = member.name.endswith(".png") and not hit
            if is_train and member.name >= sorted(m.name for m in source.getmembers() if m.name.endswith(".png"))[3]:
                hit, content = member.name, content[: len(content) // 2]
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    stage = tiny_stage(steps=12) | {"mixture": {"pages": 1.0}, "packs_per_step": 8}
    recipe = tiny_recipe(tmp_path / "run", data_dir, [stage], data={"sources": {"pages": {"path": str(damaged)}}})
    assert len(pool.run(train_and_read, recipe)[0]) == 12
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert lines
    assert {hit.split(".", 1)[0]} == {line["key"] for line in lines}


def test_resolved_recipe_is_plain_yaml(data_dir: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(write_recipe(tmp_path, data_dir).read_text())
    assert values["stages"][0]["optimizer"]["eps"] == 1e-5
