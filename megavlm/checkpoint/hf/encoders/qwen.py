"""The vision transformers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, without their mergers. Source: transformers 5.23, models/qwen2_vl,
models/qwen2_5_vl, models/qwen3_vl."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any

from megavlm.checkpoint.hf.encoders.base import HF_ACTIVATIONS, EncoderKind, hf_activation
from megavlm.checkpoint.hf.links import Link, plain, qkv, stacked
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import VisionConfig

TILE_PATCHES = 8
"""Patches on the side of a square tile, which these encoders know nothing of: they take pictures in their own size."""


class Qwen2VLVision(EncoderKind):
    """https://arxiv.org/abs/2409.12191"""

    model_type = "qwen2_vl_vision"
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        own = {"hidden_size": config.embed_dim, "ffn_hidden_size": int(config.embed_dim * config.mlp_ratio)}
        return qwen_fields(config, problems) | own

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        own = {"embed_dim": vision.hidden_size, "mlp_ratio": vision.ffn_hidden_size // vision.hidden_size}
        return qwen_block(vision, self.model_type) | own

    def links(self, vision: VisionConfig) -> list[Link]:
        return [*qwen_embeddings(vision), *qwen_layers(vision, ("fc1",), "fc2")]


class Qwen25VLVision(EncoderKind):
    """https://arxiv.org/abs/2502.13923"""

    model_type = "qwen2_5_vl_vision"
    mean, std = Qwen2VLVision.mean, Qwen2VLVision.std

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        return qwen_fields(config, problems) | {
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "norm": "rms_norm",
            "gated_mlp": True,
            "attention_window_px": config.window_size,
            # transformers' default names layers that a small encoder does not have.
            "full_attention_layers": sorted(layer for layer in set(config.fullatt_block_indexes) if layer < config.depth),
        }

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        return qwen_block(vision, self.model_type) | {
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_hidden_size,
            "window_size": vision.attention_window_px,
            "fullatt_block_indexes": vision.full_attention_layers,
        }

    def links(self, vision: VisionConfig) -> list[Link]:
        return [*qwen_embeddings(vision), *qwen_layers(vision, ("gate_proj", "up_proj"), "down_proj")]


class Qwen3VLVision(EncoderKind):
    """https://arxiv.org/abs/2511.21631"""

    model_type = "qwen3_vl_vision"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        side = isqrt(config.num_position_embeddings)
        if side**2 != config.num_position_embeddings:
            problems.add(f"vision_config.num_position_embeddings is {config.num_position_embeddings}, supported: squares")
        deep = list(config.deepstack_visual_indexes)
        return qwen_fields(config, problems) | {
            "image_size_px": side * config.patch_size,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "positions": "learned_rotary",
            "position_interpolation": "bilinear_corners",
            "patch_bias": True,
            "deepstack_layers": deep,
        }

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        return qwen_block(vision, self.model_type) | {
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_hidden_size,
            "num_position_embeddings": vision.num_patches,
            "deepstack_visual_indexes": vision.deepstack_layers,
        }

    def links(self, vision: VisionConfig) -> list[Link]:
        table = plain("position_embedding", "pos_embed.weight", (vision.num_patches, vision.hidden_size))
        return [*qwen_embeddings(vision), table, *qwen_layers(vision, ("linear_fc1",), "linear_fc2")]


def qwen_fields(config: Any, problems: Problems) -> dict[str, Any]:
    """What the three have in common."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "axial") != "axial":
        problems.add(f"vision_config.rope_parameters.rope_type is {rope['rope_type']!r}, supported: axial")
    return {
        "image_size_px": TILE_PATCHES * config.patch_size,
        "patch_size_px": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "num_channels": config.in_channels,
        "num_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "activation": problems.choice(config, "hidden_act", HF_ACTIVATIONS, block="vision_config"),
        "norm_eps": 1e-6,
        "positions": "rotary",
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
        "class_token": False,
        "pre_norm": False,
        "has_final_norm": False,
    }


def qwen_block(vision: VisionConfig, model_type: str) -> dict[str, Any]:
    """The way back of `qwen_fields`."""
    return {
        "model_type": model_type,
        "patch_size": vision.patch_size_px,
        "temporal_patch_size": vision.temporal_patch_size,
        "in_channels": vision.num_channels,
        "depth": vision.num_layers,
        "num_heads": vision.num_attention_heads,
        "hidden_act": hf_activation(vision),
        "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
    }


def qwen_embeddings(vision: VisionConfig) -> Iterator[Link]:
    """The patch embedding, a convolution over frames, rows and columns at Hugging Face."""
    width, channels, frames, size = vision.hidden_size, vision.num_channels, vision.temporal_patch_size, vision.patch_size_px
    inputs = channels * frames * size**2
    yield plain("patch_embedding.weight", "patch_embed.proj.weight", (width, inputs), theirs=(width, channels, frames, size, size))
    if vision.patch_bias:
        yield plain("patch_embedding.bias", "patch_embed.proj.bias", (width,))


def qwen_layers(vision: VisionConfig, up: tuple[str, ...], down: str) -> Iterator[Link]:
    """All transformer layers; `up` and `down` are the names of the MLP's matrices."""
    width, inner, heads = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads
    norm_parts = ("weight", "bias") if vision.norm == "layer_norm" else ("weight",)
    for layer in range(vision.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"blocks.{layer}."
        for part in norm_parts:
            yield plain(f"{ours}self_attention.linear_qkv.layer_norm_{part}", f"{theirs}norm1.{part}", (width,))
            yield plain(f"{ours}mlp.linear_fc1.layer_norm_{part}", f"{theirs}norm2.{part}", (width,))
        for part, rest in (("weight", (width,)), ("bias", ())):
            fused = [f"{theirs}attn.qkv.{part}"]
            yield qkv(f"{ours}self_attention.linear_qkv.{part}", fused, heads, heads, width // heads, *rest)
            yield plain(f"{ours}self_attention.linear_proj.{part}", f"{theirs}attn.proj.{part}", (width, *rest))
            names = [f"{theirs}mlp.{name}.{part}" for name in up]
            yield stacked(f"{ours}mlp.linear_fc1.{part}", names, [inner] * len(up), *rest)
            yield plain(f"{ours}mlp.linear_fc2.{part}", f"{theirs}mlp.{down}.{part}", (width, inner) if rest else (width,))
