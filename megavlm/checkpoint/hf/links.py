"""How each weight of ours is made of Hugging Face weights, and the way back: one table for import and export.

Names are those that transformers 5 writes to disk for `LlavaForConditionalGeneration` (they differ from its state_dict keys);
`disk_name` maps those of older folders and of state_dict onto them.

Shape legend: D width, H heads, G key/value heads, K head dim, F inner width, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megavlm.config.schema import ModelConfig
from megavlm.models.families import carried_shapes
from megavlm.models.vision import carried_name

VISION, PROJECTOR, LANGUAGE, HEAD = "vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.weight"

_RENAMES = (
    ("model.vision_tower.", VISION),
    ("vision_tower.vision_model.", VISION),
    ("model.multi_modal_projector.", PROJECTOR),
    ("model.language_model.", LANGUAGE),
)
_BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")
"""Constants that old transformers releases stored among the weights."""


@dataclass(frozen=True)
class Link:
    """One tensor of ours (`key`, full shape) and the Hugging Face tensors (`names`) that it is made of.

    Kinds: plain (same tensor); reshape (same numbers, `shape` at Hugging Face); concat (gate over up); qkv (query heads of a
    group, then its key, then its value, group after group, as megatron-core wants them).
    """

    key: str
    names: tuple[str, ...]
    kind: Literal["plain", "reshape", "concat", "qkv"] = "plain"
    shape: tuple[int, ...] = ()
    """Shape of the Hugging Face tensor (kind=reshape)."""
    groups: int = 1
    """Key/value heads (kind=qkv)."""
    rows: int | None = None
    """Rows that Hugging Face keeps of a tensor whose rows are padded here; None: all."""

    def to_ours(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Our full tensor from the Hugging Face tensors, in the order of `names`."""
        if self.kind == "concat":
            return torch.cat(list(parts))
        if self.kind == "qkv":
            grouped = [p.reshape(self.groups, -1, *p.shape[1:]) for p in parts]
            return torch.cat(grouped, dim=1).flatten(0, 1)
        return parts[0].flatten(1) if self.kind == "reshape" else parts[0]

    def to_theirs(self, ours: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Hugging Face tensors from our full tensor; `sizes` are their first dimensions (kinds concat and qkv)."""
        if self.kind == "concat":
            return [p.contiguous() for p in torch.split(ours, list(sizes))]
        if self.kind == "qkv":
            grouped = torch.split(ours.reshape(self.groups, -1, *ours.shape[1:]), [n // self.groups for n in sizes], dim=1)
            return [p.flatten(0, 1).contiguous() for p in grouped]
        if self.kind == "reshape":
            return [ours.reshape(self.shape).contiguous()]
        return [ours[: self.rows].contiguous()]


def disk_name(name: str) -> str | None:
    """The name that transformers 5 gives this tensor on disk; None for constants that are no weights."""
    if _BUFFERS.search(name):
        return None
    if name == "lm_head.weight":
        return HEAD
    for old, new in _RENAMES:
        if name.startswith(old):
            return disk_name(new + name.removeprefix(old))
    return name


def links(model: ModelConfig) -> list[Link]:
    """Every weight of the model, in the order of the forward pass."""
    return [*_vision(model), *_projector(model), *_language(model)]


def part_sizes(link: Link, model: ModelConfig) -> list[int]:
    """First dimensions of the Hugging Face tensors of a link of kind concat or qkv, [] for others."""
    language, vision = model.language, model.vision
    if link.kind == "concat":
        return [language.ffn_hidden_size] * 2
    if link.kind == "qkv" and link.key.startswith("vision."):
        return [vision.hidden_size] * 3
    if link.kind == "qkv":
        return [heads * language.head_width for heads in (language.num_attention_heads, language.kv_heads, language.kv_heads)]
    return []


def _vision(model: ModelConfig) -> Iterator[Link]:
    vision = model.vision
    patch = (vision.hidden_size, vision.num_channels, vision.patch_size_px, vision.patch_size_px)
    yield Link("vision.patch_embedding.weight", (f"{VISION}embeddings.patch_embedding.weight",), "reshape", patch)
    if vision.patch_bias:
        yield Link("vision.patch_embedding.bias", (f"{VISION}embeddings.patch_embedding.bias",))
    yield Link("vision.position_embedding", (f"{VISION}embeddings.position_embedding.weight",))
    if vision.class_token:
        yield Link("vision.class_embedding", (f"{VISION}embeddings.class_embedding",))
    for part in ("weight", "bias"):
        if vision.pre_norm:
            # Spelt so in transformers.
            yield Link(f"vision.pre_norm.{part}", (f"{VISION}pre_layrnorm.{part}",))
        yield Link(f"vision.final_norm.{part}", (f"{VISION}post_layernorm.{part}",))
    for layer in range(vision.num_used_layers):
        yield from _vision_layer(layer, vision.num_attention_heads)
    for name in carried_shapes(model):
        yield Link(f"vision.carried.{carried_name(name)}", (VISION + name,))


def _vision_layer(layer: int, heads: int) -> Iterator[Link]:
    ours, theirs = f"vision.decoder.layers.{layer}.", f"{VISION}encoder.layers.{layer}."
    for part in ("weight", "bias"):
        yield Link(f"{ours}self_attention.linear_qkv.layer_norm_{part}", (f"{theirs}layer_norm1.{part}",))
        names = tuple(f"{theirs}self_attn.{x}_proj.{part}" for x in "qkv")
        yield Link(f"{ours}self_attention.linear_qkv.{part}", names, "qkv", groups=heads)
        yield Link(f"{ours}self_attention.linear_proj.{part}", (f"{theirs}self_attn.out_proj.{part}",))
        yield Link(f"{ours}mlp.linear_fc1.layer_norm_{part}", (f"{theirs}layer_norm2.{part}",))
        yield Link(f"{ours}mlp.linear_fc1.{part}", (f"{theirs}mlp.fc1.{part}",))
        yield Link(f"{ours}mlp.linear_fc2.{part}", (f"{theirs}mlp.fc2.{part}",))


def _projector(model: ModelConfig) -> Iterator[Link]:
    for linear in ("linear_1", "linear_2"):
        for part in ("weight", "bias") if model.projector.bias else ("weight",):
            yield Link(f"projector.{linear}.{part}", (f"{PROJECTOR}{linear}.{part}",))


def _language(model: ModelConfig) -> Iterator[Link]:
    language = model.language
    rows = language.vocab_size
    yield Link("language.embedding.word_embeddings.weight", (f"{LANGUAGE}embed_tokens.weight",), rows=rows)
    for layer in range(language.num_layers):
        ours, theirs = f"language.decoder.layers.{layer}.", f"{LANGUAGE}layers.{layer}."
        yield Link(f"{ours}self_attention.linear_qkv.layer_norm_weight", (f"{theirs}input_layernorm.weight",))
        for part in ("weight", "bias") if language.qkv_bias else ("weight",):
            names = tuple(f"{theirs}self_attn.{x}_proj.{part}" for x in "qkv")
            yield Link(f"{ours}self_attention.linear_qkv.{part}", names, "qkv", groups=language.kv_heads)
        if language.qk_norm:
            for x in "qk":
                yield Link(f"{ours}self_attention.{x}_layernorm.weight", (f"{theirs}self_attn.{x}_norm.weight",))
        yield Link(f"{ours}self_attention.linear_proj.weight", (f"{theirs}self_attn.o_proj.weight",))
        yield Link(f"{ours}mlp.linear_fc1.layer_norm_weight", (f"{theirs}post_attention_layernorm.weight",))
        yield Link(f"{ours}mlp.linear_fc1.weight", tuple(f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up")), "concat")
        yield Link(f"{ours}mlp.linear_fc2.weight", (f"{theirs}mlp.down_proj.weight",))
    yield Link("language.decoder.final_layernorm.weight", (f"{LANGUAGE}norm.weight",))
    if not language.tie_embeddings:
        yield Link("language.output_layer.weight", (HEAD,), rows=rows)
