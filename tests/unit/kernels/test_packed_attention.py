"""Block-diagonal attention against one masked softmax over the whole pack, and its CUDA backends' arguments against kernels that do as
FlashAttention's documentation says."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megavlm_kernels.packed_attention import BackendError, Segments, packed_attention
from megavlm_kernels.packed_attention.backends import KERNELS, run_packed
from megavlm_kernels.packed_attention.reference import packed_attention_reference
from megavlm_kernels.testing.tolerance import errors_against_truth, forward_and_gradients

LENGTHS = [5, 0, 1, 12, 7, 1, 0]
"""Empty segments, also the last, and segments of one token."""
EQUAL = [6, 6, 6]
LATER = Segments((3, 4, 2), (9, 4, 13), (0, 9, 0))
"""Queries from the middle of segments, as under context parallelism: the last ones see keys that the first ones see too."""


def inputs(segments: Segments, width: int = 8, groups: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    keys = sum(segments.key_lengths) if segments.key_starts is None else 13
    rows = [(sum(segments.query_lengths), 4), (keys, groups), (keys, groups)]
    made = [torch.randn(n, heads, width, generator=generator, dtype=torch.float64) for n, heads in rows]
    return [x.to(dtype).requires_grad_() for x in made]


def upstream_of(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 1), (True, 4), (True, 50)])
@pytest.mark.parametrize("segments", [Segments.of(LENGTHS), Segments.of(EQUAL), LATER, Segments((2, 2), (3, 5)), Segments.of([0])])
def test_is_the_masked_softmax(segments: Segments, causal: bool, window: int | None, softcap: float | None) -> None:
    options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "scale": 0.6}
    x = inputs(segments)
    upstream = upstream_of(x[0])
    got = forward_and_gradients(lambda *a: packed_attention(*a, segments, **options), x, upstream)
    want = forward_and_gradients(lambda *a: packed_attention_reference(*a, segments, **options), x, upstream)
    for ours, truth in zip(got, want, strict=True):
        assert torch.allclose(ours, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "groups"), [(5, 4), (7, 1), (72, 2), (128, 4)])
def test_any_head_width_and_format(width: int, groups: int, dtype: torch.dtype) -> None:
    segments = Segments.of(LENGTHS)
    rounded = inputs(segments, width, groups, dtype)
    exact = [x.detach().double().requires_grad_() for x in rounded]
    upstream = upstream_of(exact[0])
    truth = forward_and_gradients(lambda *a: packed_attention_reference(*a, segments, causal=True), exact, upstream)
    eager = forward_and_gradients(lambda *a: packed_attention_reference(*a, segments, causal=True), rounded, upstream)
    got = forward_and_gradients(lambda *a: packed_attention(*a, segments, causal=True), rounded, upstream)
    assert not errors_against_truth(got, eager, truth, ["out", "query", "key", "value"])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, EQUAL])
def test_other_segments_do_not_change_by_a_bit(lengths: list[int], window: int | None, softcap: float | None) -> None:
    segments = Segments.of(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    x = inputs(segments, dtype=torch.float32)
    upstream = upstream_of(x[0])

    def run(*a: torch.Tensor) -> torch.Tensor:
        return packed_attention(*a, segments, causal=True, window=window, softcap=softcap)

    before = forward_and_gradients(run, x, upstream)
    for start, end in pairwise(bounds):
        if start == end:
            continue
        other = [y.detach().clone() for y in x]
        for y in other:
            y[start:end] = torch.nan
        after = forward_and_gradients(run, [y.requires_grad_() for y in other], upstream)
        for old, new in zip(before, after, strict=True):
            assert new[start:end].isnan().any(), "the segment's own rows do change"
            assert torch.equal(old[:start], new[:start]) and torch.equal(old[end:], new[end:])


def by_segment(x: list[torch.Tensor], lengths: list[int], causal: bool, scale: float | None) -> torch.Tensor:
    """A call of torch's attention a segment, and a concatenation."""
    split = [[part.transpose(0, 1).unsqueeze(0) for part in y.split(lengths)] for y in x]
    options: dict[str, Any] = {"is_causal": causal, "enable_gqa": True, "scale": scale}
    return torch.cat([scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)[0] for q, k, v in zip(*split, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("causal", "scale", "groups"), [(True, None, 2), (False, 0.3, 4), (True, 0.3, 1)])
def test_is_a_call_a_segment_to_the_bit(causal: bool, scale: float | None, groups: int, dtype: torch.dtype) -> None:
    lengths = [5, 1, 70, 7]
    x = inputs(Segments.of(lengths), 16, groups, dtype)
    upstream = upstream_of(x[0])
    got = forward_and_gradients(lambda *a: packed_attention(*a, Segments.of(lengths), causal=causal, scale=scale), x, upstream)
    want = forward_and_gradients(lambda *a: by_segment([*a], lengths, causal, scale), x, upstream)
    assert all(torch.equal(ours, torchs) for ours, torchs in zip(got, want, strict=True))


def test_the_result_is_kept_once() -> None:
    """Between the passes there are query, key, value, the result that the caller gets, and a number a row and head."""
    segments = Segments.of([5, 12, 7])
    x = inputs(segments)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = packed_attention(*x, segments, causal=True)
    theirs = {tensor.data_ptr() for tensor in [*x, out]}
    assert theirs <= {tensor.data_ptr() for tensor in kept}
    assert sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in theirs) == 24 * 4


def test_masks_of_segments() -> None:
    """A prefix whose rows see each other both ways, in one segment of three."""
    visible = torch.ones(12, 12, dtype=torch.bool).tril() | (torch.arange(12) < 5)[None, :] & (torch.arange(12) < 5)[:, None]
    plain = Segments.of([5, 12, 1])
    segments = Segments.of([5, 12, 1])
    segments.masked, segments.masks = frozenset({1}), lambda i, window: visible if i == 1 else plain.mask(i, window, visible.device)
    x = inputs(segments)
    want = packed_attention_reference(*x, segments, causal=True)
    assert not torch.allclose(want, packed_attention_reference(*x, plain, causal=True))
    assert torch.allclose(packed_attention(*x, segments, causal=True), want, rtol=0, atol=1e-12)


def test_what_is_wrong_is_told() -> None:
    x = inputs(Segments.of([4, 3]))
    with pytest.raises(ValueError, match="segments of 8 queries and 8 keys, but 7 rows of queries"):
        packed_attention(*x, Segments.of([4, 4]), causal=True)
    with pytest.raises(ValueError, match="more queries than keys"):
        packed_attention(*x, Segments((4, 3), (3, 4)), causal=True)
    with pytest.raises(ValueError, match="windows and masks are for causal attention"):
        packed_attention(*x, Segments.of([4, 3]), causal=False, window=2)
    with pytest.raises(BackendError, match="varlen cannot run here: its kernels compute in bf16 and fp16, not fp64"):
        packed_attention(*x, Segments.of([4, 3]), causal=True, backend="varlen")
    with pytest.raises(BackendError, match="flash_attn cannot run here: it needs a CUDA device"):
        packed_attention(*(y.bfloat16() for y in x), Segments.of([4, 3]), causal=True, backend="flash_attn")


# ---------------------------------------------------------------------------------------------------------------- CUDA backends


def documented(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, scale: float, causal: bool, sides: tuple[int, int], softcap: float) -> Any:
    """flash_attn_varlen_func by its documentation, in plain torch: the last query of a segment is aligned to its last key; a query at
    i sees keys from i + keys - queries - before to i + keys - queries + after, -1 is no limit."""
    assert q.shape[-1] % 8 == 0 and cu_q.dtype == cu_k.dtype == torch.int32
    outputs = []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert b > a or d > c, "no kernel is asked about a segment without a row"
        own = Segments((b - a,), (d - c,))
        row = torch.arange(d - c - (b - a), d - c)[:, None]
        key = torch.arange(d - c)[None]
        before, after = sides[0], 0 if causal else sides[1]
        sees = torch.ones(b - a, d - c, dtype=torch.bool)
        sees &= (key >= row - before) if before >= 0 else True
        sees &= (key <= row + after) if after >= 0 else True
        own.masked, own.masks = frozenset({0}), lambda i, window, sees=sees: sees
        outputs.append(packed_attention_reference(q[a:b], k[c:d], v[c:d], own, causal=True, scale=scale, softcap=softcap or None))
    return torch.cat(outputs)


class DotProduct:
    """Transformer Engine's DotProductAttention by its documentation: padding masks go by segment, causal ones are aligned at the start
    unless they say bottom_right; out comes (rows, heads x width)."""

    def __init__(self, *, num_attention_heads: int, kv_channels: int, num_gqa_groups: int, softmax_scale: float, **options: Any) -> None:
        assert options == {"attention_dropout": 0.0, "qkv_format": "thd", "attn_mask_type": "padding_causal"}
        self.shape, self.scale = (num_attention_heads, num_gqa_groups, kv_channels), softmax_scale

    def __call__(self, q: Any, k: Any, v: Any, *, qkv_format: str, attn_mask_type: str, window_size: tuple[int, int], **o: Any) -> Any:
        assert qkv_format == "thd" and (q.shape[1], k.shape[1], q.shape[2]) == self.shape
        cu_q, cu_k = o["cu_seqlens_q"], o["cu_seqlens_kv"]
        assert o["max_seqlen_q"] == int(cu_q.diff().max()) and o["max_seqlen_kv"] == int(cu_k.diff().max())
        causal = attn_mask_type != "padding"
        assert attn_mask_type.endswith("bottom_right") or not causal or torch.equal(cu_q, cu_k)
        return documented(q, k, v, cu_q, cu_k, self.scale, causal, window_size, 0.0).flatten(1)


def fake(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Put a module with the backend's interface where it would be imported from."""

    def flash(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, softmax_scale: Any = None, causal: bool = False, **o: Any
    ) -> Any:
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        out = documented(q, k, v, cu_q, cu_k, softmax_scale, causal, o.pop("window_size"), o.pop("softcap", 0.0))
        assert not o
        return (out, None) if backend == "flash_attn_3" else out

    def varlen(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, scale: Any, window_size: Any, enable_gqa: bool = False
    ) -> Any:
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return documented(q, k, v, cu_q, cu_k, scale, window_size == (-1, 0), window_size, 0.0)

    path, name, what = {
        "varlen": ("torch.nn.attention.varlen", "varlen_attn", varlen),
        "flash_attn_2": ("flash_attn", "flash_attn_varlen_func", flash),
        "flash_attn_3": ("flash_attn_interface", "flash_attn_varlen_func", flash),
        "transformer_engine": ("transformer_engine.pytorch", "DotProductAttention", DotProduct),
    }[backend]
    module = ModuleType(path)
    setattr(module, name, what)
    monkeypatch.setitem(sys.modules, path, module)
    if backend == "transformer_engine":
        monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 1), (True, 4)])
@pytest.mark.parametrize("segments", [Segments.of(LENGTHS), LATER, Segments((2, 2), (3, 5))])
@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.parametrize("backend", sorted(KERNELS))
def test_arguments_of_the_cuda_backends(
    backend: str, width: int, segments: Segments, causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds, windows, shared keys and filled-up heads, as each backend's documentation has them, gradients too."""
    fake(monkeypatch, backend)
    for softcap in (None, 2.0) if backend.startswith("flash") else (None,):
        options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "scale": 0.6}
        x = inputs(segments, width)
        upstream = upstream_of(x[0])
        got = forward_and_gradients(lambda *a, o=options: run_packed(KERNELS[backend], *a, segments, **o), x, upstream)
        want = forward_and_gradients(lambda *a, o=options: packed_attention_reference(*a, segments, **o), x, upstream)
        for ours, truth in zip(got, want, strict=True):
            assert torch.allclose(ours, truth, rtol=0, atol=1e-12)


def test_torchs_varlen_takes_these_arguments() -> None:
    """The real function's names, where there is no GPU to call it on."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(names)
