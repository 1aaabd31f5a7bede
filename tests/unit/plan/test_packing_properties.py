"""Whatever comes: hard caps hold, nobody is lost or doubled, nobody waits longer than the packer promises."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.packing import MAX_WAIT_WINDOWS, Budget, Packer, Waiting

samples = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 50)), min_size=1, max_size=150)


def feed(stream: list[tuple[int, int]], budget: Budget) -> Callable[[], Waiting[int] | None]:
    """Draws of (length, patches), made to fit the budget; then the end."""
    most = budget.patches if budget.patches is not None and budget.patches_are_hard else 10**9
    waiting = iter([Waiting(min(length, budget.length), min(patches, most), i, i) for i, (length, patches) in enumerate(stream)])
    return lambda: next(waiting, None)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(samples, st.integers(5, 90), st.one_of(st.none(), st.integers(10, 120)), st.booleans(), st.integers(1, 12), st.booleans())
def test_hard_caps_hold_and_everybody_comes_once(stream, length, patches, is_hard, window, packing):
    budget = Budget(length, patches, is_hard)
    packer: Packer[int] = Packer(budget, window, packing=packing)
    draw, newest = feed(stream, budget), -1

    def counted() -> Waiting[int] | None:
        nonlocal newest
        new = draw()
        newest += new is not None
        return new

    seen: list[int] = []
    while pack := packer.next_pack(counted):
        assert sum(w.length for w in pack) <= length
        if patches is not None and is_hard:
            assert sum(w.patches for w in pack) <= patches
        assert [w.arrival for w in pack] == sorted(w.arrival for w in pack)
        for w in pack:
            assert newest - w.arrival <= packer.max_wait_samples
        seen += [w.sample for w in pack]
    assert sorted(seen) == list(range(len(stream))) and not packer.waiting
    if not packing:
        assert seen == sorted(seen)


@pytest.mark.parametrize("is_hard", [True, False])
def test_the_bound_on_waiting_is_kept_where_it_would_be_broken(is_hard):
    """Long samples that fit no other long one, and then only tiny ones that fill them up: the long ones leave one a pack, and every
    pack draws many new ones."""
    window = 32
    stream = [(90, 1)] * window + [(1, 1)] * 20_000
    budget = Budget(100, 1000, is_hard)
    draw, newest, waits, fills = feed(stream, budget), -1, [], []
    packer: Packer[int] = Packer(budget, window)

    def counted() -> Waiting[int] | None:
        nonlocal newest
        newest += 1
        return draw()

    for _ in range(200):
        pack = packer.next_pack(counted)
        waits.append(newest - pack[0].arrival)
        fills.append(sum(w.length for w in pack))
    assert max(waits) <= packer.max_wait_samples == MAX_WAIT_WINDOWS * window
    assert max(waits) > packer.max_wait_samples / 2 and min(fills[:window]) < 100, "the bound must have mattered"
    # Without it the last of the long ones sees ten new ones come for each of the others.
    assert 10 * (window - 1) > packer.max_wait_samples


def test_a_patch_target_is_passed_only_where_the_pack_would_not_be_full():
    rng = random.Random(2)
    over = {True: 0, False: 0}
    for _ in range(400):
        waiting = [Waiting(rng.randint(5, 40), rng.randint(0, 300), i, i) for i in range(12)]
        target, hard = Budget(100, 500, patches_are_hard=False), Budget(100, 500)
        free = _pack(waiting, Budget(100))
        with_target = _pack(waiting, target)
        assert sum(w.length for w in with_target) == sum(w.length for w in free)
        patches = sum(w.patches for w in with_target)
        within = _pack(waiting, hard)
        could_be_full = sum(w.length for w in within) == sum(w.length for w in free)
        over[could_be_full] += patches > 500
        if could_be_full:
            assert patches <= 500
        assert patches <= max(500, sum(w.patches for w in free))
    assert over[False] > 10 and over[True] == 0


def _pack(waiting: list[Waiting[int]], budget: Budget) -> list[Waiting[int]]:
    source = iter(waiting)
    return Packer[int](budget, len(waiting)).next_pack(lambda: next(source))
