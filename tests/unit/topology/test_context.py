"""The split over context ranks against brute force: every row once, pads nowhere in the sequence, work as a mask counts it."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import get_args

import pytest

from megavlm.config.parallel import ContextSplit, ParallelConfig
from megavlm.topology.context import ContextLayout, context_layout, most_rows, rows_of_rank

SPLITS = get_args(ContextSplit)
PACKS: dict[str, tuple[int, ...]] = {
    "one segment": (64,),
    "one segment that does not divide": (61,),
    "one row": (1,),
    "shorter than the chunks": (1, 2, 3, 1, 1),
    "long and short": (100, 3, 17, 1, 40),
    "with an empty segment": (8, 0, 5),
    "equal": (16, 16, 16, 16),
    "nothing": (),
}


def segment_of(lengths: tuple[int, ...]) -> list[int]:
    return [number for number, length in enumerate(lengths) for _ in range(length)]


@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("pack", PACKS)
def test_every_row_has_one_place(pack: str, split: ContextSplit, size: int, multiple: int) -> None:
    lengths = PACKS[pack]
    layout, segments = context_layout(lengths, split, size, multiple), segment_of(lengths)
    assert layout.num_rows % multiple == 0
    assert rows_of_rank(lengths, split, size, multiple) == layout.num_rows
    if size > 1:
        parallel = ParallelConfig(context=size, context_split=split, tensor=multiple, sequence=multiple > 1)
        assert layout.num_rows <= most_rows(sum(lengths), len(lengths), parallel)
    found: list[int] = []
    for rank in range(size):
        place = 0
        for span in layout.spans[rank]:
            assert span.place >= place and span.length > 0, "spans stand in the order of the rank's rows"
            place = span.place + span.length
            assert {segments[row] for row in range(span.row, span.row + span.length)} == {span.segment}
            found += range(span.row, span.row + span.length)
        assert place <= layout.num_rows
    assert sorted(found) == list(range(sum(lengths)))
    assert sum(layout.padded_lengths) == layout.num_rows * size
    assert all(padded >= length for padded, length in zip(layout.padded_lengths, lengths, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("pack", PACKS)
def test_work_is_what_a_mask_counts(pack: str, split: ContextSplit, size: int) -> None:
    lengths = PACKS[pack]
    layout, segments = context_layout(lengths, split, size), segment_of(lengths)
    work = layout.work()
    for rank in range(size):
        rows = {row for span in layout.spans[rank] for row in range(span.row, span.row + span.length)}
        seen = [(q, k) for q in rows for k in range(q + 1) if segments[k] == segments[q]]
        assert work.pairs[rank] == len(seen)
        assert work.real_rows[rank] == len(rows)
        assert work.received[rank] == len({k for _, k in seen} - rows)
    assert work.pads == layout.num_rows * size - sum(lengths)
    if sum(lengths):
        assert work.imbalance == pytest.approx(max(work.pairs) / (sum(work.pairs) / size))


@pytest.mark.parametrize("whole", [None, frozenset({0, 2})])
@pytest.mark.parametrize("split", SPLITS)
def test_keys_of_segments_that_are_seen_whole(split: ContextSplit, whole: frozenset[int] | None) -> None:
    lengths = (7, 12, 5, 9)
    bounds, layout = [0, *accumulate(lengths)], context_layout(lengths, split, 2)
    for rank in range(2):
        for span, (first, number) in zip(layout.spans[rank], layout.keys(rank, whole), strict=True):
            assert first == bounds[span.segment]
            is_whole = whole is None or span.segment in whole
            assert first + number == (bounds[span.segment + 1] if is_whole else span.row + span.length)


def transformer_engine_rows(padded: tuple[int, ...], size: int, rank: int) -> list[int]:
    """Rows of the padded sequence on a rank: the partition that Transformer Engine documents (and megatron-core's
    get_thd_batch_on_this_cp_rank makes) of cu_seqlens_padded."""
    rows: list[int] = []
    for start, length in zip([0, *accumulate(padded)], padded, strict=False):
        chunk = length // (2 * size)
        assert chunk * 2 * size == length
        for number in (rank, 2 * size - 1 - rank):
            rows += range(start + number * chunk, start + (number + 1) * chunk)
    return rows


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("pack", PACKS)
def test_zigzag_is_transformer_engines_partition(pack: str, size: int, multiple: int) -> None:
    lengths = PACKS[pack]
    layout = context_layout(lengths, "zigzag", size, multiple)
    starts, padded_starts = [0, *accumulate(lengths)], [0, *accumulate(layout.padded_lengths)]
    for rank in range(size):
        theirs = transformer_engine_rows(layout.padded_lengths, size, rank)
        assert len(theirs) == layout.num_rows
        ours = {s.place + i: padded_starts[s.segment] + s.row - starts[s.segment] + i for s in layout.spans[rank] for i in range(s.length)}
        for place, row in enumerate(theirs):
            segment = next(i for i, start in enumerate(padded_starts[1:]) if row < start)
            is_pad = row - padded_starts[segment] >= lengths[segment]
            assert ours.get(place) == (None if is_pad else row)


def test_zigzag_is_even_and_the_others_are_not() -> None:
    """What the split is chosen by: a long document among short ones, and a pack of short ones only."""
    long, short = (6144, *[128] * 16), (128,) * 64
    even = {split: context_layout(long, split, 4).work() for split in SPLITS}
    assert even["zigzag"].imbalance == 1.0 and even["contiguous"].imbalance > 1.6 and even["pack"].imbalance > 1.2
    assert all(work.pads == 0 for work in even.values())
    travels = {split: sum(context_layout(short, split, 4).work().received) for split in SPLITS}
    assert travels["pack"] == 0 < travels["contiguous"] < travels["zigzag"]


def test_random_packs_of_zigzag_are_even_up_to_pads() -> None:
    generator = random.Random(4)
    for _ in range(50):
        lengths = tuple(generator.randint(1, 900) for _ in range(generator.randint(1, 12)))
        work = context_layout(lengths, "zigzag", 4).work()
        assert work.pads <= 7 * len(lengths)
        # A chunk's worth of rows of each segment at most is a pad's, and not a query's.
        assert max(work.pairs) - min(work.pairs) <= sum(8 * (n + 8) for n in lengths)


@pytest.mark.parametrize(("lengths", "size", "multiple"), [((3, -1), 2, 1), ((3,), 0, 1), ((3,), 2, 0)])
def test_impossible_splits_are_refused(lengths: tuple[int, ...], size: int, multiple: int) -> None:
    with pytest.raises(ValueError, match=rf"cannot be split over {size} context ranks with rows a multiple of {multiple}"):
        context_layout(lengths, "zigzag", size, multiple)


def test_a_layout_is_made_once() -> None:
    first: ContextLayout = context_layout((5, 6), "zigzag", 2)
    assert context_layout((5, 6), "zigzag", 2) is first
