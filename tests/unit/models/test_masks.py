"""Masks against those that transformers makes of the same sequences, for every way that a pack is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import pytest
import torch

from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.models.layers.attention import attend_packed
from megavlm.models.layers.masks import Bidirectional, Groups, groups_of
from megavlm.models.layers.packing import Packing, pack
from megavlm.topology.context import ContextLayout, ContextSplit, context_layout
from megavlm_kernels.packed_attention import sdpa

LENGTHS = [11, 1, 7, 14, 7]
PADDING = 3
"""This segment is no sample."""
TARGETS = [6, 7, 9, 15, 17, 36, 39]
PICTURES = [2, 3, 4, 8, 9, 10, 12, 13, 21, 33, 34]
"""A picture at the end of a segment, one at the start of the next but one, and none in the last rows."""
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()


def groups(kind: Bidirectional) -> Groups | None:
    targets = torch.tensor(TARGETS)
    segments = torch.bucketize(targets, torch.tensor(BOUNDS[1:]), right=True)
    return groups_of(kind, LENGTHS, [i != PADDING for i in range(len(LENGTHS))], targets, segments, torch.tensor(PICTURES))


def packing(kind: Bidirectional, context: tuple[ContextLayout, int] | None = None) -> Packing:
    return pack(LENGTHS, torch.device("cpu"), causal=True, context=context, groups=groups(kind))


def theirs(kind: Bidirectional, window: int | None, segment: int) -> torch.Tensor:
    """transformers' mask of one sample, by the functions that its Gemma and PaliGemma call."""
    quiet_transformers()
    from transformers import Gemma2Config, masking_utils
    from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

    start, end = BOUNDS[segment], BOUNDS[segment + 1]
    config = Gemma2Config(sliding_window=window or 99)
    config._attn_implementation = "sdpa"
    arguments: dict[str, Any] = {"config": config, "inputs_embeds": torch.zeros(1, end - start, 4), "attention_mask": None}
    arguments |= {"past_key_values": None, "position_ids": torch.arange(end - start)[None]}
    rows = torch.arange(start, end)
    if kind == "pictures":
        blocks = get_block_sequence_ids_for_mask(torch.isin(rows, torch.tensor(PICTURES)).long()[None])
        mask = create_masks_for_vision_model(**arguments, block_sequence_ids=blocks)["sliding_attention" if window else "full_attention"]
    else:
        if kind == "prefix" and segment != PADDING:
            first = min([t for t in TARGETS if start <= t < end], default=end)
            arguments["block_sequence_ids"] = torch.where(rows <= first, 0, -1)[None]  # token_type_ids 0: image, prompt
        make = masking_utils.create_sliding_window_causal_mask if window else masking_utils.create_causal_mask
        mask = make(**arguments, allow_is_causal_skip=False)
    return mask[0, 0]


@pytest.mark.parametrize("window", [None, 1, 3, 6, 50])
@pytest.mark.parametrize("kind", ["none", "prefix", "pictures"])
def test_masks_are_those_of_transformers(kind: Bidirectional, window: int | None) -> None:
    layouts = [context_layout(tuple(LENGTHS), split, size) for split in get_args(ContextSplit) for size in (2, 4)]
    for layout in (None, *layouts):
        found = torch.zeros(sum(LENGTHS), sum(LENGTHS), dtype=torch.bool)
        for rank in range(layout.size if layout else 1):
            packed = packing(kind, (layout, rank) if layout else None)
            for piece in packed.pieces:
                assert packed.masks is not None
                mask = packed.masks.mask(piece, window)
                assert packed.masks.mask(piece, window) is mask, "layers with the same window share a mask"
                rows = slice(piece.query_row, piece.query_row + piece.query_length)
                first_key = piece.key_start if piece.key_row is None else piece.key_row
                found[rows, first_key : first_key + piece.key_length] |= mask
        for segment, (start, end) in enumerate(pairwise(BOUNDS)):
            assert torch.equal(found[start:end, start:end], theirs(kind, window, segment)), (layout, segment)
            assert not found[start:end, :start].any() and not found[start:end, end:].any()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", ["none", "prefix", "pictures"])
@pytest.mark.parametrize("lengths", [LENGTHS, [6, 6, 6]])
def test_attention_is_the_masked_formula(kind: Bidirectional, window: int | None, softcap: float | None, lengths: list[int]) -> None:
    """Every fast path computes what one masked softmax over the whole pack computes, in fp64, gradients too."""
    generator = torch.Generator().manual_seed(3)
    rows = sum(lengths)
    inputs = [torch.randn(rows, heads, 8, generator=generator, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    group = groups(kind) if lengths == LENGTHS else None
    packed = pack(lengths, torch.device("cpu"), causal=True, groups=group)
    got = attend_packed(*inputs, packed, causal=True, scale=0.7, window=window, softcap=softcap)
    visible = torch.zeros(rows, rows, dtype=torch.bool)
    for piece in packed.pieces:
        assert packed.masks is not None
        own = slice(piece.query_row, piece.query_row + piece.query_length)
        visible[own, piece.key_start : piece.key_start + piece.key_length] = packed.masks.mask(piece, window)
    query, key, value = inputs[0], *(x.repeat_interleave(2, 1) for x in inputs[1:])
    scores = torch.einsum("qhk,shk->hqs", query, key) * 0.7
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    want = torch.einsum("hqs,shk->qhk", scores.masked_fill(~visible, float("-inf")).softmax(-1), value)
    assert torch.allclose(got, want, atol=1e-12)
    upstream = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    for ours, theirs_ in zip(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True):
        assert torch.allclose(ours, theirs_, atol=1e-11)


@pytest.mark.parametrize("kind", ["none", "prefix"])
def test_capped_scores_some_at_a_time(kind: Bidirectional, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, found = torch.Generator().manual_seed(5), []
    inputs = [torch.randn(sum(LENGTHS), heads, 8, generator=generator, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn(sum(LENGTHS), 4, 8, generator=generator, dtype=torch.float64)
    for limit in (sdpa.SCORES_AT_A_TIME, 150, 1):
        monkeypatch.setattr(sdpa, "SCORES_AT_A_TIME", limit)
        out = attend_packed(*inputs, packing(kind), causal=True, scale=0.7, window=5, softcap=2.0)
        found.append((out.detach(), *torch.autograd.grad(out, inputs, upstream)))
        with torch.no_grad():
            assert torch.equal(attend_packed(*inputs, packing(kind), causal=True, scale=0.7, window=5, softcap=2.0), out)
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert torch.allclose(got, want, atol=1e-12)


def test_nothing_special_needs_no_mask() -> None:
    """Plain causal packs build no masks, nor do windows that are longer than every segment."""
    for lengths in (LENGTHS, [6, 6, 6]):
        packed = pack(lengths, torch.device("cpu"), causal=True)
        x = torch.zeros(sum(lengths), 2, 8)
        attend_packed(x, x, x, packed, causal=True, scale=1.0)
        attend_packed(x, x, x, packed, causal=True, scale=1.0, window=14)
        assert packed.masks is not None and not packed.masks._built


def test_pictures_without_a_placeholder_are_no_groups() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert groups_of("pictures", [3, 2], [True, True], none, none, none) is None
