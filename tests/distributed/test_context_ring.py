"""Transformer Engine's context parallelism gets what it documents: rows, bounds, pads and groups; and its undefined rows go nowhere.

There is no GPU here. What stands in for Transformer Engine is written from its documentation alone (the layout of rows in
context_parallel.py, the meaning of `cu_seqlens_q` and `cu_seqlens_q_padded` in dot_product_attention.py): it puts the padded sequence
together from all ranks' rows, computes attention of the real rows directly, and leaves NaN in the rows of pads, forward and backward. The
kernels themselves are compared in tests/gpu.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megavlm.models.layers import attention
from megavlm.testing.pool import RankPool
from megavlm_kernels.context_attention import CommError
from megavlm_kernels.packed_attention import Machine
from tests.distributed.test_context_parallel import CASES, Found, assert_same, losses_and_gradients

HOPPER = Machine("cuda", (9, 0), transformer_engine=(2, 18))
CALLS: list[dict[str, Any]] = []


class DocumentedAttention:
    """Arguments of Transformer Engine's DotProductAttention (2.18) that matter here; others are refused by Python."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int,
        attention_dropout: float,
        qkv_format: str,
        attn_mask_type: str,
        cp_group: dist.ProcessGroup,
        cp_global_ranks: list[int],
        cp_stream: object,
        cp_comm_type: str,
        softmax_scale: float,
    ) -> None:
        assert attention_dropout == 0.0 and (qkv_format, attn_mask_type) == ("thd", "padding_causal")
        assert cp_global_ranks == dist.get_process_group_ranks(cp_group)
        self.shape = (num_attention_heads, num_gqa_groups, kv_channels)
        self.group, self.scale, self.comm = cp_group, softmax_scale, cp_comm_type

    def __call__(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: None = None,
        *,
        qkv_format: str,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_kv: torch.Tensor,
        cu_seqlens_q_padded: torch.Tensor,
        cu_seqlens_kv_padded: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        attn_mask_type: str,
        window_size: tuple[int, int],
        pad_between_seqs: bool,
    ) -> torch.Tensor:
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
        assert all(x.dtype == torch.int32 for x in (cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded))
        assert cu_seqlens_kv is cu_seqlens_q and cu_seqlens_kv_padded is cu_seqlens_q_padded
        assert pad_between_seqs == (not torch.equal(cu_seqlens_q, cu_seqlens_q_padded))
        assert self.comm != "p2p" or window_size == (-1, 0), "no sliding window in the ring"
        heads, groups, width = self.shape
        assert query_layer.shape[1:] == (heads, width) and key_layer.shape[1:] == value_layer.shape[1:] == (groups, width)
        assert all(x.is_contiguous() for x in (query_layer, key_layer, value_layer))
        real, padded = cu_seqlens_q.tolist(), cu_seqlens_q_padded.tolist()
        ranks, rank = self.group.size(), self.group.rank()
        assert max_seqlen_q == max_seqlen_kv == max(b - a for a, b in pairwise(padded))
        assert query_layer.shape[0] * ranks == padded[-1]
        rows = [self._rows(padded, number, ranks) for number in range(ranks)]
        order = torch.argsort(torch.tensor([row for own in rows for row in own]))
        is_real = torch.zeros(padded[-1], dtype=torch.bool)
        mask = torch.zeros(padded[-1], padded[-1], dtype=torch.bool)
        for (start, _), (low, high) in zip(pairwise(padded), pairwise(real), strict=True):
            own = slice(start, start + high - low)
            is_real[own] = True
            mask[own, own] = (
                torch.ones(high - low, high - low, dtype=torch.bool).tril().triu(-window_size[0] if window_size[0] >= 0 else -high)
            )
        pads = ~is_real[rows[rank]]
        query, key, value = (_undefined_gradient(x, pads) for x in (query_layer, key_layer, value_layer))
        key, value = (gather_from_sequence_parallel_region(x, group=self.group)[order] for x in (key, value))
        key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
        scores = torch.einsum("qhk,shk->hqs", query, key) * self.scale
        weights = scores.masked_fill(~mask[rows[rank]], float("-inf")).softmax(-1).nan_to_num(0.0)
        out = torch.einsum("hqs,shk->qhk", weights, value)
        CALLS.append({"comm": self.comm, "pads": pad_between_seqs, "window": window_size})
        return out.masked_fill(pads[:, None, None], float("nan")).flatten(1)

    @staticmethod
    def _rows(padded: list[int], rank: int, ranks: int) -> list[int]:
        found: list[int] = []
        for start, end in pairwise(padded):
            chunk, rest = divmod(end - start, 2 * ranks)
            assert rest == 0, "each sequence must be padded to a multiple of 2 x context ranks"
            for number in (rank, 2 * ranks - 1 - rank):
                found += range(start + number * chunk, start + (number + 1) * chunk)
        return found


class _Undefined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pads: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(pads)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad.masked_fill(ctx.saved_tensors[0][:, None, None], float("nan")), None


def _undefined_gradient(x: torch.Tensor, pads: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _Undefined.apply(x, pads)
    return found


@contextmanager
def a_hopper_with_transformer_engine() -> Iterator[None]:
    """Selection sees a GPU that takes the tests' fp32 for bf16."""
    package, module = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    module.DotProductAttention = DocumentedAttention  # type: ignore[attr-defined]
    with (
        patch.dict(sys.modules, {"transformer_engine": package, "transformer_engine.pytorch": module}),
        patch.object(attention, "machine_of", lambda *_: HOPPER),
        patch.dict(attention.DTYPE_NAMES, {torch.float32: "bf16"}),
        patch.object(attention.PackedAttention, "_check_backend", lambda *_, **__: None),
    ):
        yield


RINGED = (
    "tiles and padding",
    "no pads",
    "one segment",
    "one row",
    "shorter than 2 x context",
    "padding alone on some ranks",
    "M-RoPE and DeepStack",
    "cross-attention, Mllama",
    "encoders side by side",
)
BROUGHT = ("prefix, window, soft-cap", "pictures seen both ways")


def through_transformer_engine(parallel: dict[str, Any], names: tuple[str, ...]) -> tuple[dict[str, Found], list[dict[str, Any]]]:
    CALLS.clear()
    with a_hopper_with_transformer_engine():
        found = losses_and_gradients({"context": dist.get_world_size(), "context_split": "zigzag"} | parallel, names)
    return found, list(CALLS)


@pytest.fixture(scope="module")
def one_rank(pool: RankPool) -> dict[str, Found]:
    found: dict[str, Found] = pool.run(losses_and_gradients, {}, RINGED + BROUGHT)[0]
    return found


@pytest.mark.parametrize(("comm", "size"), [("auto", 2), ("p2p", 2), ("all_gather", 2), ("a2a", 2), ("p2p", 4)])
def test_losses_and_gradients_are_those_of_one_rank(comm: str, size: int, pool: RankPool, one_rank: dict[str, Found]) -> None:
    results = pool.run(through_transformer_engine, {"context_comm": comm}, RINGED, world_size=size)
    for name in RINGED:
        assert_same(results[0][0][name], one_rank[name])
    for _, calls in results:
        assert {call["comm"] for call in calls} == {"p2p" if comm == "auto" else comm}
        assert {call["pads"] for call in calls} == {True, False}, "the matrix has packs with pads and without"


def test_auto_brings_keys_to_what_transformer_engine_cannot(pool: RankPool, one_rank: dict[str, Found]) -> None:
    found, calls = pool.run(through_transformer_engine, {"context_comm": "auto"}, BROUGHT, world_size=2)[0]
    assert not calls, "rows that see each other both ways need masks"
    for name in BROUGHT:
        assert_same(found[name], one_rank[name])


def refusal(parallel: dict[str, Any], name: str) -> str:
    with a_hopper_with_transformer_engine():
        try:
            losses_and_gradients({"context": 2, "context_split": "zigzag"} | parallel, (name,))
        except CommError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("parallel", "case", "message"),
    [
        ({"context_comm": "p2p"}, "prefix, window, soft-cap", "p2p cannot be: it is Transformer Engine's, and its kernels take no mask"),
        ({"context_comm": "p2p", "context_split": "pack"}, "one segment", "wants parallel.context_split=zigzag, not pack"),
        ({"context_comm": "a2a", "context_split": "contiguous"}, "one segment", "wants parallel.context_split=zigzag, not contiguous"),
    ],
)
def test_what_cannot_be_is_refused(parallel: dict[str, Any], case: str, message: str, pool: RankPool) -> None:
    for found in pool.run(refusal, parallel, case, world_size=2):
        assert message in found and "Set it to auto or keys" in found


def test_a_cpu_refuses_the_ring(pool: RankPool) -> None:
    def on_this_machine() -> str:
        try:
            losses_and_gradients({"context": 2, "context_split": "zigzag", "context_comm": "p2p"}, ("one segment",))
        except CommError as error:
            return str(error)
        return ""

    assert all("parallel.context_comm=p2p cannot be" in found for found in pool.run(on_this_machine, world_size=2))


def test_cases_are_named_right() -> None:
    assert set(RINGED + BROUGHT) <= set(CASES)
