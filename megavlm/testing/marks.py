"""Which parameters of a test run each time, and which with `make test-all` only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(params: Iterable[Any], is_quick: Callable[..., bool]) -> list[Any]:
    """All of `params`; those for whose values `is_quick` is false are marked slow."""
    found = [p if isinstance(p, tuple) else (p,) for p in params]
    return [pytest.param(*p, marks=[] if is_quick(*p) else pytest.mark.slow) for p in found]
