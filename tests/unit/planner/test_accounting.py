"""A step's record: which peak MFU is a share of, and patches that are useful beside those that are computed."""

from __future__ import annotations

from typing import Any

import pytest

from megavlm.checkpoint.hf.reading import Problems, quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.config.schema import Recipe
from megavlm.data.types import PackPlan, StepPlan
from megavlm.planner.flops import VisionWork
from megavlm.testing.families.mllama import CASES
from megavlm.testing.recipes import tiny_recipe, tiny_stage
from megavlm.tracking.hardware import UnknownDevice
from megavlm.training.accounting import Accountant, peak_dtype

H100 = "NVIDIA H100 80GB HBM3"


def recipe_in(precision: dict[str, Any], stage: dict[str, Any] | None = None) -> Recipe:
    return tiny_recipe("run", "data", [stage or tiny_stage()], precision=precision, tracking={"peak_tflops_per_rank": None})


def plan_of(*packs: PackPlan) -> StepPlan:
    return StepPlan(1, ((packs,),), {})


@pytest.mark.parametrize(
    ("precision", "stage", "device", "expected"),
    [
        ({"dtype": "bf16"}, {}, H100, "bf16"),
        ({"dtype": "bf16", "fp8": "current"}, {}, H100, "fp8"),
        ({"dtype": "bf16", "fp8": "current"}, {}, None, "bf16"),
        ({"dtype": "bf16", "fp8": "current", "keep_bf16": ["language", "projector"]}, {"objective": "text"}, H100, "bf16"),
        ({"dtype": "bf16", "fp8": "current", "keep_bf16": ["vision", "projector"]}, {"objective": "text"}, H100, "fp8"),
    ],
    ids=str,
)
def test_the_peak_is_that_of_the_fastest_format_of_the_stage(
    precision: dict[str, Any], stage: dict[str, Any], device: str | None, expected: str
) -> None:
    recipe = recipe_in(precision, tiny_stage(**({"mixture": {"text": 1}} | stage if stage else {})))
    assert peak_dtype(recipe, recipe.stages[0], device) == expected


def test_mfu_in_fp8_is_of_twice_the_peak() -> None:
    pack = PackPlan((), (200,), VisionWork(), 20, 1e12)
    records = {}
    for fp8 in ("none", "current"):
        recipe = recipe_in({"dtype": "bf16", **({} if fp8 == "none" else {"fp8": fp8})})
        records[fp8] = Accountant(recipe, recipe.stages[0], 2, H100).record(plan_of(pack), 1.0, 0.0, 256)
    assert records["none"]["mfu"] == pytest.approx(1.0 / (2 * 989.5))
    assert records["current"]["mfu"] == pytest.approx(1.0 / (2 * 1979.0))
    assert records["none"]["tflops"] == records["current"]["tflops"]
    given = tiny_recipe("run", "data", precision={"dtype": "bf16", "fp8": "current"}, tracking={"peak_tflops_per_rank": 500.0})
    assert Accountant(given, given.stages[0], 2, H100).record(plan_of(pack), 1.0, 0.0, 256)["mfu"] == pytest.approx(1.0 / 1000.0)
    with pytest.raises(UnknownDevice, match="peak_tflops_per_rank"):
        Accountant(recipe, recipe.stages[0], 2, "NVIDIA A100-SXM4-80GB")


@pytest.mark.parametrize(("parallel", "copies"), [({}, 1), ({"tensor": 2, "encoder_tensor": 1}, 2), ({"context": 2}, 2)], ids=str)
def test_patches_that_several_ranks_compute_are_useful_once(parallel: dict[str, Any], copies: int) -> None:
    recipe = tiny_recipe("run", "data", parallel=parallel)
    pack = PackPlan((), (150,), VisionWork.uniform(3, 36), 3, 1e9)
    record = Accountant(recipe, recipe.stages[0], 2, None).record(plan_of(pack, pack), 1.0, 0.0, 256)
    assert (record["tiles"], record["patches"], record["computed_patches"]) == (6, 6 * 36, copies * 6 * 36)


def test_places_of_a_canvas_that_no_tile_fills_are_not_useful() -> None:
    model = family("mllama").model_from_hf(CASES[0].config(quiet_transformers()), Problems())
    recipe = tiny_recipe("run", "data").model_copy(update={"model": model})
    patches, places = model.vision.num_patches, model.vision.canvas_tiles
    assert places is not None and places > 1
    work = VisionWork(1, places * patches, (places * patches) ** 2)
    record = Accountant(recipe, recipe.stages[0], 1, None).record(plan_of(PackPlan((), (20,), work, 5, 1e9)), 1.0, 0.0, 256)
    assert (record["patches"], record["computed_patches"]) == (patches, places * patches)
