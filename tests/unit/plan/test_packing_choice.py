"""The packer against brute force, and its promises: exact, in budget, nobody forgotten."""

import itertools
import random

import pytest

from megavlm.data.packing import Budget, Packer, PackingError, Waiting, choose


def brute_force(waiting: list[Waiting], budget: Budget) -> int:
    """Longest total of any subset that holds the oldest and keeps both budgets."""
    best = 0
    for count in range(len(waiting)):
        for others in itertools.combinations(waiting[1:], count):
            pack = (waiting[0], *others)
            length, tiles = sum(w.length for w in pack), sum(w.patches for w in pack)
            if length <= budget.length and (budget.patches is None or tiles <= budget.patches):
                best = max(best, length)
    return best


@pytest.mark.parametrize("with_tiles", [False, True])
def test_choice_is_optimal(with_tiles):
    rng = random.Random(int(with_tiles))
    improvable = 0
    for _ in range(300):
        waiting = [Waiting(rng.randint(1, 40), rng.randint(0, 4), i) for i in range(rng.randint(1, 10))]
        budget = Budget(rng.randint(40, 90), rng.randint(4, 8) if with_tiles else None)
        chosen = choose(waiting, budget)
        assert chosen[0] == 0 and chosen == sorted(set(chosen))
        total, tiles = sum(waiting[i].length for i in chosen), sum(waiting[i].patches for i in chosen)
        assert total <= budget.length and (budget.patches is None or tiles <= budget.patches)
        assert total == brute_force(waiting, budget)
        improvable += total < brute_force(waiting, Budget(budget.length))
    assert (improvable > 0) == with_tiles, "the tile budget must have decided some of the cases"


def stream(rng: random.Random):
    """Visual tokens in multiples of 256 and log-normal texts: the shape of a real mix."""
    for number in itertools.count():
        tiles = rng.choice((0, 1, 1, 1, 3, 5, 7, 13))
        yield Waiting(min(4096, 256 * tiles + int(rng.lognormvariate(4.5, 0.8)) + 8), tiles, number)


@pytest.mark.parametrize("tiles", [None, 15])
def test_fill_order_and_wait(tiles):
    source = stream(random.Random(3))
    drawn: list[Waiting] = []

    def draw() -> Waiting:
        drawn.append(next(source))
        return drawn[-1]

    packer, window, placed = Packer(Budget(4096, tiles), 64), 64, []
    arrived: dict[int, int] = {}
    for pack_number in range(400):
        pack = packer.next_pack(draw)
        for w in drawn[len(arrived) :]:
            arrived[w.sample] = pack_number
        assert pack[0] == min(pack, key=lambda w: w.sample), "the oldest comes first"
        assert pack_number - min(arrived[w.sample] for w in pack) < window
        placed.append(pack)
    everyone = [w.sample for pack in placed for w in pack] + [w.sample for w in packer.waiting]
    assert sorted(everyone) == list(range(len(drawn))), "nobody is lost and nobody comes twice"
    assert sum(w.length for pack in placed for w in pack) / (400 * 4096) > 0.995


def test_waiting_is_the_whole_state():
    a = Packer(Budget(1000), 32)
    samples = [Waiting(random.Random(i).randint(10, 400), 0, i) for i in range(2000)]
    source = iter(samples)
    for _ in range(20):
        a.next_pack(lambda: next(source))
    rest = list(source)
    b = Packer(Budget(1000), 32, waiting=a.waiting)
    one, two = iter(rest), iter(rest)
    assert [a.next_pack(lambda: next(one)) for _ in range(20)] == [b.next_pack(lambda: next(two)) for _ in range(20)]


def test_without_packing_every_sample_is_alone_and_in_order():
    source = stream(random.Random(0))
    packer = Packer(Budget(4096), 64, packing=False)
    assert [[w.sample for w in packer.next_pack(lambda: next(source))] for _ in range(5)] == [[0], [1], [2], [3], [4]]


def test_a_sample_that_fits_no_pack_is_refused():
    for bad, message in (
        (Waiting(11, 0, "x"), "sample x: its length of 11"),
        (Waiting(0, 0, "x"), "length of 0"),
        (Waiting(5, 3, "x"), "3 patches"),
    ):
        with pytest.raises(PackingError, match=message):
            Packer(Budget(10, 2), 4).next_pack(lambda bad=bad: bad)
    with pytest.raises(PackingError, match="at least 1"):
        Budget(0)
    with pytest.raises(PackingError, match="window"):
        Packer(Budget(10), 0)
