"""What survives between two calls: the journal, the names, the report; and what is refused because it changed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path

import pytest

from megavlm.data.catalog import build_catalog
from megavlm.data.prepare import PrepareError, PrepareOptions, TooManyRefusedError, prepare
from megavlm.data.prepare import run as engine

TURNS = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "3"}]


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("shard-*.tar"))}


@pytest.fixture
def options(tmp_path, pictures, lines):
    """20 entries of which one is refused, five a shard."""
    records = [{"id": i, "image": f"{i % 6}.png", "conversations": TURNS} for i in range(20)]
    records[7]["image"] = "gone.png"
    path = lines(*records)

    def make(name="out", **changes):
        given = {"images": str(pictures), "samples_per_shard": 5, "workers": 0, "max_refused_fraction": 0.1, **changes}
        return PrepareOptions("llava", str(path), str(tmp_path / name), **given)

    return make


def broken_after(monkeypatch, name, count):
    """Let a function of the engine fail from its call number `count` on; returns the list of calls that went through."""
    real, calls = getattr(engine, name), []

    def call(*arguments, **named):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments, **named)

    monkeypatch.setattr(engine, name, call)
    return calls


def test_interrupted_call_goes_on_with_the_same_bytes(options, tmp_path, monkeypatch):
    prepare(options("whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        broken_after(patch, "convert_chunk", 2)
        prepare(options())
    assert not hashes(tmp_path / "out"), "a reader must not see half a data set"
    states = []
    with monkeypatch.context() as patch:
        calls = broken_after(patch, "convert_chunk", 99)
        report = prepare(options(), progress=lambda state: states.append(state.kept_chunks))
    assert [c[1] for c in calls] == [2, 3] and states[-1] == 2
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole") and len(report.shards) == 4
    assert (report.tally.written, report.tally.num_refused) == (19, 1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["index.parquet", "prepare-report.json", *hashes(tmp_path / "out")]


@pytest.mark.parametrize("moved", [0, 1, 3, 4])
def test_interrupted_while_naming(moved, options, tmp_path, monkeypatch):
    prepare(options("whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        broken_after(patch, "move", moved)
        prepare(options())
    assert len(hashes(tmp_path / "out")) == moved
    prepare(options())
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("moved", [1, 3, 4])
def test_restart_after_a_kill_while_naming_leaves_no_old_shard(moved, options, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        broken_after(patch, "move", moved)
        prepare(options())
    report = prepare(options(samples_per_shard=10), restart=True)
    assert report.shards == ["shard-00000.tar", "shard-00001.tar"] == list(hashes(tmp_path / "out"))
    assert len(build_catalog(tmp_path / "out", progress=False)) == report.tally.written == 19


def test_naming_journal_lies_there_only_while_half_the_shards_have_names(options, tmp_path, monkeypatch):
    journal = tmp_path / "out" / ".prepare" / "names.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        broken_after(patch, "move", 2)
        prepare(options())
    assert journal.exists(), "megavlm.data.catalog refuses the folder by it"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        broken_after(patch, "build_catalog", 0)
        prepare(options())
    assert not journal.exists() and len(hashes(tmp_path / "out")) == 4
    assert prepare(options()).complete and not journal.parent.exists()


def test_restart_of_a_finished_call(options, tmp_path, monkeypatch):
    prepare(options())
    path = Path(options().input)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        broken_after(patch, "remove", 3)  # killed while it deletes: report, catalog and one shard are gone
        prepare(options(), restart=True)
    assert len(hashes(tmp_path / "out")) == 3
    assert (tmp_path / "out" / ".prepare" / "names.json").exists(), "the rest must not be read"
    with pytest.raises(PrepareError, match="--restart"):
        prepare(options())
    assert prepare(options(), restart=True).tally.written == 5
    assert len(hashes(tmp_path / "out")) == 1


def test_restart_deletes_nothing_that_it_did_not_write(options, tmp_path):
    prepare(options())
    (tmp_path / "out" / "shard-00009.tar").write_bytes(b"precious")
    before = hashes(tmp_path / "out")
    with pytest.raises(PrepareError, match=r"already holds 1 shards \(shard-00009\.tar"):
        prepare(options(), restart=True)
    assert hashes(tmp_path / "out") == before
    with pytest.raises(PrepareError, match=r"holds 5 shards, and its prepare-report\.json speaks of 4 \(shard-00009\.tar"):
        prepare(options())


def test_changed_input_is_named_after_the_end(options, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        broken_after(patch, "move", 1)
        prepare(options())
    path = Path(options().input)
    original = path.read_bytes()
    stamps = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(original + b"{}\n")
    with pytest.raises(PrepareError, match=r"data\.jsonl changed since.*--restart"):
        prepare(options())
    path.write_bytes(original)
    os.utime(path, ns=stamps)
    prepare(options())
    path.write_bytes(original + b"{}\n")
    with pytest.raises(PrepareError, match=r"data\.jsonl changed since.*finished already.*--restart"):
        prepare(options())


def test_changed_folder_is_named_after_the_end(tmp_path, pictures):
    for i in range(6):
        (pictures / f"{i}.txt").write_text("a digit")
    given = PrepareOptions("captions", str(pictures), str(tmp_path / "out"), workers=0, max_refused_fraction=0.5)
    prepare(given)
    assert prepare(given).complete
    (pictures / "6.txt").write_text("one more")
    with pytest.raises(PrepareError, match=r"pictures changed since.*finished already"):
        prepare(given)


def test_finished_call_is_not_done_again(options, tmp_path, monkeypatch):
    first = prepare(options())
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    broken_after(monkeypatch, "convert_chunk", 0)
    again = prepare(options())
    assert (again.tally, again.shards) == (first.tally, first.shards)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(PrepareError, match=r"finished already, with other settings: task was None and is 'other'"):
        prepare(options(task="other"))


def test_too_many_refused_loses_nothing(options, tmp_path, monkeypatch):
    with pytest.raises(TooManyRefusedError, match=r"1 of 20 samples were refused.*gone\.png.*--max-refused-fraction 0\.05"):
        prepare(options(max_refused_fraction=0.01))
    report = json.loads((tmp_path / "out" / "prepare-report.json").read_text())
    assert (report["complete"], report["read"], report["num_refused"]) == (False, 20, 1)
    assert not hashes(tmp_path / "out")
    broken_after(monkeypatch, "convert_chunk", 0)
    assert prepare(options(max_refused_fraction=0.05)).complete
    assert len(hashes(tmp_path / "out")) == 4


def test_other_settings_or_input_are_refused_by_name(options, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        broken_after(patch, "convert_chunk", 2)
        prepare(options())
    with pytest.raises(PrepareError, match=r"unfinished call, with other settings: samples_per_shard was 5 and is 4.*--restart"):
        prepare(options(samples_per_shard=4))
    path = Path(options().input)
    path.write_text(path.read_text().replace("Which", "What"))
    with pytest.raises(PrepareError, match=r"line 1 and what follows changed.*--restart"):
        prepare(options())
    report = prepare(options(samples_per_shard=4), restart=True)
    assert len(report.shards) == 5


def test_chunks_without_samples_leave_no_gap_in_names(options, tmp_path):
    path = Path(options().input)
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:5], *["{broken"] * 5, *rows[10:]]))
    report = prepare(options(max_refused_fraction=0.5))
    assert report.shards == ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]


def test_nothing_to_write_is_an_error(options, tmp_path):
    path = Path(options().input)
    path.write_text("{broken\n")
    with pytest.raises(TooManyRefusedError, match="1 of 1 samples were refused.*Mend the input"):
        prepare(options(max_refused_fraction=1.0))
    path.write_text("")
    with pytest.raises(TooManyRefusedError, match="holds no sample"):
        prepare(options("empty"))


def test_folder_with_other_shards_is_refused(options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-00000.tar").write_bytes(b"precious")
    with pytest.raises(PrepareError, match="already holds 1 shards"):
        prepare(options())
    assert (tmp_path / "out" / "shard-00000.tar").read_bytes() == b"precious"


def test_two_calls_at_once(options, tmp_path):
    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(PrepareError, match="another call"):
        prepare(options())
    os.close(handle)
    assert prepare(options()).complete


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fps": 2.0}, "--fps changes nothing with format llava"),
        ({"columns": (("pic", "x"),)}, "format llava has no 'pic'; it has id, image"),
        ({"held_out_fraction": 1.5}, "--held-out-fraction 1.5"),
        ({"samples_per_shard": 0}, "--samples-per-shard 0"),
        ({"input": "/nowhere/x.json"}, "/nowhere/x.json: there is no such file"),
        ({"format": "llva"}, "format 'llva' is not one of llava"),
    ],
)
def test_options_that_do_not_fit(changes, message, options):
    given = options()
    with pytest.raises(PrepareError, match=message):
        prepare(PrepareOptions(**{**given.settings, "output": given.output, "workers": 0, **changes}))


def test_held_out_share_is_by_picture_and_stable(tmp_path, run, make_digit, lines):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(400):
        (folder / f"{i}.png").write_bytes(make_digit(i, size=(8, 8)))
    records = [{"id": i, "image": f"{i}.png", "conversations": TURNS} for i in range(400)]
    done = run("llava", lines(*records, *records[:50]), images=str(folder), held_out_fraction=0.25, held_out_split="val")
    split = {s["meta"]["id"]: s["split"] for s in done.samples[:400]}
    assert 70 <= sum(v == "val" for v in split.values()) <= 130
    assert [s["split"] for s in done.samples[400:]] == [split[i] for i in range(50)], "one picture, one side"
    other = run("llava", lines(*reversed(records), name="r.jsonl"), images=str(folder), held_out_fraction=0.25, held_out_split="val")
    assert {s["meta"]["id"]: s["split"] for s in other.samples} == split
    more = run("llava", lines(*records, name="m.jsonl"), images=str(folder), held_out_fraction=0.5, held_out_split="val")
    grown = {s["meta"]["id"]: s["split"] for s in more.samples}
    assert all(grown[i] == "val" for i, name in split.items() if name == "val")
