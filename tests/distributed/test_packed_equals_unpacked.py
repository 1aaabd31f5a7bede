"""Packing changes nothing: a pack computes what its samples compute alone, and samples of a pack cannot see each other.

The famous bug this keeps out: middle pipeline stages that lose the segment bounds, so that samples contaminate each other.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.data.types import PackedBatch
from megavlm.models.init import initialise
from megavlm.models.language.rotary import rotary_tables
from megavlm.models.layers.packing import pack
from megavlm.models.vlm import TargetLoss, VisionLanguageModel
from megavlm.parallel.context import ParallelContext, enter_grid
from megavlm.testing.pool import RankPool
from megavlm.testing.tiny import tiny_batch, tiny_chunks, tiny_model_config

STYLES = ["clip", "siglip"]


def model_config(style: str) -> ModelConfig:
    return tiny_model_config(siglip=style == "siglip", qkv_bias=True, qk_norm=True)


def build(model: ModelConfig, **parallel: Any) -> tuple[list[VisionLanguageModel], ParallelContext]:
    layout = ParallelConfig(**parallel)
    ctx = enter_grid(layout, torch.device("cpu"), seed=1)
    chunks = tiny_chunks(model, ctx, layout)
    initialise(chunks, model, 0, ctx)
    return chunks, ctx  # type: ignore[return-value]


def alone(batch: PackedBatch, segment: int, tokens_per_tile: int) -> PackedBatch:
    """One segment of a pack as a batch of its own."""
    start = sum(batch.segment_lengths[:segment])
    length = batch.segment_lengths[segment]
    targets = batch.target_segments_Q == segment
    images = (batch.image_positions_N >= start) & (batch.image_positions_N < start + length)
    first_tile = int((batch.image_positions_N < start).sum()) // tokens_per_tile
    num_tiles = int(images.sum()) // tokens_per_tile
    return PackedBatch(
        tokens_S=batch.tokens_S[start : start + length],
        positions_S=batch.positions_S[start : start + length],
        segment_lengths=[length],
        segment_samples=[batch.segment_samples[segment]],
        segment_tasks=[batch.segment_tasks[segment]],
        target_positions_Q=batch.target_positions_Q[targets] - start,
        target_ids_Q=batch.target_ids_Q[targets],
        target_weights_Q=batch.target_weights_Q[targets],
        target_segments_Q=torch.zeros(int(targets.sum()), dtype=torch.int64),
        image_positions_N=batch.image_positions_N[images] - start,
        num_tiles=num_tiles,
        tiles_TCHW=batch.tiles_TCHW[first_tile : first_tile + num_tiles] if num_tiles and batch.tiles_TCHW is not None else None,
    )


def perturbed(batch: PackedBatch, segment: int, tokens_per_tile: int) -> PackedBatch:
    """The same pack with other words and other pixels in one segment."""
    start = sum(batch.segment_lengths[:segment])
    rows = torch.arange(start, start + batch.segment_lengths[segment])
    rows = rows[~torch.isin(rows, batch.image_positions_N)]
    tokens = batch.tokens_S.clone()
    tokens[rows] = (tokens[rows] - 4 + 17) % 90 + 4
    tiles = None if batch.tiles_TCHW is None else batch.tiles_TCHW.clone()
    first = int((batch.image_positions_N < start).sum()) // tokens_per_tile
    count = int(torch.isin(batch.image_positions_N, torch.arange(start, start + batch.segment_lengths[segment])).sum()) // tokens_per_tile
    if tiles is not None and count:
        tiles[first : first + count] = 255 - tiles[first : first + count]
    changed = PackedBatch(**{**vars(batch), "tokens_S": tokens, "tiles_TCHW": tiles})
    assert not torch.equal(tokens, batch.tokens_S)
    return changed


def logits_and_gradients(style: str) -> dict[str, Any]:
    model = model_config(style)
    (vlm,), _ = build(model)
    batch = tiny_batch(model, images_per_sample=(1, 0, 2, 0), text_tokens=(9, 14, 6, 5), seq_len_tokens=100)
    num_samples = sum(s is not None for s in batch.segment_samples)
    singles = [alone(batch, i, model.visual_tokens_per_tile) for i in range(num_samples)]

    def logits(b: PackedBatch) -> torch.Tensor:
        return vlm.language.logits(vlm.transform(b, vlm.packing(b)))

    def gradients(batches: list[PackedBatch]) -> dict[str, torch.Tensor]:
        vlm.zero_grad()
        for b in batches:
            output = vlm(b)
            assert isinstance(output, TargetLoss)
            output.total.backward()
        return {n: p.grad.clone() for n, p in vlm.named_parameters() if p.grad is not None}

    with torch.no_grad():
        together, separate = logits(batch)[: sum(b.num_tokens for b in singles)], torch.cat([logits(b) for b in singles])
        packed, split = vlm(batch).loss_Q, torch.cat([vlm(b).loss_Q for b in singles])
    a, b = gradients([batch]), gradients(singles)
    worst = max(float((a[n] - b[n]).abs().max() / (b[n].abs().max() + 1e-6)) for n in b)
    return {
        "logits": float((together - separate).abs().max()),
        "scale": float(separate.abs().max()),
        "losses": float((packed - split).abs().max()),
        "gradients": worst,
        "names": (sorted(a) == sorted(b), len(a)),
    }


@pytest.mark.parametrize("style", STYLES)
def test_pack_equals_its_samples_alone(style: str, pool: RankPool) -> None:
    result = pool.run(logits_and_gradients, style)[0]
    assert result["logits"] < 1e-5 * result["scale"]
    assert result["losses"] < 1e-5
    assert result["gradients"] < 1e-4
    assert result["names"][0] and result["names"][1] > 30


def isolation(parallel: dict[str, Any], segment: int) -> dict[str, Any]:
    """Perturb one sample and see, on this pipeline stage, which samples' hidden states and losses changed."""
    model = model_config("clip")
    chunks, ctx = build(model, **parallel)
    batch = tiny_batch(model, images_per_sample=(1, 0, 2, 0), text_tokens=(9, 14, 6, 5), seq_len_tokens=96, num_targets=12)
    other = perturbed(batch, segment, model.visual_tokens_per_tile)
    outputs = [_through_pipeline(chunks[0], b, ctx) for b in (batch, other)]
    start = sum(batch.segment_lengths[:segment])
    own = torch.zeros(batch.num_tokens, dtype=torch.bool)
    own[start : start + batch.segment_lengths[segment]] = True
    before, after = (o[0] for o in outputs)
    result = {"stage": ctx.pipeline_rank, "own_changed": not torch.equal(before[own], after[own])}
    result["others_equal"] = torch.equal(before[~own], after[~own])
    if ctx.is_last_stage:
        others = batch.target_segments_Q != segment
        losses = [o[1] for o in outputs]
        result["other_losses_equal"] = torch.equal(losses[0][others], losses[1][others])
        result["own_loss_changed"] = not torch.equal(losses[0][~others], losses[1][~others])
    return result


@torch.no_grad()
def _through_pipeline(chunk: VisionLanguageModel, batch: PackedBatch, ctx: ParallelContext) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(hidden states after this stage, losses on the last)."""
    width = chunk.config.hidden_size
    hidden = torch.zeros(batch.num_tokens, 1, width)
    if not ctx.is_first_stage:
        dist.recv(hidden, group=ctx.pipeline_group, group_src=ctx.pipeline_rank - 1)
        chunk.set_input_tensor(hidden)
    out = chunk.transform(batch, chunk.packing(batch))
    if not ctx.is_last_stage:
        dist.send(out.contiguous(), group=ctx.pipeline_group, group_dst=ctx.pipeline_rank + 1)
        return out, None
    if not ctx.is_first_stage:
        chunk.set_input_tensor(hidden)
    return out, chunk(batch).loss_Q


@pytest.mark.parametrize("segment", range(4))
@pytest.mark.parametrize(("parallel", "world_size"), [({}, 1), ({"pipeline": 2}, 2), ({"pipeline": 4}, 4), ({"tensor": 2}, 2)])
def test_perturbing_one_sample_leaves_the_others_bit_identical(
    parallel: dict[str, Any], world_size: int, segment: int, pool: RankPool
) -> None:
    results = pool.run(isolation, parallel, segment, world_size=world_size)
    assert {r["stage"] for r in results} == set(range(parallel.get("pipeline", 1)))
    for result in results:
        assert result["own_changed"], "the perturbation must reach its own sample, or this test proves nothing"
        assert result["others_equal"], f"stage {result['stage']}: another sample's hidden states changed"
    assert all(r.get("other_losses_equal", True) and r.get("own_loss_changed", True) for r in results)


def leaking_control() -> bool:
    """The same perturbation with the segment bounds forgotten: later samples must change."""
    model = model_config("clip")
    (vlm,), _ = build(model)
    batch = tiny_batch(model, images_per_sample=(1, 0, 2, 0), text_tokens=(9, 14, 6, 5), seq_len_tokens=96)
    language, length = model.language, batch.segment_lengths[0]

    def hidden(b: PackedBatch) -> torch.Tensor:
        tables = rotary_tables(language, b.positions_S, torch.float32)
        one_segment = pack([b.num_tokens], b.tokens_S.device, causal=True, rotary=tables)
        return vlm.transform(b, one_segment)

    with torch.no_grad():
        before, after = hidden(batch), hidden(perturbed(batch, 0, model.visual_tokens_per_tile))
    return not torch.equal(before[length:], after[length:])


def test_forgotten_segment_bounds_would_be_seen(pool: RankPool) -> None:
    assert pool.run(leaking_control)[0]
