"""Orders of large sources: bijections that are computed place by place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.order import BLOCK_ROWS, FEISTEL_ROWS, OrderError, SourceOrder, feistel

KEY = bytes(range(32))


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.integers(1, 5000), st.binary(min_size=32, max_size=32))
def test_feistel_is_a_bijection(size, key):
    assert sorted(feistel(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [FEISTEL_ROWS, FEISTEL_ROWS + 1, 362**2, 362**2 + 1, 1_000_003])
def test_feistel_is_a_bijection_of_large_sets(size):
    assert np.array_equal(np.sort(feistel(np.arange(size), size, KEY)), np.arange(size))


def test_feistel_looks_random():
    """Against a true permutation: no more fixed points, ascents or correlation than chance allows (4 standard deviations)."""
    size = 200_000
    image = feistel(np.arange(size), size, KEY)
    assert np.count_nonzero(image == np.arange(size)) <= 1 + 4
    assert abs(np.count_nonzero(np.diff(image) > 0) - size / 2) < 4 * (size / 12) ** 0.5
    for lag in (1, 2, 447, 448, 1000):
        assert abs(np.corrcoef(image[:-lag], image[lag:])[0, 1]) < 4 / size**0.5
    # Halves of the order hold halves of every part of the source.
    parts = np.bincount(image[: size // 2] // (size // 100), minlength=100)
    assert np.abs(parts - size / 200).max() < 5 * (size / 400) ** 0.5
    other = feistel(np.arange(size), size, bytes(32))
    assert np.count_nonzero(image == other) <= 1 + 4


def test_a_large_source_is_in_order_at_once_and_anywhere():
    rows = 10**9
    order = SourceOrder("web", rows, seed=1)
    there = [order.row(n) for n in (0, 1, rows - 1, rows, 3 * rows + 17)]
    assert all(0 <= row < rows for row in there) and len(set(there)) == 5
    again = SourceOrder("web", rows, seed=1)
    assert [again.row(n) for n in (3 * rows + 17, rows, rows - 1, 1, 0)] == there[::-1]
    assert there == [694176858, 9157935, 747713885, 958464441, 884123928], "raise CURSOR_VERSION with it"


def test_epochs_and_blocks_join():
    rows = FEISTEL_ROWS + BLOCK_ROWS // 2
    order = SourceOrder("web", rows, seed=3)
    first, second = ([order.row(e * rows + i) for i in range(rows)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(rows)) and first != second


def test_an_empty_source_is_refused():
    with pytest.raises(OrderError, match="'web' has no sample"):
        SourceOrder("web", 0, seed=1)
