"""`megavlm data prepare` as a process: killed and started again, with any number of workers, from and into an object store."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from megavlm.cli.main import main

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "megavlm.cli", "data", "prepare")
TURNS = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "It is one."}]


def environment() -> dict[str, str]:
    paths = os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "launchers"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a process."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250, check=False)


def call_here(*arguments: object) -> int:
    """The command in this process, which has torch already; the exit code."""
    with pytest.raises(SystemExit) as left:
        main(["data", "prepare", *map(str, arguments), "--workers", "0"])
    return int(left.value.code or 0)


def shards(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("shard-*.tar"))}


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray((load_digits().images[number] * 15).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3000 entries; every hundredth names a picture that is missing."""
    folder = tmp_path_factory.mktemp("llava")
    for i in range(10):
        (folder / f"{i}.png").write_bytes(picture(i))
    names = ["gone.png" if i % 100 == 50 else f"{i % 10}.png" for i in range(3000)]
    entries = [{"id": i, "image": name, "conversations": TURNS} for i, name in enumerate(names)]
    (folder / "data.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def undisturbed(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    assert call_here("llava", llava / "data.json", folder, "--samples-per-shard", 20, "--held-out-fraction", 0.3) == 0
    assert len(shards(folder)) == 150
    return folder


def descendants(pid: int) -> set[int]:
    """Living processes below one, from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found = {pid}
    while more := {c for c, p in parents.items() if p in found} - found:
        found |= more
    return found - {pid}


def test_killed_it_goes_on_with_the_same_bytes(llava: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Begun with three workers and killed, ended with none, and compared with a call that was never disturbed."""
    folder = tmp_path / "out"
    arguments = ("llava", llava / "data.json", folder, "--samples-per-shard", 20, "--held-out-fraction", 0.3)
    journal = folder / ".prepare"
    command = [*COMMAND, *map(str, arguments), "--workers", "3"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(journal.glob("chunk-*.json"))) < 20:
        time.sleep(0.005)
    assert process.poll() is None, "it was done before it could be killed"
    workers = descendants(process.pid)
    assert len(workers) >= 3
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{w}").exists() for w in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{w}").exists() for w in workers), "workers outlived the call"
    assert not shards(folder), "nobody may read half a data set"
    kept = {p.name: p.stat().st_mtime_ns for p in journal.glob("chunk-*.json")}
    assert 20 <= len(kept) < 150
    moment = time.time_ns()
    assert call_here(*arguments) == 0
    assert shards(folder) == shards(undisturbed)
    old = [p for p in folder.glob("shard-*.tar") if p.stat().st_mtime_ns < moment]
    assert len(old) == len(kept), "finished work was done again"
    mine, theirs = (json.loads((f / "prepare-report.json").read_text()) for f in (folder, undisturbed))
    assert mine == theirs
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith("shard-")) == ["index.parquet", "prepare-report.json"]


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(llava: Path, undisturbed: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        folder = tmp_path / f"out-{workers}"
        arguments = ("llava", llava / "data.json", folder, "--samples-per-shard", 20, "--held-out-fraction", 0.3, "--workers", workers)
        done = call(*arguments)
        assert done.returncode == 0, done.stderr
        assert "wrote 2,970" in done.stdout and "refused 30" in done.stdout and "missing picture" in done.stdout
        assert shards(folder) == shards(undisturbed)


@pytest.mark.slow
def test_a_killed_worker_is_told_and_nothing_is_lost(llava: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = ("llava", llava / "data.json", folder, "--workers", 2, "--samples-per-shard", 20, "--held-out-fraction", 0.3)
    command = [*COMMAND, *map(str, arguments)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list((folder / ".prepare").glob("chunk-*.json"))) < 10:
        time.sleep(0.005)
    workers = [p for p in descendants(process.pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process was killed" in error and "the same command goes on" in error and "Traceback" not in error
    assert call_here(*arguments[:3], *arguments[5:]) == 0
    assert shards(folder) == shards(undisturbed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("llava", "/nowhere/a.json", "out"), "/nowhere/a.json: there is no such file"),
        (("coco", "DATA", "out"), "not a COCO file"),
        (("llava", "DATA", "out", "--fps", "2"), "--fps changes nothing with format llava"),
        (("captions", "DATA", "out", "--columns", "image"), "--columns"),
        (("lava", "DATA", "out"), "lava"),
        (("llava", "BROKEN", "out"), "not valid JSON"),
    ],
)
def test_faults_of_the_user_are_one_message_and_exit_code_2(
    arguments: tuple[str, ...], message: str, llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('[{"conversations": [}]')
    places = {"DATA": str(llava / "data.json"), "BROKEN": str(broken), "out": str(tmp_path / "out")}
    assert call_here(*(places.get(a, a) for a in arguments)) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 server in this process."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    access = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**access, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket="data")
    yield "s3://data"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_from_and_into_an_object_store(store: str, llava: Path, tmp_path: Path) -> None:
    import fsspec

    files = fsspec.filesystem("s3")
    entries = [{"id": i, "image": f"{i % 10}.png", "conversations": TURNS} for i in range(25)]
    entries[3]["image"] = "gone.png"
    (tmp_path / "data.json").write_text(json.dumps(entries))
    for path in [tmp_path / "data.json", *llava.glob("*.png")]:
        files.put_file(str(path), f"data/in/{path.name}")
    limits = ("--samples-per-shard", 10, "--max-refused-fraction", 0.1)
    assert call_here("llava", f"{store}/in/data.json", f"{store}/out", *limits) == 0
    assert call_here("llava", tmp_path / "data.json", tmp_path / "near", "--images", llava, *limits) == 0
    names = sorted(str(n).rpartition("/")[2] for n in files.find("data/out"))
    assert names == ["index.parquet", "prepare-report.json", "shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]
    assert {n: hashlib.sha256(files.cat_file(f"data/out/{n}")).hexdigest() for n in names[2:]} == shards(tmp_path / "near")
    assert call_here("webdataset", f"{store}/out", tmp_path / "again") == 0
    read = webdataset.WebDataset([str(p) for p in sorted((tmp_path / "again").glob("*.tar"))], shardshuffle=False)
    assert [item["0.png"] for item in read] == [(llava / f"{i % 10}.png").read_bytes() for i in range(25) if i != 3]
