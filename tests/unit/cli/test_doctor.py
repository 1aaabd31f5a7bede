"""`megavlm doctor`: every check against something real or a stand-in of the capability, and the exit code."""

import base64
import errno
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from megavlm.checkpoint import folders
from megavlm.cli._doctor import disk, examine, mlflow, parts, slurm
from megavlm.cli._doctor.check import Check
from megavlm.cli._doctor.reach import check_here
from megavlm.cli._doctor.recipe import check_recipe
from megavlm.cli._doctor.room import durable_room, local_room
from megavlm.cli.doctor import doctor
from megavlm.config.cluster import ClusterConfig
from megavlm.config.schema import Recipe, TrackingConfig
from megavlm.testing.slurm import SlurmCluster, missing_programs
from megavlm_kernels.packed_attention import Machine

CPU = Machine("cpu")


def megavlm(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megavlm.cli", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "COLUMNS": "140", **environ}, capture_output=True, text=True, timeout=240)


# ---------------------------------------------------------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_doctor_finds_what_is_there_and_says_what_is_not(tmp_path):
    done = megavlm("doctor", "--json", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/m.db")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    by_name = {p["name"]: p for p in found["parts"]}
    assert by_name["torch"]["status"] == "ok" and by_name["torch"]["version"] == version("torch")
    assert by_name["megatron-core"]["version"] == version("megatron-core")
    assert all(p["status"] in ("ok", "missing", "broken") and p["without"] for p in by_name.values())
    assert {"CUDA", "Transformer Engine", "Apex", "flash-attn", "DALI", "nvImageCodec", "sentencepiece", "mlflow"} <= set(by_name)
    checks = {c["name"]: c for c in found["checks"]}
    assert checks["gloo, 2 ranks here"]["state"] == "ok" and "all-reduce is right" in checks["gloo, 2 ranks here"]["detail"]
    assert checks["MLflow"]["state"] == "ok" and found["recipe"] is None and found["problems"] == []


@pytest.mark.slow
def test_ranks_of_torchrun_talk_and_the_first_tells(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29655", "-m", "megavlm.cli"]
    done = subprocess.run([*command, "doctor", "--json"], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checks = {c["name"]: c for c in json.loads(done.stdout)["checks"]}  # one object: the other rank is silent
    assert checks["gloo, all 2 ranks"]["state"] == "ok"


@pytest.mark.parametrize("as_json", [True, False])
def test_doctor_reports_all_and_its_exit_code_says_that_something_needed_is_missing(monkeypatch, capsys, as_json, tmp_path):
    lacking = [parts.Part("psutil", "psutil", ("psutil",), True, "a"), parts.Part("nope", "no_such_part", ("no",), True, "nothing trains")]
    monkeypatch.setattr(parts, "PARTS", lacking)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(typer.Exit) as end:
        doctor(as_json=as_json, ranks=False)
    assert end.value.exit_code == 1
    out = capsys.readouterr().out
    if as_json:
        found = json.loads(out)
        assert [p["status"] for p in found["parts"]] == ["ok", "missing"] and found["problems"] == ["nope"]
        ways = found["context"]
        assert "compiled encoder" in found["precision"] and "bf16" in found["precision"]
        assert list(ways) == ["keys", "p2p", "all_gather", "a2a"] and ways["keys"] in ("auto takes this one", "")
    else:
        assert "needed: nothing trains" in out and "Needed and not usable: nope" in out
        assert "keys of context ranks" in out and "all_gather" in out


def test_doctor_of_a_recipe(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(parts, "PARTS", [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    file = tmp_path / "r.yaml"
    (tmp_path / "pages").mkdir()
    file.write_text(
        f"run: {{dir: {tmp_path}/run, device: cpu}}\ndata: {{sources: {{pages: {{path: {tmp_path}/pages}}}}}}\n"
        "stages: [{name: align, steps: 10, mixture: {pages: 1.0}}]\n"
    )
    doctor(file, ["model.language.num_layers=2"], as_json=True, ranks=False)
    found = json.loads(capsys.readouterr().out)
    recipe = {c["name"]: c for c in found["recipe"]}
    assert recipe["attention of language"]["detail"].startswith("sdpa") and recipe["grid"]["detail"] == "1 ranks"
    assert recipe["data"]["state"] == "ok" and ") of " in recipe["memory of a rank"]["detail"]
    assert not (tmp_path / "run").exists(), "the doctor makes no folders"
    with pytest.raises(typer.Exit):
        doctor(file, [f"data.sources.pages.path={tmp_path}/none"], ranks=False)
    assert "data.sources.pages.path" in capsys.readouterr().out


def test_doctor_tells_a_broken_package_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_part_for_test.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    broken = parts.examine(parts.Part("x", "broken_part_for_test", ("x",), False, "nothing"))
    assert (broken.status, broken.detail) == ("broken", "OSError: libcuda.so.1: cannot open shared object file")
    assert parts.examine(parts.Part("y", "no_such_part.inner", ("y",), False, "nothing")).status == "missing"


# ----------------------------------------------------------------------------------------------------------------------- the recipe


def recipe_of(tmp_path: Path, **blocks) -> Recipe:
    (tmp_path / "pages").mkdir(exist_ok=True)
    values = {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
        "data": {"sources": {"pages": {"path": str(tmp_path / "pages")}}},
        "stages": [{"name": "align", "steps": 10, "mixture": {"pages": 1.0}}],
    }
    return Recipe.model_validate(values | blocks)


def broken(checks: list[Check]) -> dict[str, str]:
    return {c.name: c.detail for c in checks if c.is_problem}


def test_what_a_machine_cannot_compute_is_told(tmp_path):
    assert broken(check_recipe(recipe_of(tmp_path), CPU, 1, None)) == {}
    turing = Machine("cuda", (7, 5))
    in_bf16 = recipe_of(tmp_path, precision={"dtype": "bf16"})
    assert "set fp16" in broken(check_recipe(in_bf16, turing, 1, None))["number format"]
    forced = recipe_of(tmp_path, precision={"dtype": "bf16", "attention": "flash_attn"}, run={"dir": str(tmp_path), "device": "cuda"})
    found = broken(check_recipe(forced, Machine("cuda", (9, 0)), 1, None))
    assert {"attention of language", "attention of vision"} <= set(found)
    fp8 = recipe_of(tmp_path, precision={"dtype": "bf16", "fp8": "delayed"}, run={"dir": str(tmp_path), "device": "cuda"})
    assert "FP8" in broken(check_recipe(fp8, Machine("cuda", (9, 0)), 1, None))
    assert "3 ranks" in broken(check_recipe(recipe_of(tmp_path, parallel={"tensor": 2}), CPU, 3, None))["grid"]


def test_memory_is_held_against_the_device(tmp_path):
    def memory(size):
        return next(c for c in check_recipe(recipe_of(tmp_path), CPU, 1, size) if c.name == "memory of a rank")

    assert memory(1 << 20).is_problem and memory(1 << 50).state == "ok" and "unknown" in memory(None).detail


def lay_down(run: Path, name: str, **state) -> None:
    """A checkpoint of a thousand bytes and what describes it."""
    unfinished = run / folders.CHECKPOINTS / (name + folders.UNFINISHED)
    unfinished.mkdir(parents=True)
    (unfinished / "shard").write_bytes(bytes(1000))
    folders.write_json(unfinished / folders.STATE, state)
    folders.write_json(unfinished / folders.MANIFEST, {"files": {"shard": folders.checksum(unfinished / "shard")}})
    folders.publish(unfinished, run / folders.CHECKPOINTS / name)


def test_room_for_checkpoints_is_beside_those_that_they_replace(tmp_path):
    stages = [{"name": name, "steps": 10, "mixture": {"pages": 1.0}} for name in ("align", "tune")]
    recipe = recipe_of(tmp_path, stages=stages, checkpoint={"keep_every_steps": 12})
    kept = recipe_of(tmp_path, checkpoint={"keep_last": 5})
    assert durable_room(kept).wanted_bytes == 2 * durable_room(recipe).wanted_bytes > 0  # 5 + 1 against 2 + 1
    assert durable_room(recipe).replaced_bytes == 0
    for step, stage, stage_step in ((10, "align", 10), (12, "tune", 2), (14, "tune", 4), (16, "tune", 6)):
        lay_down(tmp_path / "run", f"{step:08d}-{stage}", stage_step=stage_step)
    # The end of a stage stays, and so does what is kept for its step: the two newest make room.
    assert 2000 < durable_room(recipe).replaced_bytes < 3000
    lay_down(tmp_path / "run", "00000020-tune", stage_step=10)
    assert 2000 < durable_room(recipe).replaced_bytes < 3000, "the end of the last stage stays, too"


def test_room_on_the_nodes_own_tier_is_for_what_a_node_holds(tmp_path):
    local = {"dir": str(tmp_path / "disk"), "every_steps": 5}
    assert local_room(recipe_of(tmp_path), 8, 4) is None

    def wanted(ranks_per_node, **parallel):
        return local_room(recipe_of(tmp_path, checkpoint={"local": local}, parallel=parallel), 8, ranks_per_node).wanted_bytes

    whole = wanted(8)
    assert whole == wanted(4) == pytest.approx(durable_room(recipe_of(tmp_path)).wanted_bytes * 2 / 3)  # 1 + 1 against 2 + 1
    assert wanted(4, pipeline=8) == pytest.approx(whole / 2) == wanted(4, zero=3)
    assert whole / 2 < wanted(4, zero=1) < whole
    # Stages are far apart, tensor ranks neighbours: each node holds one stage; three ranks see two.
    assert wanted(4, pipeline=2) == wanted(1, tensor=2) == pytest.approx(whole / 2)
    assert wanted(3, pipeline=2) == wanted(2, tensor=2) == whole
    assert wanted(1, pipeline=16) == pytest.approx(whole / 16), "also where the recipe does not fit so many ranks"
    recipe = recipe_of(tmp_path, checkpoint={"local": local})
    lay_down(folders.local_run_dir(local["dir"], recipe.run.name, recipe.run.dir) / "node", "00000005-align")
    assert 1000 < local_room(recipe, 8, 4).replaced_bytes < 2000


def test_both_tiers_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "WRITTEN_BYTES", 1 << 20)
    monkeypatch.setattr(examine.parts, "PARTS", [])
    report = examine.Report()
    recipe = recipe_of(tmp_path, checkpoint={"local": {"dir": str(tmp_path / "disk"), "every_steps": 5}})
    examine.examine_surroundings(report, recipe, None, False, lambda text: None)
    found = {check.name: check for check in report.checks}
    assert f"disk of {tmp_path / 'run' / 'checkpoints'}" in found
    local = found[f"disk of {tmp_path / 'disk'}"]
    assert "checkpoints take about" in f"{local.detail} {local.without}" and not local.is_problem, "training goes on without it"
    assert not (tmp_path / "disk").exists()


# ------------------------------------------------------------------------------------------------------------- ranks, disk, SLURM


@pytest.mark.slow
def test_ranks_that_cannot_talk():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    check = check_here("nccl", 2)
    assert check.is_problem and "NCCL needs a GPU" in check.detail and "NCCL_DEBUG" in check.without


def test_the_disk_is_measured_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "WRITTEN_BYTES", 8 << 20)
    check = disk.check_disk(tmp_path / "not" / "there" / "checkpoints", needed=True)
    assert check.state == "ok" and "write and fsync" in check.detail and "free" in check.detail
    assert list(tmp_path.iterdir()) == []
    assert disk.check_disk(tmp_path, True, wanted_bytes=1 << 60).is_problem
    assert not disk.check_disk(tmp_path, False, wanted_bytes=1 << 60).is_problem
    replaces = disk.check_disk(tmp_path, True, wanted_bytes=1 << 60, replaced_bytes=(1 << 60) - 4096)
    assert replaces.state == "ok" and "4.00 KiB more than those that they replace" in replaces.detail

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    check = disk.check_disk(tmp_path, needed=True)
    assert check.is_problem and "No space left" in check.detail and list(tmp_path.iterdir()) == []


def test_a_slow_disk_is_measured_by_what_it_takes_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LIMIT_S", 0.0)
    assert "(4.00 MiB)" in disk.check_disk(tmp_path, needed=True).detail


def test_slurm_is_missing_or_silent(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.check_slurm(None).state == "missing" and not slurm.check_slurm(None).is_problem
    assert slurm.check_slurm(ClusterConfig()).is_problem
    for name in (*slurm.PROGRAMS, "sinfo"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'slurm_load_partitions: Unable to contact' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    check = slurm.check_slurm(None)
    assert check.state == "broken" and "Unable to contact" in check.detail


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_programs()), reason=f"no SLURM here: {', '.join(missing_programs())} missing")
def test_partitions_of_a_real_slurm(tmp_path, monkeypatch):
    with SlurmCluster() as cluster:
        monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
        assert "partitions: debug" in slurm.check_slurm(None).detail
        good = slurm.check_slurm(ClusterConfig(partition="debug", nodes=1))
        assert good.state == "ok" and "partition debug is up" in good.detail
        assert slurm.check_slurm(ClusterConfig(partition="debug", nodes=100)).state == "note"
        bad = slurm.check_slurm(ClusterConfig(partition="gpu"))
        assert bad.is_problem and "there is no partition gpu; there are debug" in bad.detail


# -------------------------------------------------------------------------------------------------------------------------- MLflow


@pytest.fixture
def answering():
    """answering(code, body) -> address of a server that answers so; `seen` are the headers that it got."""
    servers, seen = [], []

    def start(code: int, body: bytes = b"{}") -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_POST(self):
                seen.append(dict(self.headers))
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_port}"

    start.seen = seen
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def asked(uri: str | None, folder: Path, **environ: str) -> Check:
    return mlflow.check_mlflow(TrackingConfig(mlflow_uri=uri), folder / "run", environ)


@pytest.mark.parametrize(
    ("code", "body", "state", "told"),
    [
        (200, b'{"experiments": []}', "ok", "answers"),
        (200, b"<html>", "broken", ""),
        (200, b"[]", "broken", "no MLflow server"),
        (401, b"", "broken", "asks for a user and password"),
        (404, b"", "broken", "no MLflow server"),
        (503, b"", "broken", "in trouble"),
    ],
)
def test_what_a_server_answers(answering, tmp_path, code, body, state, told):
    check = asked(f"http://{answering(code, body)}", tmp_path)
    assert check.state == state and told in check.detail and not check.is_problem
    assert state == "ok" or "track replay" in check.without


def test_credentials_are_those_that_the_client_would_send_and_never_shown(answering, tmp_path):
    address = answering(403)
    check = asked(f"http://me:secret@{address}/base", tmp_path)
    assert "refuses the user" in check.detail and "secret" not in check.detail
    asked(f"http://{address}", tmp_path, MLFLOW_TRACKING_TOKEN="t")
    asked(f"http://{address}", tmp_path, MLFLOW_TRACKING_USERNAME="a", MLFLOW_TRACKING_PASSWORD="b", MLFLOW_TRACKING_TOKEN="t")
    sent = [h["Authorization"] for h in answering.seen]
    assert sent == [f"Basic {base64.b64encode(b'me:secret').decode()}", "Bearer t", f"Basic {base64.b64encode(b'a:b').decode()}"]


def test_a_server_that_is_dead_or_frozen(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow, "TIMEOUT_S", 0.3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert "refused" in asked(uri, tmp_path).detail
        listener.listen(5)
        assert "does not answer in" in asked(uri, tmp_path).detail


def test_a_database_file(tmp_path):
    assert "made by the first run" in asked(None, tmp_path).detail
    path = tmp_path / "mlflow.db"
    path.write_text("rubbish, and more of it than a header")
    assert asked(None, tmp_path).state == "broken"
    path.unlink()
    store = sqlite3.connect(path)
    store.execute("create table runs (id)")
    store.execute("insert into runs values (1)")
    store.commit()
    store.close()
    assert asked(None, tmp_path).detail == f"{path}, 1 runs"
    assert asked("file:///x", tmp_path).is_problem
    assert mlflow.check_mlflow(TrackingConfig(mlflow=False), tmp_path).state == "not tried"
