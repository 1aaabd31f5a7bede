"""Can a Hugging Face class hold a block of ours? It can when writing its config and reading that again gives the same block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from megavlm.checkpoint.errors import HuggingFaceError

K = TypeVar("K")


def which_holds(block: str, ours: dict[str, Any], kinds: Mapping[str, K], back: Callable[[K], dict[str, Any]]) -> K:
    """The first of `kinds` (by name) for which `back`, a block written and read again, equals `ours`.

    Raises:
        HuggingFaceError: none does; names the fields that the nearest one would change.
    """
    nearest: tuple[int, str, list[str]] | None = None
    for name, kind in kinds.items():
        try:
            theirs = back(kind)
        except (ValueError, KeyError) as error:
            lost = [str(error)]
            weight = 1000
        else:
            lost = [f"{block}.{field}={ours[field]!r} (it has: {theirs[field]!r})" for field in ours if ours[field] != theirs.get(field)]
            weight = len(lost)
        if not lost:
            return kind
        if nearest is None or weight < nearest[0]:
            nearest = (weight, name, lost)
    assert nearest is not None
    raise HuggingFaceError(f"Hugging Face's {nearest[1]} cannot hold " + "; ".join(nearest[2]))
