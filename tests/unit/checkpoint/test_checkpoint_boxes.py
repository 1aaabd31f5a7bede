"""Boxes and records: the arithmetic under every checkpoint."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megavlm.checkpoint.boxes import Box, cut, tile_exactly
from megavlm.checkpoint.records import ALIGNMENT_BYTES, record_of

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@given(SHAPES, st.integers(0, 9), st.integers(0, 70), st.integers(0, 70), st.booleans())
def test_a_stretch_becomes_boxes_of_just_its_elements(sizes: tuple[int, ...], start: int, low: int, length: int, is_half: bool) -> None:
    """Every element of the view that lies in the stretch is in one box, at the right place; also where a view skips half of each row."""
    full = (*sizes[:-1], sizes[-1] * 2) if is_half and len(sizes) > 1 else sizes
    strides = tuple(math.prod(full[axis + 1 :]) for axis in range(len(full)))
    memory = torch.arange(200)
    view, found = memory.as_strided(sizes, strides, start), []
    for box, at in cut(sizes, strides, start, low, low + length):
        values = memory.as_strided(box.sizes, strides, at)
        assert torch.equal(values, view[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))])
        found += values.flatten().tolist()
    assert sorted(found) == [value for value in view.flatten().tolist() if low <= value < low + length]


@given(SHAPES, st.integers(0, 64), st.integers(0, 64))
def test_what_is_cut_into_stretches_tiles_the_whole(sizes: tuple[int, ...], one: int, two: int) -> None:
    strides = tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    ends = sorted({0, math.prod(sizes), *(min(end, math.prod(sizes)) for end in (one, two))})
    boxes = [box for low, high in pairwise(ends) for box, _ in cut(sizes, strides, 0, low, high)]
    assert tile_exactly(sizes, boxes)
    assert not tile_exactly(sizes, boxes[1:]) and not tile_exactly(sizes, [*boxes, boxes[0]])


def test_an_overlap_does_not_make_up_for_a_hole() -> None:
    """As many elements as there are, one of them twice."""
    assert not tile_exactly((4,), [Box((0,), (2,)), Box((1,), (2,))])
    assert tile_exactly((2, 2), [Box((0, 0), (1, 2)), Box((1, 0), (1, 1)), Box((1, 1), (1, 1))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1000, 77), (2, 3, 5)])
def test_torch_reads_a_record(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = (torch.randn(shape) * 50).to(dtype)
    record = record_of(dtype, shape)
    data = record.before + bytes(values.reshape(-1).view(torch.uint8).numpy()) + record.behind
    assert len(data) == record.length and len(record.before) % ALIGNMENT_BYTES == 0
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert torch.equal(loaded, values) and loaded.dtype == dtype


def test_a_record_is_what_torch_writes() -> None:
    """With the values left out, byte for byte: a file of records is a file of torch.distributed.checkpoint."""
    from megavlm.checkpoint.records import without_crc

    values, stream = torch.randn(40, 3), io.BytesIO()
    with without_crc():
        torch.save(values, stream)
    record = record_of(torch.float32, (40, 3))
    assert stream.getvalue() == record.before + values.numpy().tobytes() + record.behind
