"""An imported model gives the Hugging Face model's logits, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavlm.checkpoint.hf import config_from_hf, load_hf
from megavlm.config.schema import ParallelConfig
from megavlm.data.types import PackedBatch
from megavlm.parallel.context import enter_grid
from megavlm.testing.hf_models import Kind, hf_logits, make_hf
from megavlm.testing.pool import RankPool
from megavlm.testing.tiny import tiny_batch, tiny_chunks

KINDS = [
    Kind(),
    Kind(layer=-1, tie=True),
    Kind(select="full", text="qwen2"),
    Kind(text="qwen2", tie=True, layer=-1),
    Kind("siglip", select="full"),
    Kind("siglip", "qwen2", select="full", tie=True, layer=-1),
    Kind("siglip", "llama", select="full", layer=2, use_head=False),
    Kind(text="qwen3"),
]
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
]


def batches(model: Any) -> list[PackedBatch]:
    """Text alone, one image, several images, and a pack of unequal samples; even lengths for sequence parallelism."""
    return [
        tiny_batch(model, images_per_sample=(0,), text_tokens=(14,)),
        tiny_batch(model, images_per_sample=(1,), text_tokens=(9,), seed=1, seq_len_tokens=28),
        tiny_batch(model, images_per_sample=(3,), text_tokens=(9,), seed=2, seq_len_tokens=64),
        tiny_batch(model, images_per_sample=(1, 0, 2, 0), text_tokens=(9, 21, 6, 5), seed=3, seq_len_tokens=100),
    ]


def rank_logits(folder: Path, layout: dict[str, Any]) -> list[torch.Tensor] | None:
    """Logits of every batch, on the ranks of the last pipeline stage."""
    model, parallel = config_from_hf(folder), ParallelConfig(**layout)
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    chunks: Any = tiny_chunks(model, ctx, parallel)
    load_hf(chunks, folder, model, ctx)
    out = []
    with torch.no_grad():
        for batch in batches(model):
            out.append(_forward(chunks, batch, ctx))
    return out if ctx.is_last_stage else None


def _forward(chunks: Any, batch: PackedBatch, ctx: Any) -> torch.Tensor | None:
    rows = batch.num_tokens // (ctx.grid.tensor if chunks[0].config.sequence_parallel else 1)
    hidden = None
    for chunk in chunks:
        for stage in range(ctx.grid.pipeline):
            source = dist.get_global_rank(ctx.pipeline_group, (stage - 1) % ctx.grid.pipeline)
            following = dist.get_global_rank(ctx.pipeline_group, (stage + 1) % ctx.grid.pipeline)
            if stage != ctx.pipeline_rank:
                continue
            if not chunk.pre_process:
                received = torch.empty(rows, 1, chunk.config.hidden_size)
                dist.recv(received, source)
                chunk.set_input_tensor(received)
            hidden = chunk.transform(batch, chunk.packing(batch))
            if not chunk.post_process:
                dist.send(hidden, following)
    return chunks[-1].language.logits(hidden) if chunks[-1].post_process else None


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[torch.Tensor]]]:
    """Folder and reference logits of every kind."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind.name)
        hf = make_hf(kind, folder)
        model = config_from_hf(folder)
        made[kind.name] = (folder, [hf_logits(hf, b, model.vision) for b in batches(model)])
    return made


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_logits_equal_hugging_face(pool: RankPool, oracles: dict[str, Any], kind: Kind) -> None:
    folder, expected = oracles[kind.name]
    for world_size, layout in LAYOUTS:
        results = pool.run(rank_logits, folder, layout, world_size=world_size)
        for ours in [r for r in results if r is not None]:
            for got, want in zip(ours, expected, strict=True):
                assert (got[: len(want)] - want).abs().max() <= 1e-4 * max(1.0, want.abs().max().item()), layout
