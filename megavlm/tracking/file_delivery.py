"""Files on their way to MLflow: pictures, tables, models. They may take long, or be refused, while metrics go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from megavlm.tracking.metrics import encode_line
from megavlm.tracking.mlflow_store import Rejected, one_line
from megavlm.tracking.spool import TORN, Item, SpoolReader, SpoolWriter

FILE_KINDS = ("artifact", "table", "model")
MAX_TRIES = 8
"""A file that a store which answers has not taken so often, over all starts, is given up."""
ASIDE_RETRY_S = (30.0, 120.0, 600.0, 3600.0)
"""Pauses between tries of what was set aside; the last one repeats."""

Tell = Callable[[str, Any], None]
"""(what, value) for the process that started this one: what is "info", "warning" or "open"."""
Reject = Callable[[list[str], str], None]
"""(lines, reason): they are given up."""


class FileStore(Protocol):
    """What is needed of MlflowStore."""

    @property
    def address(self) -> str:
        """Fit for a message."""

    def send_file(self, item: Item) -> None:
        """Raises Rejected for one never to be taken, else what the client raises."""

    def answers(self) -> bool:
        """Whether the store itself is well."""


class FileDelivery:
    """Uploads what one spool has of files, in order.

    One that the store does not take although it answers (no permission, a quota, the files' server alone is down) is set aside and tried
    again after ASIDE_RETRY_S, at the end, and by the next start, MAX_TRIES times; those behind it go on.

    Args:
        spool: its folder; files wait in `files` and `aside` there.
        reject: takes what is given up.
        tell: hears of what is set aside.
    """

    def __init__(self, spool: Path, store: FileStore, reject: Reject, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._reject, self._tell, self._clock = store, reject, tell, clock
        self._fresh, self._aside = _Queue(spool / "files"), _Queue(spool / "aside")
        self._passes, self._next_aside, self._has_warned = 0, 0.0, False

    def put(self, items: Iterable[Item]) -> None:
        """More files: all of them, or none and OSError."""
        self._fresh.put(items)

    def close(self) -> None:
        """Nothing waits and nothing more comes: no file of the spool stays open."""
        self._fresh.close()
        self._aside.close()

    def round(self, try_now: bool = False) -> bool:
        """Upload what waits. False: the store does not answer, and nothing more was tried. Raises OSError for this machine's disk.

        Args:
            try_now: also what was set aside a moment ago.
        """
        if try_now or self._clock() >= self._next_aside:
            had_some = len(self._aside) > 0
            if not self._pass(self._aside):
                return False
            if had_some:
                self._next_aside = self._clock() + ASIDE_RETRY_S[min(self._passes, len(ASIDE_RETRY_S) - 1)]
                self._passes += 1
        return self._pass(self._fresh)

    def _pass(self, queue: _Queue) -> bool:
        queue.reader.note()  # how far an earlier pass got, where the disk was full then
        for _ in range(len(queue)):  # what is set aside meanwhile goes to the end, for the next pass
            items, bad, place = queue.reader.peek(1)
            if bad:
                self._reject(bad, TORN)
            for item in items:
                if not self._upload(item):
                    return False
            queue.reader.advance(place)
        return True

    def _upload(self, item: Item) -> bool:
        try:
            self._store.send_file({key: value for key, value in item.items() if key != "tries"})
        except Rejected as error:
            self._reject([encode_line(item)], str(error))
        except Exception as error:  # whatever a client, a proxy or a disk raises
            if not self._store.answers():
                return False
            self._set_aside(item, one_line(error))
        else:
            self._has_warned = False
        return True

    def _set_aside(self, item: Item, reason: str) -> None:
        tries = int(item.get("tries", 0)) + 1
        if tries >= MAX_TRIES:
            self._reject([encode_line(item)], f"not taken {tries} times; at last: {reason}")
            return
        if tries == 1 and not len(self._aside):  # more of them wait for the same moment
            self._passes, self._next_aside = 1, self._clock() + ASIDE_RETRY_S[0]
        if not self._has_warned:
            self._has_warned = True
            text = f"MLflow at {self._store.address} answers, but does not store {item['path']} ({reason}): such are tried again later"
            self._tell("warning", text)
        self._aside.put([{**item, "tries": tries}])


class _Queue:
    """A folder with a writer and a reader in this process, perhaps on different threads."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.reader, self._lock = folder, SpoolReader(folder), threading.Lock()
        self._writer: SpoolWriter | None = None

    def put(self, items: Iterable[Item]) -> None:
        with self._lock:
            if self._writer is None:
                self._writer = SpoolWriter(self._folder)
            self._writer.append_or_raise(items)

    def close(self) -> None:
        with self._lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def __len__(self) -> int:
        return len(self.reader)
