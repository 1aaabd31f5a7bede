"""Preparing as a whole: chunks of the input go to worker processes, a journal remembers what is done, shards get their names at the end."""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from multiprocessing.connection import wait as wait_for_handles
from pathlib import Path
from typing import Any

from megavlm.data.catalog import CATALOG_NAME, build_catalog
from megavlm.data.prepare.chunks import STAGING, Tally, convert_chunk, entries_digest, make_format, read_journal, tar_path
from megavlm.data.prepare.files import delete_folder, move
from megavlm.data.prepare.formats import FORMATS
from megavlm.data.prepare.inputs import changed_inputs, input_state
from megavlm.data.prepare.types import SHARED_OPTIONS, Entry, PrepareError, PrepareOptions
from megavlm.data.storage import as_path, exists, list_files, read_bytes, remove, write_bytes

REPORT_NAME = "prepare-report.json"
_NAMING = "names.json"
"""In the journal while shards take their names one by one: a folder with it holds half a data set, and no reader indexes it."""
_NAMED = "named.json"
"""The same file once all shards have their names and only the catalog and the report are missing."""
_CHUNKS_AHEAD = 2
"""Chunks of entries that wait per worker: they bound the memory of the calling process."""


class TooManyRefusedError(PrepareError):
    """More of the input was refused than allowed. What was written waits under its journal; nothing is lost."""


@dataclass(frozen=True)
class Progress:
    """State of a call."""

    share: float
    """Of the input, 0 to 1."""
    tally: Tally
    kept_chunks: int
    """Chunks that an earlier call had finished."""


@dataclass
class PrepareReport:
    """What became of the input."""

    settings: dict[str, Any]
    tally: Tally
    shards: list[str]
    complete: bool
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    """Size and time of the files that it was made from, see `input_state`."""

    def to_json(self) -> str:
        """The file prepare-report.json."""
        tally = self.tally.values()
        counts = {"read": self.tally.read, "written": self.tally.written, "num_refused": self.tally.num_refused}
        rest = {k: v for k, v in tally.items() if k != "written"}
        values = {"complete": self.complete, **counts, **rest, "shards": self.shards, "settings": self.settings, "inputs": self.inputs}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def prepare(options: PrepareOptions, restart: bool = False, progress: Callable[[Progress], None] | None = None) -> PrepareReport:
    """Turn an input into shards. Called again after it was stopped (in whatever way), it goes on and gives the same bytes.

    Finished chunks lie in OUTPUT/.prepare until all is done; then the shards take their names and the folder goes away.

    Args:
        restart: forget what an earlier call has done, finished or not: its shards are deleted.
        progress: called in this process whenever a chunk is done.

    Raises:
        PrepareError: options that do not fit, a broken input file, an output folder with other shards, an input or options that
            changed since an earlier call.
        TooManyRefusedError: more than max_refused_fraction was refused, or all.
        StorageError: something cannot be reached.
    """
    _check(options)
    with _lock(options):
        if restart:
            _forget(options)
        finished = _finished(options)
        if finished is not None:
            return finished
        _start_journal(options)
        journal = _naming_journal(options)
        if journal is None:
            inputs = input_state(options)
            tally, with_samples = _convert_all(options, progress)
            _check_share(options, tally)
            journal = {"chunks": with_samples, "tally": tally.values(), "inputs": inputs}
            write_bytes(as_path(options.output) / STAGING / _NAMING, json.dumps(journal).encode())
        else:
            _compare_inputs(journal.get("inputs"), options, "an earlier call turned it into shards that only wait for their names")
        return _finish(options, journal)


def _naming_journal(options: PrepareOptions) -> dict[str, Any] | None:
    for name in (_NAMING, _NAMED):
        path = as_path(options.output) / STAGING / name
        if exists(path):
            return dict(json.loads(read_bytes(path)))
    return None


def _shard_names(count: int) -> list[str]:
    return [f"shard-{i:05d}.tar" for i in range(count)]


def _report_values(options: PrepareOptions) -> dict[str, Any] | None:
    """The report of an earlier call that ended well."""
    path = as_path(options.output) / REPORT_NAME
    values = dict(json.loads(read_bytes(path))) if exists(path) else {}
    return values if values.get("complete") else None


def _forget(options: PrepareOptions) -> None:
    """Delete what an earlier call wrote, and nothing else. Stopped anywhere, the folder is refused by readers until it is done again.

    Raises:
        PrepareError: shards that no earlier call has written.
    """
    output = as_path(options.output)
    report, journal = _report_values(options), _naming_journal(options)
    ours = {*(report["shards"] if report else []), *_shard_names(len(journal["chunks"]) if journal else 0)}
    _check_strangers(options, ours)
    if ours:  # while they go away, too, the folder holds half a data set
        write_bytes(output / STAGING / _NAMING, json.dumps({"chunks": list(range(len(ours))), "tally": Tally().values()}).encode())
    for name in (REPORT_NAME, CATALOG_NAME, *sorted(ours)):
        remove(output / name)
    delete_folder(output / STAGING)


def _check_strangers(options: PrepareOptions, ours: Iterable[str]) -> None:
    present = [p.name for p in list_files(options.output, "shard-*.tar")]
    others = sorted(set(present) - set(ours))
    if others:
        raise PrepareError(
            f"{options.output} already holds {len(others)} shards ({others[0]}, ...) that no call of this command is known to have "
            "written: choose an empty folder or delete them"
        )


def _check(options: PrepareOptions) -> None:
    kind = FORMATS.get(options.format)
    if kind is None:
        raise PrepareError(f"format {options.format!r} is not one of {', '.join(FORMATS)}")
    for option in fields(options):
        name, value = option.name, getattr(options, option.name)
        if name not in SHARED_OPTIONS | kind.options and value != option.default:
            raise PrepareError(f"--{name.replace('_', '-')} changes nothing with format {kind.name}: leave it out")
    for name, _ in options.columns:
        if name not in kind.fields and not any(f.endswith("*") and name.startswith(f[:-1]) and name != f[:-1] for f in kind.fields):
            raise PrepareError(f"--columns: format {kind.name} has no {name!r}; it has {', '.join(kind.fields)}")
    for name in ("held_out_fraction", "max_refused_fraction"):
        if not 0 <= getattr(options, name) <= 1:
            raise PrepareError(f"--{name.replace('_', '-')} {getattr(options, name)} must lie between 0 and 1")
    if options.samples_per_shard is not None and options.samples_per_shard < 1:
        raise PrepareError(f"--samples-per-shard {options.samples_per_shard} must be at least 1")
    if options.workers < 0:
        raise PrepareError(f"--workers {options.workers} must be at least 0")
    if not exists(as_path(options.input)):
        raise PrepareError(f"{options.input}: there is no such file or folder")
    make_format(options)


@contextmanager
def _lock(options: PrepareOptions) -> Iterator[None]:
    """One call at a time into a local folder. The system frees the lock of a process that was killed."""
    folder = as_path(options.output)
    if not isinstance(folder, Path):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise PrepareError(f"{folder}: another call is preparing into this folder") from error
    try:
        yield
    finally:
        os.close(handle)


def _finished(options: PrepareOptions) -> PrepareReport | None:
    """The report of an earlier call that ended well with the same settings.

    Raises:
        PrepareError: the folder holds other shards, or settings or input are others than they were.
    """
    values = _report_values(options)
    if values is None:
        if _naming_journal(options) is None:
            _check_strangers(options, ())
        return None
    what = f"{options.output} is finished already"
    _compare(values["settings"], options, what, "Choose another folder, or --restart to delete it and prepare anew")
    _compare_inputs(values.get("inputs"), options, what)
    present = [p.name for p in list_files(options.output, "shard-*.tar")]
    if present != values["shards"]:
        odd = sorted(set(present) ^ set(values["shards"]))
        raise PrepareError(
            f"{options.output} holds {len(present)} shards, and its {REPORT_NAME} speaks of {len(values['shards'])} ({', '.join(odd[:3])} "
            "came or went since). Give --restart to prepare it all anew"
        )
    delete_folder(as_path(options.output) / STAGING)  # where the earlier call was stopped at its very end
    known = {k: values[k] for k in Tally.__dataclass_fields__ if k in values}
    return PrepareReport(values["settings"], Tally.of(known), values["shards"], True, values.get("inputs", {}))


def _compare_inputs(before: dict[str, list[Any]] | None, options: PrepareOptions, what: str) -> None:
    changed = changed_inputs(before, input_state(options)) if before is not None else []
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise PrepareError(f"{changed[0]}{more} changed since, and {what}: give --restart to prepare it all anew, or another output folder")


def _compare(before: dict[str, Any], options: PrepareOptions, what: str, advice: str) -> None:
    now = json.loads(json.dumps(options.settings))
    changed = [f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in now if before.get(k) != now.get(k)]
    if changed:
        raise PrepareError(f"{what}, with other settings: {'; '.join(changed)}. {advice}")


def _start_journal(options: PrepareOptions) -> None:
    path = as_path(options.output) / STAGING / "settings.json"
    if exists(path):
        before = json.loads(read_bytes(path))
        _compare(before, options, f"{options.output} holds the journal of an unfinished call", "Give the same, or --restart to forget it")
    else:
        write_bytes(path, json.dumps(options.settings).encode())


def _chunks(options: PrepareOptions) -> Iterator[tuple[int, int, list[Entry], float]]:
    """(number, number of the first entry, entries, share of the input that is read)."""
    kind = make_format(options)
    size = options.samples_per_shard or kind.samples_per_shard
    entries: list[Entry] = []
    number, share = 0, 0.0
    for entry, share in kind.entries():
        entries.append(entry)
        if len(entries) == size:
            yield number, number * size, entries, share
            number, entries = number + 1, []
    if entries:
        yield number, number * size, entries, share


def _done_before(options: PrepareOptions) -> set[int]:
    return {int(p.name[len("chunk-") : -len(".json")]) for p in list_files(as_path(options.output) / STAGING, "chunk-*.json")}


def _convert_all(options: PrepareOptions, progress: Callable[[Progress], None] | None) -> tuple[Tally, list[int]]:
    """Counts over all chunks, and the numbers of those that hold a sample."""
    before, tallies, kept, share = _done_before(options), {}, 0, 0.0
    waiting: dict[Future[Tally], tuple[int, float]] = {}
    running = Tally()

    def done(number: int, tally: Tally, read: float) -> None:
        nonlocal share
        tallies[number], share = tally, max(share, read)
        running.add(tally)
        if progress is not None:
            progress(Progress(share, running, kept))

    def collect(at_most: int) -> None:
        while len(waiting) > at_most:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                number, read = waiting.pop(future)
                done(number, future.result(), read)

    with _pool(options) as pool:
        for number, first, entries, read in _chunks(options):
            if number in before:
                found = read_journal(options.output, number)
                if found.digest != entries_digest(entries):
                    raise PrepareError(
                        f"{entries[0].where} and what follows changed since an earlier call began: give --restart to prepare it all anew"
                    )
                kept += 1
                done(number, found.tally, read)
            elif pool is None:
                done(number, convert_chunk(options, number, first, entries), read)
            else:
                waiting[pool.submit(convert_chunk, options, number, first, entries)] = (number, read)
                collect(options.workers * _CHUNKS_AHEAD - 1)
        collect(0)
    total = Tally()
    for number in sorted(tallies):
        total.add(tallies[number])
    return total, [n for n in sorted(tallies) if tallies[n].written]


@contextmanager
def _pool(options: PrepareOptions) -> Iterator[ProcessPoolExecutor | None]:
    if options.workers == 0:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.workers, mp_context=context, initializer=_prepare_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise PrepareError(
            "a worker process was killed (by the system, for lack of memory?). Finished chunks are kept: the same command goes on"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare_worker() -> None:
    """Leave Ctrl-C to the calling process, and end with it however it ends.

    Workers of a killed process would wait for work for ever: each holds both ends of the pipe it waits on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_handles([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _check_share(options: PrepareOptions, tally: Tally) -> None:
    refused, read = tally.num_refused, tally.read
    share = refused / read if read else 0.0
    if tally.written and share <= options.max_refused_fraction:
        return
    report = PrepareReport(options.settings, tally, [], complete=False)
    write_bytes(as_path(options.output) / REPORT_NAME, report.to_json().encode())
    if not read:
        raise TooManyRefusedError(f"{options.input} holds no sample")
    reasons = sorted(tally.refused.items(), key=lambda item: -item[1].count)
    most = "; ".join(f"{r.count} x {reason} ({r.examples[0]})" for reason, r in reasons[:3])
    enough = f"{math.ceil(share * 1000) / 1000:g}"
    advice = (
        f"Nothing is lost: with --max-refused-fraction {enough} the same command finishes at once; after mending the input give --restart"
        if tally.written
        else "Mend the input or the options, then give --restart"
    )
    raise TooManyRefusedError(
        f"{refused} of {read} samples were refused, more than the share {options.max_refused_fraction:g} that is allowed: {most}. "
        f"All reasons are in {options.output}/{REPORT_NAME}. {advice}"
    )


def _finish(options: PrepareOptions, names: dict[str, Any]) -> PrepareReport:
    """Give the shards their names, index them, write the report. Stopped anywhere, the next call does the rest."""
    output = as_path(options.output)
    shards = _shard_names(len(names["chunks"]))
    _check_strangers(options, shards)
    for number, shard in zip(names["chunks"], shards, strict=True):
        waiting = tar_path(options.output, number)
        if exists(waiting):
            move(as_path(waiting), output / shard)
        elif not exists(output / shard):
            raise PrepareError(f"{waiting} is gone: it was deleted from outside. Give --restart to prepare it all anew")
    if exists(output / STAGING / _NAMING):  # readers may index the folder from here on
        move(output / STAGING / _NAMING, output / STAGING / _NAMED)
    build_catalog(options.output, progress=False)
    report = PrepareReport(options.settings, Tally.of(names["tally"]), shards, True, names.get("inputs", {}))
    write_bytes(output / REPORT_NAME, report.to_json().encode())
    delete_folder(output / STAGING)
    return report
