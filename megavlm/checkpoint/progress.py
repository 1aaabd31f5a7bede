"""How far a conversion is, on a terminal."""

from __future__ import annotations

from typing import Any


def progress_bar(what: str, total_bytes: int, done_bytes: int = 0) -> Any:
    """A bar on stderr, in bytes; silent where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(total=total_bytes, initial=done_bytes, desc=what, unit="B", unit_scale=True, disable=None)
