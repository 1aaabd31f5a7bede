"""Whatever the data: steps keep every budget, lose nothing, do not depend on the layout and resume anywhere."""

import hashlib
import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.config.schema import DataConfig, MixtureEntry, ModelConfig, SourceConfig, StageConfig
from megavlm.data.mixture import MixtureError
from megavlm.data.plan import CursorError, EndOfData, PlanError, StepPlanner
from tests.unit.plan.conftest import make_index

MODEL = ModelConfig()
FINGERPRINT_DIGITS = 24
"""Of a real index."""


def planner(mixture, indexes, *, dp=1, micro=1, packs=8, cursor=None, seed=5, steps=1000, **data) -> StepPlanner:
    config = DataConfig(**{"sources": {n: SourceConfig(path=n) for n in indexes}, "seq_len_tokens": 256, "pack_window_samples": 24, **data})
    stage = StageConfig(name="tune", steps=steps, packs_per_step=packs, micro_batch_packs=micro, mixture=mixture)
    return StepPlanner(indexes, stage, config, MODEL, seed=seed, dp_size=dp, num_microbatches=packs // (dp * micro), cursor=cursor)


def packs_of(plan):
    """The global packs of a step, whoever has them."""
    return sorted((pack for rank in plan.assignment for group in rank for pack in group), key=lambda pack: repr(pack.samples))


PATCH_BUDGETS = st.fixed_dictionaries({"max_patches_per_pack": st.integers(30, 90), "patch_budget": st.sampled_from(["hard", "target"])})


@st.composite
def recipes(draw):
    """Up to 4 sources of any lengths, weights and budgets that admit them."""
    names = [f"s{i}" for i in range(draw(st.integers(1, 4)))]
    indexes = {
        name: make_index(name, draw(st.integers(3, 80)), draw(st.integers(0, 3)), (1, draw(st.integers(2, 90))), draw(st.integers(1, 30)))
        for name in names
    }
    weight = st.one_of(
        st.floats(0.01, 100), st.dictionaries(st.integers(0, 4), st.sampled_from([0.1, 1.0, 9.0]), min_size=1), st.sampled_from([1, 2])
    )
    mixture = {name: MixtureEntry(weight=draw(weight), change=draw(st.sampled_from(["linear", "steps"]))) for name in names}
    data = {
        "seq_len_tokens": draw(st.integers(180, 600)),
        "pack_window_samples": draw(st.integers(1, 40)),
        **draw(st.one_of(st.just({"max_patches_per_pack": None}), PATCH_BUDGETS)),
        "packing": draw(st.sampled_from([True, True, True, False])),
    }
    return mixture, indexes, data


@settings(max_examples=30, derandomize=True, deadline=None)
@given(recipes(), st.sampled_from([(2, 1), (4, 1), (4, 2), (8, 1), (1, 4)]), st.integers(0, 4))
def test_any_recipe_keeps_budgets_loses_nothing_and_resumes_in_any_layout(recipe, layout, cut):
    mixture, indexes, data = recipe
    steps = planner(mixture, indexes, **data)
    plans = [steps.next() for _ in range(6)]
    trained: Counter = Counter()
    for plan in plans:
        for pack in packs_of(plan):
            assert sum(pack.lengths_tokens) <= data["seq_len_tokens"]
            if data["max_patches_per_pack"] and data["patch_budget"] == "hard":
                assert pack.vision.patches <= data["max_patches_per_pack"]
            assert pack.lengths_tokens == tuple(indexes[s.source].length_tokens[s.row] for s in pack.samples)
            trained.update((s.source, s.row) for s in pack.samples)
        cursor = plan.cursor_after
        waiting = int(cursor["waiting"]["held"], 16).bit_count()
        assert sum(cursor["counters"]) == trained.total() + waiting
    for source, index in indexes.items():
        drawn = dict(zip(sorted(mixture), cursor["counters"], strict=True)).get(source, 0)
        seen = [trained[source, row] for row in range(len(index))]
        # Nothing twice before everything once: epochs overlap only by what waits.
        assert max(seen) <= -(-drawn // len(index)) and sum(seen) <= drawn <= sum(seen) + waiting
    dp, micro = layout
    other = planner(mixture, indexes, dp=dp, micro=micro, cursor=json.loads(json.dumps(plans[cut].cursor_after)), **data)
    for plan in plans[cut + 1 :]:
        again = other.next()
        assert packs_of(again) == packs_of(plan) and again.cursor_after == plan.cursor_after


def test_resume_at_every_pack():
    indexes = {"pages": make_index("pages", 90), "talk": make_index("talk", 31, 0)}
    mixture = {"pages": {"weight": {0: 1, 40: 5}}, "talk": {"weight": 2, "max_epochs": 9}}
    data = {"seq_len_tokens": 200, "max_patches_per_pack": 30, "patch_budget": "target"}
    steps = planner(mixture, indexes, packs=1, **data)
    plans = [steps.next() for _ in range(150)]
    for cut in range(149):
        resumed = planner(mixture, indexes, packs=1, cursor=json.loads(json.dumps(plans[cut].cursor_after)), **data)
        assert resumed.next() == plans[cut + 1]


def test_eight_ranks_then_two_then_sixty_four():
    """Mid-run changes of the data-parallel size give the global batches of the run that never changed."""
    indexes = {"pages": make_index("pages", 900), "talk": make_index("talk", 400, 0)}
    mixture = {"pages": 3, "talk": {"weight": {0: 1, 9: 2}}}
    unchanged = planner(mixture, indexes, packs=128)
    reference = [unchanged.next() for _ in range(9)]
    cursor, seen = None, []
    for dp, micro in ((8, 1), (2, 4), (64, 2)):
        part = planner(mixture, indexes, packs=128, dp=dp, micro=micro, cursor=cursor)
        plans = [part.next() for _ in range(3)]
        assert all(len(plan.assignment) == dp and len(plan.assignment[0]) == 128 // dp // micro for plan in plans)
        cursor = json.loads(json.dumps(plans[-1].cursor_after))
        seen += plans
    assert [packs_of(plan) for plan in seen] == [packs_of(plan) for plan in reference]
    assert seen[-1].cursor_after == reference[-1].cursor_after


def test_repeats_train_every_sample_once_an_epoch():
    """Without packing nothing waits: after sum(rows) samples each was trained exactly once, of every source."""
    indexes = {"pages": make_index("pages", 50), "talk": make_index("talk", 30, 0)}
    steps = planner({name: {"repeats": 1} for name in indexes}, indexes, packing=False)
    for _ in range(3):
        seen = Counter((s.source, s.row) for _ in range(10) for pack in packs_of(steps.next()) for s in pack.samples)
        assert seen == Counter({(name, row): 1 for name, index in indexes.items() for row in range(len(index))})


def test_changes_land_on_their_step():
    """A jump at step 30 shows in the packs of steps 29 to 31, although the packer fills only part of each pack."""
    indexes = {"big": make_index("big", 4000, 0, (120, 170)), "small": make_index("small", 4000, 0, (5, 40))}
    mixture = {"big": 1, "small": {"weight": {0: 0.25, 30: 4}, "change": "steps"}}
    steps = planner(mixture, indexes, packs=64)
    shares, lags = [], []
    for _ in range(60):
        plan = steps.next()
        sources = Counter(s.source for pack in packs_of(plan) for s in pack.samples)
        shares.append(sources["small"] / sources.total())
        lags.append(plan.statistics["curriculum_lag_steps"])
    assert all(abs(share - 0.2) < 0.05 for share in shares[:29])
    assert all(abs(share - 0.8) < 0.05 for share in shares[32:])
    assert max(map(abs, lags)) < 1


def test_data_that_end_are_told_before_the_run_and_the_last_sample_is_trained():
    indexes = {"pages": make_index("pages", 160), "talk": make_index("talk", 90, 0)}
    mixture = {"pages": {"weight": 1, "max_epochs": 1}, "talk": {"weight": 1, "max_epochs": 2}}
    told = planner(mixture, indexes).early_end
    assert told is not None and re.search(r"reaches mixture\.\*\.max_epochs after 340 samples, about \d+ steps, before steps=1000", told)
    assert "Set steps=1 for" in (planner(mixture, indexes, steps=100, packs=64).early_end or "")
    with pytest.raises(PlanError, match="340, do not fill the 512 packs of one step") as short:
        planner(mixture, indexes, steps=100, packs=512).next()
    assert not isinstance(short.value, EndOfData), "a stage without a step is an error"
    steps = planner(mixture, indexes, packs=1, steps=10)
    assert steps.early_end is None
    seen, _, end = trained_until_the_end(steps)
    assert set(seen.values()) == {1, 2} and seen.total() == 340 and end.num_left_samples == 0


def trained_until_the_end(steps):
    """What was trained, the plans, and how it ended."""
    seen: Counter = Counter()
    plans = []
    while True:
        try:
            plans.append(steps.next())
        except EndOfData:
            break
        seen.update((s.source, s.row) for pack in packs_of(plans[-1]) for s in pack.samples)
    with pytest.raises(EndOfData) as again:
        steps.next()
    assert again.value.num_steps == len(plans)
    return seen, plans, again.value


def test_one_epoch_ends_at_the_last_whole_step_wherever_it_was_resumed():
    indexes = {"pages": make_index("pages", 1000, 2, (5, 60))}
    mixture = {"pages": {"weight": 1, "max_epochs": 1}}
    seen, plans, end = trained_until_the_end(planner(mixture, indexes))
    assert seen.total() + end.num_left_samples == 1000 and set(seen.values()) == {1} and 0 < end.num_left_samples < 60
    for cut in (0, len(plans) // 2, len(plans) - 2, len(plans) - 1):
        cursor = json.loads(json.dumps(plans[cut].cursor_after))
        for dp in (1, 4):
            rest, again, same = [], planner(mixture, indexes, dp=dp, cursor=cursor), None
            while same is None:
                try:
                    rest.append(packs_of(again.next()))
                except EndOfData as error:
                    same = error
            assert rest == [packs_of(plan) for plan in plans[cut + 1 :]]
            assert (same.num_steps, same.num_left_samples) == (end.num_steps, end.num_left_samples)


def test_what_changed_is_named(tmp_path):
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"one")
    moved = tmp_path / "elsewhere.model"
    moved.write_bytes(b"one")
    indexes = {"pages": make_index("pages", 160)}
    mixture = {"pages": {"weight": {0: 1, 5: 2}}}
    cursor = json.loads(json.dumps(planner(mixture, indexes, tokenizer=str(tokenizer)).next().cursor_after))

    def resume(mix=mixture, **changes):
        return planner(mix, indexes, cursor=cursor, **{"tokenizer": str(tokenizer), **changes})

    resume(tokenizer=str(moved)).next()
    resume(image={"decoder": "pillow"}, num_workers=3, prefetch_steps=7, workers="processes").next()
    for message, changes in {
        r"settings\.image\.fit: 'stretch' then, 'pad' now": {"image": {"fit": "pad"}},
        r"settings\.image\.max_tokens_per_image: 'None' then, '99' now": {"image": {"max_tokens_per_image": 99}},
        r"settings\.chat_template: 'megavlm' then, 'chatml' now": {"chat_template": "chatml"},
        r"settings\.over_long: '' then, 'split_turns' now": {"over_long": ["split_turns"]},
        r"budgets\.patch_budget: 'hard' then, 'target' now": {"patch_budget": "target", "max_patches_per_pack": 60},
        r"mixture\.pages: 'weight \{0: 1\.0, 5: 2\.0\} linear' then, 'weight \{0: 1\.0, 5: 3\.0\} linear' now": {
            "mix": {"pages": {"weight": {0: 1, 5: 3}}}
        },
    }.items():
        with pytest.raises(CursorError, match=message):
            resume(**changes)
    tokenizer.write_bytes(b"two")
    with pytest.raises(CursorError, match=r"settings\.tokenizer: '[0-9a-f]{16}' then, '[0-9a-f]{16}' now"):
        resume()
    with pytest.raises(CursorError, match="written for plan version 1, and this megavlm plans by version 3"):
        planner(mixture, indexes, cursor={**cursor, "version": 1})
    tokenizer.write_bytes(b"one")
    for position in ({"counters": [-5]}, {"counters": [1, 2]}, {"waiting": {"behind": [10**6], "held": "1"}}, {"sources": "x"}):
        with pytest.raises(CursorError, match="damaged"):
            planner(mixture, indexes, tokenizer=str(tokenizer), cursor={**cursor, **position})


def test_the_cursor_is_small_with_many_sources_and_a_wide_window():
    indexes = {f"collection-{i:03}-with-a-name": make_index(f"collection-{i:03}", 500) for i in range(200)}
    for i, index in enumerate(indexes.values()):
        index.fingerprint = hashlib.sha256(bytes([i])).hexdigest()[:FINGERPRINT_DIGITS]
    mixture = {name: {"weight": {0: 1 + i / 7, 500: 0.2, 900: 2}, "max_epochs": 40} for i, name in enumerate(indexes)}
    steps = planner(mixture, indexes, packs=64, pack_window_samples=1024, steps=10)
    for _ in range(3):
        plan = steps.next()
    assert len(json.dumps(plan.cursor_after)) <= 10_000
    indexes["collection-017-with-a-name"].fingerprint = "changed"
    with pytest.raises(CursorError, match="fingerprints.collection-017-with-a-name: '[0-9a-f]+' then, 'changed' now\n[^\n]*$"):
        planner(mixture, indexes, packs=64, pack_window_samples=1024, steps=10, cursor=plan.cursor_after)


def test_an_impossible_mixture_is_refused():
    indexes = {"pages": make_index("pages", 160)}
    with pytest.raises(MixtureError, match="from step 5 on no source"):
        planner({"pages": {"weight": {0: 1, 5: 0}}}, indexes)
