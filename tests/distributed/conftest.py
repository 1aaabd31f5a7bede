"""Gloo ranks for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megavlm.testing.pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to eight forked gloo ranks, started with the first test that asks for them."""
    ranks = RankPool(8)
    yield ranks
    ranks.close()
