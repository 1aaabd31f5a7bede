"""`megavlm checkpoint`: what is listed, what is found to be damaged, and what may be deleted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import CheckpointError
from megavlm.checkpoint.listing import damage, survey
from megavlm.cli.checkpoint import app


def write(run: Path, name: str, size: int = 100, **state: Any) -> Path:
    """A checkpoint as far as files go: two shards, its state, its manifest, `latest`."""
    unfinished = run / folders.CHECKPOINTS / (name + folders.UNFINISHED)
    unfinished.mkdir(parents=True)
    for shard in ("__0_0.distcp", "__1_0.distcp"):
        (unfinished / shard).write_bytes((name + shard).encode() * size)
    held = state.pop("held", ["language"])
    folders.write_json(unfinished / folders.STATE, {"held": held, "has_optimizer": True, "modules": dict.fromkeys(held, name), **state})
    names = [path.name for path in unfinished.iterdir() if path.name != folders.STATE]
    folders.write_json(unfinished / folders.MANIFEST, {"files": {n: folders.checksum(unfinished / n) for n in names}})
    folders.publish(unfinished, unfinished.with_suffix(""))
    return unfinished.with_suffix("")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Stage a ended at 20, stage b is at 50; the encoder was not trained in b."""
    for step in (10, 20):
        write(tmp_path, f"{step:08d}-a", held=["language", "vision"])
    for step in (30, 40, 50):
        modules = {"language": f"{step:08d}-b", "vision": "00000020-a"}
        write(tmp_path, f"{step:08d}-b", modules=modules, held_out_loss=step / 10)
    return tmp_path


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def megavlm(*arguments: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=answer, env={"COLUMNS": "200"})


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / folders.CHECKPOINTS).iterdir() if path.is_dir())


def test_list_as_json(run_dir: Path) -> None:
    (run_dir / folders.CHECKPOINTS / "00000050-b" / "__1_0.distcp").unlink()
    (run_dir / folders.CHECKPOINTS / "00000060-b.tmp").mkdir()
    entries = {e["name"]: e for e in json.loads(megavlm("list", run_dir, "--json").stdout)}
    assert list(entries) == ["00000010-a", "00000020-a", "00000030-b", "00000040-b", "00000050-b", "00000060-b.tmp"]
    assert [name for name, e in entries.items() if e["resumes"]] == ["00000040-b"]
    assert [name for name, e in entries.items() if e["is_latest"]] == ["00000050-b"]
    assert entries["00000050-b"]["problem"] == "__1_0.distcp is missing" and "interrupted" in entries["00000060-b.tmp"]["problem"]
    whole = entries["00000010-a"]
    assert (whole["step"], whole["stage"], whole["modules"], whole["problem"]) == (10, "a", ["language", "vision"], None)
    assert whole["size_bytes"] == sum(p.stat().st_size for p in Path(whole["path"]).iterdir())
    assert 0 <= whole["age_s"] < 60


def test_list_as_a_table(run_dir: Path) -> None:
    lines = megavlm("list", run_dir).stdout.splitlines()
    row = next(line for line in lines if "00000050-b" in line)
    assert "language, optimizer" in row and "complete, a start resumes here, latest" in row and "KiB" in row
    assert sum("resumes here" in line for line in lines) == 1


def test_verify_names_the_damaged_files(run_dir: Path) -> None:
    whole = megavlm("verify", run_dir)
    assert whole.exit_code == 0 and whole.stdout.count("every file is as it was written") == 5
    flip(run_dir / folders.CHECKPOINTS / "00000040-b" / "__1_0.distcp")
    (run_dir / folders.CHECKPOINTS / "00000050-b" / "__0_0.distcp").write_bytes(b"short")
    damaged = megavlm("verify", run_dir)
    assert damaged.exit_code == 1
    assert "00000040-b: damaged\n  __1_0.distcp changed since it was written" in damaged.stdout
    assert "00000050-b: damaged\n  __0_0.distcp has 5 bytes" in damaged.stdout
    assert megavlm("verify", run_dir, "00000030-b").exit_code == 0
    assert megavlm("verify", run_dir / folders.CHECKPOINTS / "00000040-b").exit_code == 1


def test_verify_of_a_folder_without_a_manifest(run_dir: Path) -> None:
    (run_dir / folders.CHECKPOINTS / "00000030-b" / folders.MANIFEST).unlink()
    assert "it has no manifest.json" in megavlm("verify", run_dir, "00000030-b").stdout
    assert damage(run_dir / folders.CHECKPOINTS / "00000030-b")


def test_prune_says_why_and_asks(run_dir: Path) -> None:
    before = names(run_dir)
    shown = megavlm("prune", run_dir, "--keep-last", 1, "--dry-run")
    assert shown.exit_code == 0 and names(run_dir) == before
    assert "delete 00000010-a" in shown.stdout and "delete 00000040-b" in shown.stdout
    assert "keep   00000020-a: last of its stage, holds vision of 00000050-b" in shown.stdout
    refused = megavlm("prune", run_dir, "--keep-last", 1, answer="n\n")
    assert refused.exit_code == 1 and names(run_dir) == before
    assert megavlm("prune", run_dir, "--keep-last", 1, answer="y\n").exit_code == 0
    assert names(run_dir) == ["00000020-a", "00000050-b"]
    again = megavlm("prune", run_dir, "--keep-last", 1)
    assert again.exit_code == 0 and "nothing to delete" in again.stdout


def test_rules_of_prune(run_dir: Path) -> None:
    rules = ("--keep-last", 1, "--keep-every-steps", 40, "--keep-best", 1, "--keep", "00000010-a")
    assert megavlm("prune", run_dir, *rules, "--yes").exit_code == 0
    assert names(run_dir) == ["00000010-a", "00000020-a", "00000030-b", "00000040-b", "00000050-b"]
    assert megavlm("prune", run_dir, "--keep-last", 1, "--keep-best", 1, "--yes").exit_code == 0
    assert names(run_dir) == ["00000020-a", "00000030-b", "00000050-b"]


def test_the_last_good_one_is_never_deleted(run_dir: Path) -> None:
    """Sizes agree, so that only its checksum tells that the newest is worth nothing."""
    for name in ("00000050-b", "00000020-a"):
        flip(run_dir / folders.CHECKPOINTS / name / "__0_0.distcp")
    done = megavlm("prune", run_dir, "--keep-last", 1, "--yes")
    assert "keep   00000040-b: newest good" in done.stdout
    assert names(run_dir) == ["00000020-a", "00000040-b", "00000050-b"]


def test_leftovers_go_only_when_asked(run_dir: Path) -> None:
    leftover = run_dir / folders.CHECKPOINTS / "00000060-b.tmp"
    leftover.mkdir()
    megavlm("prune", run_dir, "--keep-last", 9, "--yes")
    assert leftover.is_dir()
    done = megavlm("prune", run_dir, "--keep-last", 9, "--leftovers", "--yes")
    assert done.exit_code == 0 and "delete 00000060-b.tmp" in done.stdout and not leftover.exists()
    assert len(names(run_dir)) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("list", "{empty}"), "is no run's folder, or nothing was saved in it yet"),
        (("verify", "{empty}"), "is no run's folder"),
        (("verify", "{run}", "00000099-b"), "holds no 00000099-b"),
        (("prune", "{run}", "--keep", "00000099-b"), "has no such checkpoint"),
    ],
)
def test_mistakes(run_dir: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "empty").mkdir()
    done = megavlm(*(a.format(empty=tmp_path / "empty", run=run_dir) for a in arguments))
    assert isinstance(done.exception, CheckpointError) and message in str(done.exception)


def test_looking_and_tidying_need_no_torch(run_dir: Path) -> None:
    code = (
        "import sys\nfrom megavlm.cli.main import main\n"
        "for arguments in (['list', RUN], ['prune', RUN, '--yes']):\n"
        "    try: main(['checkpoint', *arguments])\n"
        "    except SystemExit as end: assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    ).replace("RUN", repr(str(run_dir)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_survey_reads_a_state_that_is_none(run_dir: Path) -> None:
    (run_dir / folders.CHECKPOINTS / "00000030-b" / folders.STATE).write_bytes(b"\x80\x04\x95")
    (entry,) = [e for e in survey(run_dir) if e.name == "00000030-b"]
    assert entry.problem is not None and "damaged" in entry.problem and entry.modules == ()


def test_what_was_found_damaged_is_told_and_goes_when_asked(run_dir: Path) -> None:
    aside = folders.set_damaged_aside(run_dir / folders.CHECKPOINTS / "00000050-b")
    entries = {e["name"]: e for e in json.loads(megavlm("list", run_dir, "--json").stdout)}
    assert "a start found it damaged" in entries[aside.name]["problem"] and entries["00000040-b"]["resumes"]
    assert megavlm("prune", run_dir, "--keep-last", 9, "--yes").exit_code == 0 and aside.is_dir()
    done = megavlm("prune", run_dir, "--keep-last", 9, "--damaged", "--yes")
    assert done.exit_code == 0 and "deleted 1" in done.stdout and not aside.exists()


def test_checkpoints_on_the_nodes_own_disk(run_dir: Path, tmp_path: Path) -> None:
    own = folders.local_run_dir(tmp_path / "disk", "mine", run_dir)
    write(own / "node", "00000055-b")
    (run_dir / "recipe.yaml").write_text(f"run: {{name: mine}}\ncheckpoint: {{local: {{dir: '{tmp_path / 'disk'}', every_steps: 5}}}}\n")
    entries = json.loads(megavlm("list", run_dir, "--json").stdout)
    assert [(e["name"], e["tier"]) for e in entries if e["resumes"]] == [("00000055-b", "local")]
    assert [e["tier"] for e in entries] == ["durable"] * 5 + ["local"]
    megavlm("prune", run_dir, "--keep-last", 1, "--yes")
    assert (own / "node" / folders.CHECKPOINTS / "00000055-b").is_dir()
