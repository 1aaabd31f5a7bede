"""Open files that threads share: each opened once, not too many, and never one in the place of another."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megavlm.checkpoint.handles import Handles

FILES, LIMIT, THREADS = 40, 3, 8


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number:02d}" for number in range(FILES)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 64)
    return paths


def num_open(folder: Path) -> int:
    """Of this process, in the folder."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += str(entry.readlink()).startswith(f"{folder}/")
        except FileNotFoundError:
            continue
    return found


def test_threads_read_what_they_asked_for_and_few_files_stay_open(files: list[Path]) -> None:
    handles = Handles(LIMIT)

    def read(turn: int) -> tuple[bytes, int]:
        number = turn * 7 % FILES
        with handles.reading(files[number]) as handle:
            found = os.pread(handle, 64, 0), num_open(files[0].parent)
        assert found[0] == bytes([number]) * 64
        return found

    with ThreadPoolExecutor(THREADS) as threads:
        most = max(opened for _, opened in threads.map(read, range(600)))
    assert 1 <= most <= LIMIT + THREADS
    assert num_open(files[0].parent) == LIMIT
    handles.close()
    assert num_open(files[0].parent) == 0


def test_a_file_is_opened_once(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened, original = [], os.open
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments[0]) or original(*arguments))
    handles = Handles()
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(lambda turn: _touch(handles, files[turn % 2]), range(200)))
    handles.close()
    assert sorted(opened) == files[:2]


def _touch(handles: Handles, file: Path) -> None:
    with handles.reading(file) as handle:
        os.pread(handle, 1, 0)


def test_a_handle_that_failed_is_not_used_again(files: list[Path]) -> None:
    """As of a file that another machine has replaced (ESTALE): the next one opens it anew."""
    handles = Handles()
    with pytest.raises(OSError), handles.reading(files[0]) as first:
        os.pread(first, 1, -1)
    assert num_open(files[0].parent) == 0
    (files[0].with_name("new")).write_bytes(b"new")
    files[0].with_name("new").replace(files[0])
    with handles.reading(files[0]) as second:
        assert os.pread(second, 64, 0) == b"new"
    handles.close()
