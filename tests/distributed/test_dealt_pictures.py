"""Pictures dealt to the ranks of a microbatch: every kind of encoder and projector, few pictures, none; what is sent, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megavlm.config.schema import ParallelConfig, PrecisionConfig
from megavlm.models.init import initialise
from megavlm.models.vision.distributed import DealtPictures
from megavlm.parallel import encoder_layout
from megavlm.parallel.context import ParallelContext, enter_grid
from megavlm.parallel.encoder_layout import RowLayout, gather_rows, shared_gradient
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.tiny import tiny_batch, tiny_chunks, tiny_model_config, tiny_native_batch
from tests.distributed.test_cross_attention import CANVAS, MLLAMA, train_with_open_gates
from tests.distributed.test_layouts import PICTURES, first_plans
from tests.distributed.test_native_layouts import MODELS as NATIVE
from tests.distributed.test_qformer_layouts import INSTRUCTED, words
from tests.distributed.test_qformer_layouts import MODEL as QFORMER
from tests.distributed.test_qwen_layouts import MODEL as QWEN
from tests.distributed.test_side_by_side import BESIDE

__all__ = ["words"]

IN_THEIR_SIZE: dict[str, Any] = {"image": {"policy": "native"}}
STRETCHED = {"image": {"policy": "native", "whole_patches": "stretch", "longest_edge_px": 40}}
KINDS: dict[str, dict[str, Any]] = {
    "native": PICTURES["native"],
    "anyres, with a learned end of rows": PICTURES["anyres"],
    "windows, DeepStack, M-RoPE": {"model": QWEN, "data": IN_THEIR_SIZE},
    "resampler": {"model": NATIVE["bucketed positions, resampler"], "data": STRETCHED},
    "merging linear layer": {"model": NATIVE["factorised positions, merging linear layer"], "data": STRETCHED},
    "average pool": {"model": {"projector": {"kind": "average_pool", "num_layers": 1, "bias": False, "pixel_shuffle": 2}}},
    "encoders side by side": {"model": {"vision": {"image_size_px": 24}, "vision_beside": [BESIDE | {"patch_size_px": 8}]}},
    "canvas, read by cross-attention": CANVAS | {"model": CANVAS["model"] | {"language": {"cross_attention": MLLAMA}}},
    "Q-Former with instructions": {"model": QFORMER | {"projector": QFORMER["projector"] | {"qformer": INSTRUCTED}}},
}
GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2xCP2": (4, {"tensor": 2, "context": 2}),
    "TP2+SPxPP2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
}
# One grid for most; both where features take other ways into the LLM.
RUNS = [
    *((kind, "TP2xCP2") for kind in KINDS),
    ("windows, DeepStack, M-RoPE", "TP2+SPxPP2"),
    ("canvas, read by cross-attention", "TP2+SPxPP2"),
]
DEALT: dict[str, Any] = {"encoder_data_parallel": True}


def train(
    pool: RankPool, folder: Path, data_dir: Path, size: int, kind: str, words: Path, parallel: dict[str, Any]
) -> list[dict[str, Any]]:
    blocks = KINDS[kind]
    data = dict(blocks.get("data", {})) | ({"instruction_tokenizer": str(words)} if "instructions" in kind else {})
    recipe = tiny_recipe(folder, data_dir, [tiny_stage(steps=2)], model=blocks["model"], data=data, parallel=parallel)
    records: list[dict[str, Any]] = pool.run(train_with_open_gates, recipe, world_size=size)[0]
    return records


@pytest.fixture(scope="module")
def one_rank(pool: RankPool, data_dir: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    base = tmp_path_factory.mktemp("dealt")
    return {kind: train(pool, base / str(i), data_dir, 1, kind, words, {}) for i, kind in enumerate(KINDS)}


@pytest.mark.parametrize(("kind", "grid"), RUNS)
def test_every_kind(
    kind: str, grid: str, pool: RankPool, data_dir: Path, words: Path, tmp_path: Path, one_rank: dict[str, list[dict[str, Any]]]
) -> None:
    size, parallel = GRIDS[grid]
    assert_same_records(train(pool, tmp_path, data_dir, size, kind, words, parallel | DEALT), one_rank[kind])


SPARSE = tiny_stage(steps=4) | {"mixture": {"pages": 0.06, "text": 0.94}}
OVERLAP = {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}


SHARED: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2, **OVERLAP},
    "context": {"context": 2, **OVERLAP},
    "tensor, ZeRO-2": {"tensor": 2, "zero": 2},
    "tensor, ZeRO-3": {"tensor": 2, "zero": 3},
    "context, ZeRO-3": {"context": 2, "zero": 3},
}


def test_few_pictures_or_none(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Microbatches with fewer pictures than ranks, with none, on one data rank only; gradients reduced while they are computed."""
    packs = [pack for plan in first_plans(data_dir, SPARSE, dp_size=2) for rank in plan.assignment for mb in rank for pack in mb]
    assert {pack.num_tiles for pack in packs} >= {0, 1}
    reference = pool.run(train_and_read, tiny_recipe(tmp_path / "one", data_dir, [SPARSE]))[0]
    for name, parallel in SHARED.items():
        recipe = tiny_recipe(tmp_path / name, data_dir, [SPARSE], parallel=parallel | DEALT)
        assert_same_records(pool.run(train_and_read, recipe, world_size=4)[0], reference)


@pytest.mark.parametrize("limit", [1.0, pytest.param(60.0, marks=pytest.mark.slow), 1e9])
def test_auto_changes_no_number(limit: float, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Dealt, partly dealt, never dealt within one step: gradients of both kinds of microbatches add up."""
    stage = tiny_stage(steps=2)
    reference = pool.run(train_and_read, tiny_recipe(tmp_path / "one", data_dir, [stage]))[0]
    auto = {"tensor": 2, "context": 2, "encoder_data_parallel": "auto", "encoder_min_flops_per_byte": limit}
    recipe = tiny_recipe(tmp_path / "four", data_dir, [stage], parallel=auto)
    assert_same_records(pool.run(train_and_read, recipe, world_size=4)[0], reference)


def decisions(parallel: ParallelConfig) -> tuple[list[bool], list[int]]:
    """For batches of 0 to 4 pictures: is it dealt, and how many tiles are kept."""
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    model = tiny_model_config()
    dealt = DealtPictures(model, parallel, ctx, torch.float32)
    batches = [tiny_batch(model, images_per_sample=(n, 0, 0)) for n in range(1, 5)]
    kept = [dealt.keep_own(batch) for batch in batches]
    return [batch.own_pictures is not None for batch in kept], [b.tiles_TCHW.shape[0] for b in kept if b.tiles_TCHW is not None]


def test_only_own_pixels_are_kept_and_auto_decides_alike(pool: RankPool) -> None:
    always = pool.run(decisions, ParallelConfig(tensor=2, **DEALT), world_size=2)
    assert [is_dealt for is_dealt, _ in always] == [[True] * 4] * 2
    assert [sum(counts) for counts in zip(*(tiles for _, tiles in always), strict=True)] == [1, 2, 3, 4]
    assert [tiles for _, tiles in always] == [[1, 1, 2, 2], [0, 1, 1, 2]]
    auto = pool.run(decisions, ParallelConfig(tensor=2, encoder_data_parallel="auto", encoder_min_flops_per_byte=0), world_size=2)
    assert [is_dealt for is_dealt, _ in auto] == [[False, True, True, True]] * 2, "a lone picture spares nobody"
    never = pool.run(decisions, ParallelConfig(tensor=2, encoder_data_parallel="auto", encoder_min_flops_per_byte=1e9), world_size=2)
    assert [tiles for _, tiles in never] == [[1, 2, 3, 4]] * 2


def gathered(shares: list[list[int]], first_rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows 0, 1, ... gathered; the gradient of what this rank gave; the upstream gradient of this rank."""
    ctx = enter_grid(ParallelConfig(tensor=2, context=2), torch.device("cpu"), seed=1)
    layout = RowLayout.of(first_rows, shares, ctx)
    number = dist.get_rank(ctx.microbatch_group)
    whole = torch.arange(float(first_rows[-1]))[:, None].expand(-1, 3)
    own = torch.cat([whole[first_rows[i] : first_rows[i + 1]] for i in shares[number]] or [whole[:0]]).clone().requires_grad_()
    out = gather_rows(own, layout)
    # As the LLM's: alike on tensor ranks, different on context ranks.
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(ctx.context_rank))
    out.backward(upstream)
    assert own.grad is not None
    return out.detach(), own.grad, upstream


def test_rows_come_together_and_gradients_go_back(pool: RankPool) -> None:
    first_rows, shares = [0, 3, 4, 9, 11], [[1, 3], [2], [], [0]]
    results = pool.run(gathered, shares, first_rows, world_size=4)
    total = results[0][2] + results[2][2]
    for rank, (out, gradient, _) in enumerate(results):
        assert torch.equal(out[:, 0], torch.arange(11.0))
        expected = torch.cat([total[first_rows[i] : first_rows[i + 1]] for i in shares[rank]] or [total[:0]])
        torch.testing.assert_close(gradient, expected)


def wrong_count() -> None:
    ctx = enter_grid(ParallelConfig(tensor=2), torch.device("cpu"), seed=1)
    gather_rows(torch.zeros(2, 3), RowLayout.of([0, 3, 6], [[0], [1]], ctx))


def test_other_rows_than_announced_are_refused(pool: RankPool) -> None:
    with pytest.raises(AssertionError, match="2 visual features of this rank's pictures, where the batch says 3"):
        pool.run(wrong_count, world_size=2)


def gradients_of(parallel: ParallelConfig, sabotage: str | None) -> dict[str, torch.Tensor]:
    """Summed gradients of encoder and projector weights of one native batch, as `finalize_gradients` would leave them."""
    ctx: ParallelContext = enter_grid(parallel, torch.device("cpu"), seed=1)
    model = tiny_model_config()
    (chunk,) = tiny_chunks(model, ctx, parallel)
    initialise([chunk], model, 0, ctx)
    batch = tiny_native_batch(model, [[(4, 8), (2, 8)], [], [(4, 4)]], seq_len_tokens=96)
    chunk(chunk.keep_own_pictures(batch)).total.backward()  # type: ignore[operator]
    summed = {id(p) for p in chunk.summed_over_tensor()}  # type: ignore[operator]
    found = {}
    for name, parameter in chunk.named_parameters():
        if name.startswith(("vision.", "projector.")) and parameter.grad is not None:
            gradient = parameter.grad.clone()
            if id(parameter) in summed and sabotage != "no sum over tensor ranks":
                dist.all_reduce(gradient, group=ctx.tensor_group)
            dist.all_reduce(gradient, group=ctx.data_context_group)
            found[name] = gradient
    return found


def test_every_gradient_and_what_a_missing_sum_would_do(pool: RankPool) -> None:
    """Parameter by parameter, not only their norm."""
    expected = pool.run(gradients_of, ParallelConfig(), None)[0]
    assert len(expected) > 20
    for layout, size in ((ParallelConfig(tensor=2, **DEALT), 2), (ParallelConfig(tensor=2, context=2, **DEALT), 4)):
        for found in pool.run(gradients_of, layout, None, world_size=size):
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    broken = pool.run(gradients_of, ParallelConfig(tensor=2, **DEALT), "no sum over tensor ranks", world_size=2)[0]
    name = "vision.patch_embedding.weight"
    assert (broken[name] - expected[name]).norm() > 0.1 * expected[name].norm()


class Chunk(torch.nn.Module):
    """As much of a model chunk as the last step of the reduction asks for."""

    def __init__(self, ctx: ParallelContext) -> None:
        super().__init__()
        self.ctx = ctx
        self.own, self.copy = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
        for parameter in (self.own, self.copy):
            parameter.main_grad = torch.full((3,), float(1 + 2 * ctx.tensor_rank))  # type: ignore[attr-defined]

    def summed_over_tensor(self) -> list[torch.nn.Parameter]:
        return [self.own]

    def copied_over_tensor(self) -> list[torch.nn.Parameter]:
        return [self.copy]


def finalized(deterministic: bool) -> list[float]:
    ctx = enter_grid(ParallelConfig(tensor=2), torch.device("cpu"), seed=1)
    chunk: Any = Chunk(ctx)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with patch.object(encoder_layout, "finalize_model_grads"):
            encoder_layout.finalize_gradients([chunk])
    finally:
        torch.use_deterministic_algorithms(before)
    return [float(chunk.own.main_grad[0]), float(chunk.copy.main_grad[0])]


def test_copies_stay_equal_where_kernels_are_not_deterministic(pool: RankPool) -> None:
    """Gradients 1 and 3: summed where pictures differ; averaged where they are copies, and left alone where copies are equal anyway."""
    assert pool.run(finalized, False, world_size=2) == [[4.0, 2.0]] * 2
    assert pool.run(finalized, True, world_size=2) == [[4.0, 1.0], [4.0, 3.0]]


def halved(_: Any = None) -> torch.Tensor:
    ctx = enter_grid(ParallelConfig(tensor=2), torch.device("cpu"), seed=1)
    x = torch.ones(2, 2, requires_grad=True)
    shared_gradient(x, ctx).sum().backward()
    assert x.grad is not None
    return x.grad


def test_undealt_pictures_count_once(pool: RankPool) -> None:
    assert sum(float(g[0, 0]) for g in pool.run(halved, world_size=2)) == 1.0


def test_precision_of_what_is_sent() -> None:
    """bf16 halves the bytes, and so what dealing must spare."""
    from megavlm.planner.pictures import PictureDealer

    model = tiny_model_config()
    wide, narrow = (PictureDealer(model, 2, dtype.itemsize) for dtype in (torch.float32, torch.bfloat16))
    assert wide.row_bytes == 2 * narrow.row_bytes == 2 * 4 * model.language.hidden_size
    assert PrecisionConfig().dtype == "bf16"
