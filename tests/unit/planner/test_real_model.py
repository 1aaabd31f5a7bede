"""The planner's counts against the model that trains: parameters on every rank, FLOPs of a packed forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.config.schema import DataConfig, ModelConfig, ModuleTraining, ParallelConfig, PrecisionConfig, StageConfig
from megavlm.models.freezing import apply_freezing
from megavlm.models.init import initialise
from megavlm.models.vision.positions import interpolated_positions
from megavlm.parallel.context import enter_grid
from megavlm.planner.flops import VisionWork, pack_flops
from megavlm.planner.memory import estimate_memory
from megavlm.testing.pool import RankPool
from megavlm.testing.tiny import tiny_batch, tiny_chunks, tiny_model_config, tiny_native_batch
from megavlm.topology.grid import RankGrid

FULL, FROZEN = ModuleTraining(), ModuleTraining(train="frozen")
STAGES = {
    "everything": (FULL, FULL, FULL),
    "projector": (FROZEN, FULL, FROZEN),
    "recipe's second stage": (ModuleTraining(train="last_layers", last_layers=1), FULL, FULL),
    "tops": (ModuleTraining(train="last_layers", last_layers=1), FROZEN, ModuleTraining(train="last_layers", last_layers=1)),
}
# A multiple of what the vocabulary is padded to at tensor=2: our counts are of the unpadded one.
VOCABULARY = 112


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


def stage_of(name: str) -> StageConfig:
    vision, projector, language = STAGES[name]
    return StageConfig(name="s", steps=1, mixture={"a": 1}, packs_per_step=8, vision=vision, projector=projector, language=language)


def count(model: ModelConfig, parallel: ParallelConfig, stages: list[StageConfig]) -> tuple[int, list[tuple[int, int]]]:
    """(pipeline rank, [(parameters, trainable ones)] in each stage) of this rank."""
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    chunks = tiny_chunks(model, ctx, parallel)
    counts = []
    for stage in stages:
        apply_freezing(chunks, stage)
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        counts.append((sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)))
    return ctx.grid.coordinates(torch.distributed.get_rank()).pipeline, counts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "layout", [{}, {"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"tensor": 2, "pipeline": 2}], ids=lambda x: str(x) or "one"
)
def test_parameters_of_every_rank(ranks, layout, tied):
    model = tiny_model_config(tie_embeddings=tied, siglip=tied, vocab_size=VOCABULARY, qk_norm=tied, qkv_bias=tied)
    model = model.model_copy(update={"projector": model.projector.model_copy(update={"image_newline": tied})})
    parallel, stages = ParallelConfig(**layout), [stage_of(name) for name in STAGES]
    grid = RankGrid.from_config(parallel, parallel.tensor * parallel.pipeline)
    expected = [estimate_memory(model, stage, DataConfig(), grid, parallel, PrecisionConfig()) for stage in stages]
    for rank, counts in ranks.run(count, model, parallel, stages, world_size=grid.world_size):
        assert counts == [(estimates[rank].num_parameters, estimates[rank].num_trainable) for estimates in expected]


def count_flops(model: ModelConfig, stage: StageConfig, images: tuple[int, ...] | list) -> tuple[int, list[int], int, int]:
    """(forward + backward FLOPs as torch counts them, segment lengths, tiles, targets) of one pack; of grids, where they are given."""
    ctx = enter_grid(ParallelConfig(), torch.device("cpu"), seed=1)
    chunks = tiny_chunks(model, ctx)
    initialise(chunks, model, 0, ctx)
    apply_freezing(chunks, stage)
    batch = tiny_batch(model, images_per_sample=images) if isinstance(images, tuple) else tiny_native_batch(model, images)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        chunks[0](batch).total.backward()
    stretching = sum(position_flops(chunks[0].vision.position_embedding[1:], grid) for grid in set(batch.tile_grids or ()))
    return counter.get_total_flops() - stretching, batch.segment_lengths, batch.num_tiles, batch.target_ids_Q.numel()


def position_flops(table: torch.Tensor, grid: tuple[int, int]) -> int:
    """What stretching the learned positions costs: once a grid, not counted by the planner, as little as any position is."""
    with FlopCounterMode(display=False) as counter:
        out = interpolated_positions(table, *grid).sum()
        if out.requires_grad:
            out.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("grids", [None, [[(2, 8)], [], [(4, 4), (4, 12)]]], ids=["tiles", "native"])
@pytest.mark.parametrize("shuffle", [1, 2])
@pytest.mark.parametrize("name", STAGES)
def test_flops_of_a_packed_step(ranks, name, shuffle, grids):
    model, stage = tiny_model_config(vocab_size=VOCABULARY), stage_of(name)
    model = model.model_copy(update={"projector": model.projector.model_copy(update={"pixel_shuffle": shuffle})})
    ((counted, lengths, tiles, targets),) = ranks.run(count_flops, model, stage, grids or (1, 0, 2))
    patches = [r * c for sample in grids for r, c in sample] if grids else [model.vision.num_patches] * tiles
    ours = pack_flops(model, lengths, VisionWork.of(patches), targets, stage)
    # The general CPU kernel computes the masked half of causal attention as well.
    expected = ours.total + ours.by_part["language.attention"].total
    if stage.vision.train == "frozen":
        # megatron-core's linear layers compute the gradient of their input even where nobody asks for it; ours are the FLOPs needed.
        expected += 2 * sum(patches) * model.vision.hidden_size * model.language.hidden_size
    assert expected == counted
