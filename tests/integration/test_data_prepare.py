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
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "megavlm.cli", "data", "prepare")
TURNS = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "It is one."}]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "launchers"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def call(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=250, check=False)


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
    done = call("llava", llava / "data.json", folder, "--workers", 1, "--samples-per-shard", 20, "--held-out-fraction", 0.3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrote 2,970" in done.stdout and "refused 30" in done.stdout and "missing picture" in done.stdout
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


def test_killed_twice_it_goes_on_with_the_same_bytes(llava: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = ("llava", llava / "data.json", folder, "--workers", 3, "--samples-per-shard", 20, "--held-out-fraction", 0.3)
    journal = folder / ".prepare"
    done_before: dict[str, int] = {}
    for target in (20, 60):
        command = [*COMMAND, *map(str, arguments)]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(journal.glob("chunk-*.json"))) < target:
            time.sleep(0.005)
        assert process.poll() is None, "it was done before it could be killed"
        workers = descendants(process.pid)
        assert len(workers) >= 3
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{w}").exists() for w in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{w}").exists() for w in workers), "workers outlived the call"
        assert not shards(folder)
        kept = {p.name: p.stat().st_mtime_ns for p in journal.glob("chunk-*.json")}
        assert target <= len(kept) < 150
        assert all(kept[name] == stamp for name, stamp in done_before.items()), "finished work was done again"
        done_before = kept
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    assert shards(folder) == shards(undisturbed)
    mine, theirs = (json.loads((f / "prepare-report.json").read_text()) for f in (folder, undisturbed))
    assert mine == theirs
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith("shard-")) == ["index.parquet", "prepare-report.json"]


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
    assert call(*arguments).returncode == 0
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
def test_faults_of_the_user_are_one_message_and_exit_code_2(arguments: tuple[str, ...], message: str, llava: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('[{"conversations": [}]')
    places = {"DATA": str(llava / "data.json"), "BROKEN": str(broken), "out": str(tmp_path / "out")}
    done = call(*(places.get(a, a) for a in arguments), "--workers", 0)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> str:
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
    limits = ("--samples-per-shard", 10, "--max-refused-fraction", 0.1, "--workers", 2)
    far = call("llava", f"{store}/in/data.json", f"{store}/out", *limits)
    assert far.returncode == 0, far.stderr
    near = call("llava", tmp_path / "data.json", tmp_path / "near", "--images", llava, *limits)
    assert near.returncode == 0, near.stderr
    names = sorted(str(n).rpartition("/")[2] for n in files.find("data/out"))
    assert names == ["index.parquet", "prepare-report.json", "shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]
    assert {n: hashlib.sha256(files.cat_file(f"data/out/{n}")).hexdigest() for n in names[2:]} == shards(tmp_path / "near")
    tars = call("webdataset", f"{store}/out", tmp_path / "again", "--workers", 0)
    assert tars.returncode == 0, tars.stderr
    read = webdataset.WebDataset([str(p) for p in sorted((tmp_path / "again").glob("*.tar"))], shardshuffle=False)
    assert [item["0.png"] for item in read] == [(llava / f"{i % 10}.png").read_bytes() for i in range(25) if i != 3]
