"""Resampler, merging linear layer, factorised and bucketed positions on pictures of any size: the same training in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.models.freezing import decays
from megavlm.models.init import initialise
from megavlm.models.projectors import build_projector
from megavlm.models.vision import VisionEncoder
from megavlm.parallel.context import ParallelContext, enter_grid
from megavlm.testing.in_rank import in_rank
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import ALL_TRAIN, assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.tiny import tiny_chunks, tiny_model_config

VISION: dict[str, Any] = {"class_token": False, "pre_norm": False, "patch_bias": True, "feature_layer": -1, "final_norm": True}
RESAMPLER = {"num_latents": 3, "num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "bucketed positions, resampler": {
        "vision": VISION | {"positions": "bucketed"},
        "projector": {"kind": "perceiver", "bias": False, "activation": "silu", "resampler": RESAMPLER},
    },
    "factorised positions, merging linear layer": {
        "vision": VISION | {"positions": "factorised", "image_size_px": 64},
        "projector": {"pixel_shuffle": 2, "merge_linear": True, "merged_order": "channels", "patch_norm": "rms_norm"},
    },
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "DP2+overlap": (2, {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "recompute": (1, {"recompute": "full"}),
}


def run(pool: RankPool, folder: Path, data_dir: Path, world_size: int, name: str, parallel: dict[str, Any]) -> list[dict[str, Any]]:
    recipe = tiny_recipe(
        folder,
        data_dir,
        [tiny_stage(steps=3, **ALL_TRAIN)],
        model=MODELS[name],
        data={"image": {"policy": "native", "whole_patches": "stretch", "longest_edge_px": 40}},
        parallel=parallel,
    )
    records: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return records


@pytest.fixture(scope="module")
def single_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    base = tmp_path_factory.mktemp("native")
    return {name: run(pool, base / str(i), data_dir, 1, name, {}) for i, name in enumerate(MODELS)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_layout_equals_single_rank(
    name: str, layout: str, pool: RankPool, data_dir: Path, tmp_path: Path, single_rank: dict[str, list[dict[str, Any]]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    records = run(pool, tmp_path, data_dir, world_size, name, parallel)
    assert_same_records(records, single_rank[name])


def tiny(name: str) -> ModelConfig:
    base = tiny_model_config().model_dump()
    return ModelConfig.model_validate(base | {part: base[part] | values for part, values in MODELS[name].items()})


def pictures(grids: list[tuple[int, int]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 256, (3 * r * c * 16,), generator=generator, dtype=torch.uint8) for r, c in grids]


GRIDS = [(4, 6), (2, 2), (8, 2), (6, 6)]


def visual_tokens(name: str, tensor: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of each picture alone, and of all in one pack."""
    ctx = enter_grid(ParallelConfig(tensor=tensor), torch.device("cpu"), seed=1)
    model = tiny(name)
    (chunk,) = tiny_chunks(model, ctx, ParallelConfig(tensor=tensor))
    initialise([chunk], model, 0, ctx)
    chunk.eval()
    with torch.no_grad():
        alone = [chunk.projector(chunk.vision(x, [grid])) for x, grid in zip(pictures(GRIDS), GRIDS, strict=True)]
        packed = chunk.projector(chunk.vision(torch.cat(pictures(GRIDS)), GRIDS))
    return alone, packed


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_packed_is_alone(name: str, tensor: int, pool: RankPool) -> None:
    for alone, packed in pool.run(visual_tokens, name, tensor, world_size=tensor):
        assert [len(x) for x in alone] == [tiny(name).visual_tokens(*grid) for grid in GRIDS]
        torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


@in_rank
def test_factorised_positions_are_rows_plus_columns(ctx: ParallelContext) -> None:
    """In the encoder itself: patches of equal pixels differ by their positions alone."""
    model = tiny("factorised positions, merging linear layer")
    side = model.vision.grid_side
    encoder = VisionEncoder(model.vision, PrecisionConfig(dtype="fp32"), ParallelConfig(), ctx.device)
    table = encoder.position_embedding
    assert table is not None and table.shape == (2 * side, model.vision.hidden_size)
    with torch.no_grad():
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(1)))
    found = encoder._positions(table, [(3, 5), (16, 1)])
    want = torch.stack([table[row] + table[side + column] for row in range(3) for column in range(5)])
    torch.testing.assert_close(found[:15], want)
    torch.testing.assert_close(found[15:], torch.stack([table[row] + table[side] for row in range(16)]))
    (gradient,) = torch.autograd.grad(found.sum(), table)
    counts = torch.zeros(2 * side)
    counts[:3] += 5
    counts[:16] += 1
    counts[side : side + 5] += 3
    counts[side] += 16
    torch.testing.assert_close(gradient, counts[:, None].expand_as(gradient))
    with pytest.raises(ValueError, match="knows 16 rows and columns"):
        encoder._positions(table, [(17, 1)])


@in_rank
def test_learned_tokens_start_apart_and_do_not_decay(ctx: ParallelContext) -> None:
    learned_by_model = dict(zip(MODELS, ("projector.latents", "vision.position_embedding"), strict=True))
    for name, parameter in learned_by_model.items():
        model = tiny(name)
        (chunk,) = tiny_chunks(model, ctx)
        initialise([chunk], model, 0, ctx)
        learned = chunk.get_parameter(parameter)
        assert 0.5 * model.init_std < float(learned.std()) < 1.5 * model.init_std and not decays(parameter, learned)


@in_rank
def test_heads_that_do_not_divide_are_refused_by_name(ctx: ParallelContext) -> None:
    model = tiny("bucketed positions, resampler")
    with pytest.raises(ValueError, match="parallel.tensor=4 does not divide model.projector.resampler.num_query_groups=2"):
        build_projector(model, PrecisionConfig(dtype="fp32"), ParallelConfig(tensor=4), ctx.device)


def test_no_hugging_face_class_holds_factorised_positions() -> None:
    from megavlm.checkpoint.hf import HuggingFaceError, TokenIds, config_to_hf

    for family in ("llava", "idefics3"):
        model = tiny("factorised positions, merging linear layer").model_copy(update={"family": family})
        with pytest.raises(HuggingFaceError, match="model.vision.positions='factorised'"):
            config_to_hf(model, TokenIds(image=3))
