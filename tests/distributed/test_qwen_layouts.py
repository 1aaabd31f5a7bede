"""M-RoPE, DeepStack, windows and patch mergers together: the same losses and gradients in every layout, and no leak between samples."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.schema import ModelConfig
from megavlm.data.types import PackedBatch
from megavlm.models.init import initialise
from megavlm.parallel.context import ParallelContext
from megavlm.testing.in_rank import in_rank
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import ALL_TRAIN, ENCODER_FROZEN, assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.tiny import tiny_chunks, tiny_model_config, tiny_native_batch

VISION: dict[str, Any] = {
    "temporal_patch_size": 2,
    "positions": "learned_rotary",
    "position_interpolation": "bilinear_corners",
    "class_token": False,
    "pre_norm": False,
    "patch_bias": True,
    "norm": "rms_norm",
    "gated_mlp": True,
    "activation": "silu",
    "has_final_norm": False,
    "feature_layer": -1,
    "full_attention_layers": [1],
    # Three: the last is added on the second of two pipeline stages.
    "deepstack_layers": [0, 1, 2],
}
PROJECTOR = {"pixel_shuffle": 2, "patch_norm": "rms_norm", "hidden_size": 128}
LANGUAGE = {"mrope_sections": [3, 2, 1], "mrope_interleaved": True, "qk_norm": True}
MODEL = {"vision": VISION | {"image_size_px": 32, "attention_window_px": 32}, "projector": PROJECTOR, "language": LANGUAGE}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "PP2 encoder alone": (2, {"pipeline": 2, "layers_per_stage": [0, 4]}),
    "PP2xVPP2 unequal": (2, {"pipeline": 2, "virtual_pipeline": 2, "layers_per_stage": [1, 1, 2, 0]}),
    "CP2": (2, {"context": 2}),
    "DP2+overlap": (2, {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "recompute": (1, {"recompute": "full"}),
    "TP2+SPxPP2xCP2": (8, {"tensor": 2, "sequence": True, "pipeline": 2, "context": 2}),
}
TRAINING = {"all": ALL_TRAIN, "encoder_frozen": ENCODER_FROZEN}


def run(pool: RankPool, folder: Path, data_dir: Path, world_size: int, training: str, parallel: dict[str, Any]) -> list[dict[str, Any]]:
    data = {"image": {"policy": "native"}}
    stage = tiny_stage(steps=3, **TRAINING[training])
    recipe = tiny_recipe(folder, data_dir, [stage], model=MODEL, data=data, parallel=parallel)
    records: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return records


@pytest.fixture(scope="module")
def single_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    base = tmp_path_factory.mktemp("qwen")
    return {name: run(pool, base / name, data_dir, 1, name, {}) for name in TRAINING}


# Freezing is other tests' subject: here only what crosses stages and context ranks.
RUNS = [*((layout, "all") for layout in LAYOUTS), ("PP2", "encoder_frozen"), ("CP2", "encoder_frozen")]


@pytest.mark.parametrize(("layout", "training"), RUNS)
def test_layout_equals_single_rank(
    layout: str, training: str, pool: RankPool, data_dir: Path, tmp_path: Path, single_rank: dict[str, list[dict[str, Any]]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    records = run(pool, tmp_path, data_dir, world_size, training, parallel)
    assert_same_records(records, single_rank[training])


def tiny_qwen(**vision: Any) -> ModelConfig:
    base = tiny_model_config(**LANGUAGE).model_dump()
    own = VISION | {"attention_window_px": 16} | vision
    return ModelConfig.model_validate(base | {"vision": base["vision"] | own, "projector": base["projector"] | PROJECTOR})


GRIDS = [[(4, 6), (2, 4)], [], [(6, 8)], [(8, 2), (4, 4)]]


def native(model: ModelConfig) -> PackedBatch:
    return tiny_native_batch(model, GRIDS, text_tokens=(9, 14, 6, 7))


def hidden_states(model: ModelConfig, batch: PackedBatch, ctx: ParallelContext) -> torch.Tensor:
    chunk = tiny_chunks(model, ctx)[0]
    initialise([chunk], model, 0, ctx)
    with torch.no_grad():
        return chunk.eval().transform(batch, chunk.packing(batch))[:, 0]


@in_rank
def test_pictures_of_a_sample_are_seen_by_it_alone(ctx: ParallelContext) -> None:
    model = tiny_qwen()
    batch = native(model)
    before = hidden_states(model, batch, ctx)
    # The third sample's picture is turned upside down.
    pixels = batch.pixels_X.clone()
    start = 3 * 16 * sum(r * c for r, c in [*GRIDS[0]])
    end = start + 3 * 16 * 48
    pixels[start:end] = pixels[start:end].flip(0)
    after = hidden_states(model, replace(batch, pixels_X=pixels), ctx)
    changed = (before != after).any(-1)
    bounds = torch.tensor([0, *batch.segment_lengths]).cumsum(0).tolist()
    for sample, (low, high) in enumerate(pairwise(bounds)):
        assert bool(changed[low:high].any()) == (sample == 2), sample


@pytest.mark.parametrize("field", ["attention_window_px", "deepstack_layers", "position_interpolation", "rope_theta", "rotary_layout"])
@in_rank
def test_every_part_counts(field: str, ctx: ParallelContext) -> None:
    """Guards the comparisons above: without the part the numbers are others."""
    other: dict[str, Any] = {
        "attention_window_px": None,
        "deepstack_layers": [0, 1],
        "position_interpolation": "bicubic",
        "rope_theta": 100.0,
        "rotary_layout": "alternating",
    }
    changes = {field: other[field]} | ({"full_attention_layers": []} if field == "attention_window_px" else {})
    batch = native(tiny_qwen())
    assert not torch.allclose(hidden_states(tiny_qwen(), batch, ctx), hidden_states(tiny_qwen(**changes), batch, ctx), atol=1e-3)
