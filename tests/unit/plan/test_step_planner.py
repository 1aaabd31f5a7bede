"""Steps are a pure function of data, seed, mixture, budgets and step: resumable anywhere, on any number of ranks."""

import json
from collections import Counter

import numpy as np
import pytest

from megavlm.config.schema import DataConfig, ModelConfig, SourceConfig, StageConfig
from megavlm.data.plan import CursorError, PlanError, StepPlanner, check_tasks, step_table
from tests.unit.plan.conftest import FakeIndex, make_index

INDEXES = {"pages": make_index("pages", 230), "texts": make_index("texts", 75, most_tiles=0), "talk": make_index("talk", 120)}
DATA = DataConfig(sources={name: SourceConfig(path=name) for name in INDEXES}, seq_len_tokens=256, pack_window_samples=48)
MODEL = ModelConfig()


def stage(**kwargs) -> StageConfig:
    return StageConfig(**{"name": "align", "steps": 10, "packs_per_step": 8, "mixture": {"pages": 3, "texts": 1, "talk": 1.5}, **kwargs})


def planner(dp=1, cursor=None, data=DATA, indexes=INDEXES, seed=7, micro=1, **kwargs) -> StepPlanner:
    config = stage(micro_batch_packs=micro, **kwargs)
    microbatches = config.packs_per_step // (dp * micro)
    return StepPlanner(indexes, config, data, MODEL, seed=seed, dp_size=dp, num_microbatches=microbatches, cursor=cursor)


def packs(plan):
    """The global packs of a step, whoever has them."""
    return sorted((pack for rank in plan.assignment for group in rank for pack in group), key=lambda pack: repr(pack.samples))


def test_packs_are_the_same_on_any_number_of_ranks():
    plans = {
        (dp, micro): [p.next() for _ in range(6)]
        for dp in (1, 2, 4, 8)
        for micro in (1, 2)
        if dp * micro <= 8
        for p in [planner(dp, micro=micro)]
    }
    for (dp, micro), steps in plans.items():
        for step, reference in zip(steps, plans[1, 1], strict=True):
            assert packs(step) == packs(reference)
            assert step.cursor_after == reference.cursor_after
            assert len(step.assignment) == dp
            assert all(len(rank) == 8 // (dp * micro) and all(len(group) == micro for group in rank) for rank in step.assignment)
            for rank in step.assignment:
                costs = [sum(pack.flops for pack in group) for group in rank]
                top = len(costs) // 2
                assert costs[: top + 1] == sorted(costs[: top + 1]) and costs[top:] == sorted(costs[top:], reverse=True)


def test_resume_at_every_step_through_json_and_across_ranks():
    reference = planner(2)
    plans = [reference.next() for _ in range(12)]
    for dp in (1, 2, 4):
        for cut in range(11):
            text = json.dumps(plans[cut].cursor_after)
            resumed = planner(dp, cursor=json.loads(text))
            assert resumed.step == cut + 1
            again = resumed.next()
            assert packs(again) == packs(plans[cut + 1]) and again.cursor_after == plans[cut + 1].cursor_after
            if dp == 2:
                assert again == plans[cut + 1]


def test_a_cursor_before_the_first_step_and_a_small_one_after_many():
    fresh = planner()
    assert planner(cursor=fresh.cursor()).next() == planner().next()
    data = DATA.model_copy(update={"pack_window_samples": 256})
    long = planner(data=data)
    for _ in range(100):
        plan = long.next()
    assert len(json.dumps(plan.cursor_after)) <= 10_000


def test_samples_keep_their_metadata_and_packs_their_budgets():
    data = DATA.model_copy(update={"max_patches_per_pack": 50})
    steps = planner(data=data)
    for _ in range(10):
        for pack in packs(steps.next()):
            assert sum(pack.lengths_tokens) <= 256 and pack.num_tiles <= 5 and pack.flops > 0
            rows = [(INDEXES[s.source], s.row) for s in pack.samples]
            assert pack.lengths_tokens == tuple(i.length_tokens[row] for i, row in rows)
            assert pack.num_tiles == sum(i.num_tiles[row] for i, row in rows)
            assert pack.num_targets == sum(i.num_targets[row] for i, row in rows)


@pytest.mark.parametrize("packing", [True, False])
def test_one_source_is_drawn_exactly_once_an_epoch(packing):
    steps = planner(mixture={"pages": 1}, data=DATA.model_copy(update={"packing": packing}))
    seen: Counter[int] = Counter()
    for _ in range(30):
        plan = steps.next()
        seen.update(s.row for pack in packs(plan) for s in pack.samples)
        waiting = plan.cursor_after["waiting"]
        drawn = plan.cursor_after["counters"][0]
        held = [drawn - sum(waiting["behind"]) + i for i in range(5000) if int(waiting["held"], 16) >> i & 1]
        assert sum(seen.values()) + len(held) == drawn
        assert plan.statistics["epochs/pages"] == drawn / 230
        # Trained and waiting together: every row once an epoch, and once more for part of the last.
        together = seen + Counter(steps._mixture.row("pages", number) for number in held)
        assert {together[row] for row in range(230)} <= {drawn // 230, -(-drawn // 230)}
        if not packing:
            assert max(seen.values()) - min(seen[row] for row in range(230)) <= 1


def test_share_of_samples_follows_the_mixture():
    steps = planner()
    for _ in range(20):
        counters = dict(zip(("pages", "talk", "texts"), steps.next().cursor_after["counters"], strict=True))
        total = sum(counters.values())
        for name, weight in (("pages", 3), ("texts", 1), ("talk", 1.5)):
            assert abs(counters[name] - total * weight / 5.5) < 1


def test_statistics_and_table():
    steps = planner(2)
    plans = [steps.next() for _ in range(20)]
    assert np.mean([plan.statistics["pack_fill"] for plan in plans]) > 0.99
    for plan in plans:
        lengths = [sum(pack.lengths_tokens) for pack in packs(plan)]
        assert plan.statistics["pack_fill"] == pytest.approx(sum(lengths) / (8 * 256))
        ranks = [sum(pack.flops for group in rank for pack in group) for rank in plan.assignment]
        assert plan.statistics["flops_imbalance"] == pytest.approx(max(ranks) / np.mean(ranks))
        assert plan.statistics["flops_imbalance"] < 1.1
        assert 20 <= plan.statistics["oldest_wait_samples"] <= 48 * 8
    lines = step_table(plans[0]).splitlines()
    assert "pack_fill" in lines[0] and len(lines) == 5 and lines[-1].split()[:3] == ["1", "4", "4"]


def test_classification_packs_images_by_number():
    pictures = {"pages": FakeIndex(np.full(90, 9999), np.ones(90, int), np.full(90, 36), "pictures", np.full(90, 36), np.full(90, 36**2))}
    steps = planner(indexes=pictures, mixture={"pages": 1}, objective="vision_classification", num_classes=11, images_per_pack=6)
    for pack in packs(steps.next()):
        assert pack.lengths_tokens == (1,) * 6 and pack.num_tiles == 6 and pack.num_targets == 216
    with pytest.raises(PlanError, match="samples have no image"):
        planner(mixture={"texts": 1}, objective="vision_classification", num_classes=11)


def test_samples_that_cannot_be_planned_are_refused_and_counted():
    with pytest.raises(PlanError, match=r"'pages': \d+ of 230 samples are longer than data.seq_len_tokens=100 \(row \d+ has 129\)"):
        planner(data=DATA.model_copy(update={"seq_len_tokens": 100}))
    with pytest.raises(PlanError, match=r"samples have more patches than data.max_patches_per_pack=10 \(row \d+ has 20\)"):
        planner(data=DATA.model_copy(update={"max_patches_per_pack": 10}))
    with pytest.raises(PlanError, match="have images, and objective text takes none"):
        planner(objective="text")
    planner(objective="text", mixture={"texts": 1}).next()
    with pytest.raises(PlanError, match="without an index: talk"):
        planner(indexes={name: i for name, i in INDEXES.items() if name != "talk"})
    with pytest.raises(PlanError, match=r"3 data-parallel ranks x 2 microbatches x micro_batch_packs=1 = 6 packs, but packs_per_step=8"):
        StepPlanner(INDEXES, stage(), DATA, MODEL, seed=1, dp_size=3, num_microbatches=2)


def test_weights_of_tasks_that_no_sample_has_are_refused():
    weighted = stage(loss={"task_weights": {"read": 2.0, "raed": 0.0}})
    check_tasks(weighted, ["read", "raed", "other"])
    with pytest.raises(PlanError, match=r"task_weights names raed, and no sample .* \(there are: caption, read\)"):
        check_tasks(weighted, ["read", "caption"])


def test_changed_data_are_refused_and_named():
    cursor = planner().next().cursor_after
    cases = {
        r"seed: 7 then, 8 now": {"seed": 8},
        r"fingerprints\.talk: 'talk-120' then, 'talk-121' now": {"indexes": {**INDEXES, "talk": make_index("talk", 121)}},
        r"budgets\.seq_len_tokens: 256 then, 300 now": {"data": DATA.model_copy(update={"seq_len_tokens": 300})},
        r"budgets\.max_patches_per_pack: None then, 40 now": {"data": DATA.model_copy(update={"max_patches_per_pack": 40})},
        r"budgets\.packs_per_step: 8 then, 16 now": {"packs_per_step": 16},
        r"mixture\.texts: 1\.0 then, 'absent' now": {"mixture": {"pages": 3, "talk": 1.5}},
        r"mixture\.pages: 3\.0 then, 4\.0 now": {"mixture": {"pages": 4, "texts": 1, "talk": 1.5}},
    }
    for message, change in cases.items():
        with pytest.raises(CursorError, match=message):
            planner(cursor=cursor, **change)
    with pytest.raises(CursorError, match=r"(?s)seed.*budgets\.pack_window_samples"):
        planner(cursor=cursor, seed=9, data=DATA.model_copy(update={"pack_window_samples": 49}))
    with pytest.raises(CursorError, match="lacks version"):
        planner(cursor={"step": 3})
