"""Pictures dealt to ranks: every one once, the busiest rank close to the best there is, alike everywhere, and only where it pays."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from megavlm.config.schema import ModelConfig, ParallelConfig, ProjectorConfig, VisionConfig
from megavlm.data.types import PackPlan
from megavlm.planner.flops import VisionWork, pack_flops
from megavlm.planner.pictures import PictureDealer, copies_of_pictures, deal_pictures, encoder_layout_table
from megavlm.testing.recipes import tiny_recipe, tiny_stage
from megavlm.training.accounting import Accountant

VISION = {"image_size_px": 32, "patch_size_px": 8, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}
MODEL = ModelConfig.model_validate(
    {
        "vision": VISION | {"feature_layer": -1, "class_token": False, "pre_norm": False},
        "language": {"vocab_size": 128, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96},
    }
)


def best(costs: list[int], ranks: int) -> int:
    """The smallest maximum over all ways of dealing."""
    ways = itertools.product(range(ranks), repeat=len(costs))
    return min(max(sum(c for c, r in zip(costs, way, strict=True) if r == rank) for rank in range(ranks)) for way in ways)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_busiest_rank_is_within_the_bound_of_the_best(ranks: int) -> None:
    rng = random.Random(5)
    for _ in range(20):
        costs = [rng.choice([1, 4, 9, 30, 100]) for _ in range(7)]
        shares = deal_pictures(costs, ranks)
        assert sorted(i for share in shares for i in share) == list(range(7))
        assert all(list(share) == sorted(share) for share in shares)
        busiest = max(sum(costs[i] for i in share) for share in shares)
        assert best(costs, ranks) <= busiest <= (4 / 3 - 1 / (3 * ranks)) * best(costs, ranks) + 1e-9


def test_equal_costs_go_round_and_ranks_may_be_left_without() -> None:
    assert deal_pictures([5.0] * 5, 2) == ((0, 2, 4), (1, 3))
    assert deal_pictures([5.0], 3) == ((0,), (), ())
    assert deal_pictures([], 2) == ((), ())


def test_costs_are_the_planners_flops() -> None:
    """Quadratic in a picture's patches, linear in the number of pictures."""
    deal = PictureDealer(MODEL, 2, 2).deal(3, [(4, 4), (8, 8), (2, 2)], None)
    assert deal is not None
    for flops, patches in zip(deal.flops, (16, 64, 4), strict=True):
        parts = pack_flops(MODEL, [], VisionWork.of([patches]), 0).by_part
        assert flops == sum(work.total for part, work in parts.items() if part.startswith(("vision", "projector")))
    assert deal.flops[1] > 4 * deal.flops[0] > 16 * deal.flops[2]
    assert deal.shares == ((1,), (0, 2)) and deal.first_rows == (0, 16, 80, 84) and deal.num_rows == (64, 20)
    assert deal.spared_flops == deal.flops[0] + deal.flops[2]
    assert deal.idle_share == pytest.approx(1 - sum(deal.flops) / (2 * deal.flops[1]))


def test_what_is_frozen_has_no_backward_pass_to_spare_and_no_gradient_to_send() -> None:
    frozen = tiny_stage(vision={"train": "frozen"}, projector={"train": "frozen"})
    stages = {name: tiny_recipe("run", "data", [stage]).stages[0] for name, stage in {"frozen": frozen, "all": tiny_stage()}.items()}
    dealers = {name: PictureDealer(MODEL, 2, 2, stage=stage) for name, stage in stages.items()}
    (picture,) = dealers["all"].pictures(1, [(4, 4)], None)
    parts = pack_flops(MODEL, [], picture.work, 0).by_part
    forward = sum(work.forward for part, work in parts.items() if part.startswith(("vision", "projector")))
    assert dealers["frozen"].flops(picture) == forward < dealers["all"].flops(picture)
    assert 2 * dealers["frozen"].row_bytes == dealers["all"].row_bytes == PictureDealer(MODEL, 2, 2).row_bytes


def test_rows_are_those_of_the_projector() -> None:
    fixed = ModelConfig.model_validate(MODEL.model_dump() | {"projector": {"pixel_shuffle": 2}})
    assert [p.rows for p in PictureDealer(fixed, 2, 2).pictures(2, None, None)] == [4, 4]
    assert [p.rows for p in PictureDealer(fixed, 2, 2).pictures(2, [(4, 4), (2, 6)], None)] == [4, 3]
    resampler = {"num_latents": 5, "num_layers": 1, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 8}
    perceiver = ProjectorConfig.model_validate({"kind": "perceiver", "bias": False, "resampler": resampler})
    latents = MODEL.model_copy(update={"projector": perceiver})
    assert [p.rows for p in PictureDealer(latents, 2, 2).pictures(2, [(4, 4), (2, 6)], None)] == [5, 5]


def test_tiles_that_see_each_other_stay_together() -> None:
    vision = VISION | {"qkv_bias": False, "attention_output_bias": False, "keep_class_token": True, "feature_layer": -1}
    canvas = VisionConfig.model_validate(vision | {"canvas": {"max_tiles": 4, "num_global_layers": 1}})
    pictures = PictureDealer(MODEL.model_copy(update={"vision": canvas}), 2, 2).pictures(6, None, [1, 4, 1])
    assert [p.tiles for p in pictures] == [1, 4, 1] and {p.rows for p in pictures} == {4 * 17}
    assert {p.work.patches for p in pictures} == {4 * 16}, "every picture is filled up to the canvas"


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_the_limit_is_flops_spared_for_each_byte(tiles: int) -> None:
    always = PictureDealer(MODEL, 2, 4).deal(tiles, None, None)
    assert always is not None
    sent = 2 * 4 * 64 * 16 * tiles  # forward and back, fp32, the LLM's width, rows of a tile
    ratio = always.spared_flops / sent
    assert PictureDealer(MODEL, 2, 4, min_flops_per_byte=ratio * 1.01).deal(tiles, None, None) is None
    assert (PictureDealer(MODEL, 2, 4, min_flops_per_byte=ratio * 0.99).deal(tiles, None, None) is None) == (tiles == 1)


def test_dry_run_tells_how_encoder_and_pictures_lie() -> None:
    split = ParallelConfig(tensor=2)
    assert "encoder split over 2 tensor ranks, projector split over 2" in encoder_layout_table(MODEL, split, [])
    dealt = ParallelConfig(tensor=2, context=2, encoder_data_parallel=True)
    dealer = PictureDealer.of(MODEL, dealt, 2)
    assert dealer is not None and PictureDealer.of(MODEL, split, 2) is None
    lines = encoder_layout_table(MODEL, dealt, [dealer.deal(6, None, None), dealer.deal(2, None, None), None]).splitlines()
    assert lines[0] == "4 ranks share a microbatch: encoder whole on every rank, projector whole on every rank"
    # Busiest: 2 of 6 and 1 of 2 pictures; 8 pictures in the time of 3 x 4.
    assert lines[-1].split() == ["3", "2", "4.0", "38", "%", "33", "%"]


@pytest.mark.parametrize(
    ("parallel", "vision", "projector"),
    [
        ({}, 1, 1),
        ({"tensor": 2}, 1, 1),
        ({"tensor": 2, "encoder_tensor": 1}, 2, 2),
        ({"tensor": 2, "context": 2}, 2, 2),
        ({"tensor": 2, "context": 2, "encoder_tensor": 1}, 4, 4),
        ({"tensor": 2, "context": 2, "encoder_data_parallel": True}, 1, 1),
    ],
    ids=str,
)
def test_hardware_flops_count_every_copy(parallel: dict[str, Any], vision: int, projector: int) -> None:
    """What several ranks encode counts in HFU as often, and in MFU once."""
    recipe = tiny_recipe("run", "data", parallel=parallel)
    work = VisionWork.uniform(3, 36)
    pack = PackPlan((), (150, 106), work, 3, 1e9)
    parts = pack_flops(recipe.model, [150, 106], work, 3, recipe.stages[0]).by_part
    copies = {"vision": vision, "projector": projector}
    expected = sum(part.total * copies.get(name.split(".")[0], 1) for name, part in parts.items())
    assert Accountant(recipe, recipe.stages[0], 4, None).computed_flops([pack], 256) == expected


def test_a_module_alone_may_be_whole() -> None:
    odd = MODEL.model_copy(update={"projector": ProjectorConfig(hidden_size=51)})
    assert copies_of_pictures(odd, ParallelConfig(tensor=2, encoder_tensor="auto")) == {"vision": 1, "projector": 2}
