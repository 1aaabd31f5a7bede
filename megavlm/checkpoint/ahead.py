"""Reading and writing at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def made_ahead(makers: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results in order. While one is used the next is made in a thread, so that two are in memory at most."""
    with ThreadPoolExecutor(1) as thread:
        coming: Future[T] | None = None
        for make in makers:
            following = thread.submit(make)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()
