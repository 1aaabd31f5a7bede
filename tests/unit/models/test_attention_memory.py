"""What attention keeps for its backward pass: queries, keys, values and their result, and not what the three were computed into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megavlm.config.schema import ParallelConfig, PrecisionConfig
from megavlm.models.layers.attention import PackedAttention
from megavlm.models.layers.configs import language_transformer_config
from megavlm.models.layers.packing import Packing, pack
from megavlm.testing.tiny import tiny_model_config

CPU = torch.device("cpu")
LENGTHS = {"segments of one length": (20, 20), "others": (7, 33)}


def qkv_and_parts(rows: int, heads: int, width: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One matrix product's output, and its queries, keys and values as megatron-core splits them."""
    leaf = torch.randn(rows, heads, 3 * width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    qkv = leaf * 1.0
    return qkv, qkv.split(width, dim=-1)


def attention_of(**more: Any) -> tuple[PackedAttention, int, int]:
    model = tiny_model_config(**more)
    config = language_transformer_config(model.language, PrecisionConfig(dtype="fp32"), ParallelConfig(), CPU)
    return PackedAttention(config, 1, AttnMaskType.padding_causal, "self"), config.num_attention_heads, config.kv_channels


def packing_of(lengths: tuple[int, ...], width: int) -> Packing:
    angle_LK = torch.arange(sum(lengths)).float()[:, None] * torch.linspace(0.1, 1.0, width // 2).repeat(2)
    return pack(lengths, CPU, causal=True, rotary={"global": (angle_LK.cos(), angle_LK.sin())})


def keeps(layer: PackedAttention, parts: tuple[torch.Tensor, ...], packing: Packing, whole: torch.Tensor) -> bool:
    """Whether the storage of `whole` is among what autograd keeps."""
    kept: set[int] = set()

    def note(x: torch.Tensor) -> torch.Tensor:
        kept.add(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = layer(*parts, None, packed_seq_params=packing)
    assert out.requires_grad and kept
    return whole.untyped_storage().data_ptr() in kept


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
def test_rotated_queries_and_keys_leave_nothing_but_values_behind(lengths: tuple[int, ...]) -> None:
    layer, heads, width = attention_of()
    qkv, parts = qkv_and_parts(sum(lengths), heads, width)
    assert not keeps(layer, parts, packing_of(lengths, width), qkv)
    # Without rotation all three are views of it, and a copy of one would only be one more.
    packing = packing_of(lengths, width)
    packing.rotary.clear()
    assert keeps(layer, parts, packing, qkv)
    # Neither is one made where nothing is kept, or where a norm has kept queries and keys already.
    normed, _, _ = attention_of(qk_norm=True)
    assert keeps(normed, parts, packing_of(lengths, width), qkv)


def test_the_result_is_the_same() -> None:
    layer, heads, width = attention_of()
    normed, _, _ = attention_of(qk_norm=True)  # the same here: its norms lie before the core attention
    _, parts = qkv_and_parts(40, heads, width)
    packing = packing_of((7, 33), width)
    assert torch.equal(layer(*parts, None, packed_seq_params=packing), normed(*parts, None, packed_seq_params=packing))
