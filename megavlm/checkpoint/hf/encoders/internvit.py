"""InternViT, 300M and 6B. Source: transformers 5.23, models/internvl `InternVLVisionModel`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.checkpoint.hf.encoders.base import HF_ACTIVATIONS, EncoderKind, hf_activation, vit_sizes, vit_sizes_block
from megavlm.checkpoint.hf.encoders.clip import norm_links, patch_links
from megavlm.checkpoint.hf.encoders.dinov2 import IMAGENET
from megavlm.checkpoint.hf.links import Link, plain, qkv
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import VisionConfig


class InternViT(EncoderKind):
    """https://arxiv.org/abs/2312.14238"""

    model_type = "internvl_vision"
    mean, std = IMAGENET

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        problems.only(config, "use_absolute_position_embeddings", True, block="vision_config")
        norm = problems.only(config, "norm_type", "layer_norm", "rms_norm", block="vision_config")
        if norm == "rms_norm" and not config.use_mean_pooling:
            problems.add("vision_config.use_mean_pooling is False, whose final norm is no RMSNorm as the others; supported: True")
        return vit_sizes(config, problems) | {
            "ffn_hidden_size": config.intermediate_size,
            "activation": problems.choice(config, "hidden_act", HF_ACTIVATIONS, block="vision_config"),
            "norm": norm,
            "norm_eps": config.layer_norm_eps,
            "qkv_bias": bool(config.attention_bias),
            "qk_norm": bool(config.use_qk_norm),
            "layer_scale": True,
            "class_token": True,
            "pre_norm": False,
            "patch_bias": True,
            "mask_token": bool(config.use_mask_token),
            "has_final_norm": not config.use_mean_pooling,
        }

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        return vit_sizes_block(vision, self.model_type) | {
            "image_size": [vision.image_size_px] * 2,
            "patch_size": [vision.patch_size_px] * 2,
            "intermediate_size": vision.ffn_hidden_size,
            "hidden_act": hf_activation(vision),
            "norm_type": vision.norm,
            "layer_norm_eps": vision.norm_eps,
            "attention_bias": vision.qkv_bias,
            "use_qk_norm": vision.qk_norm,
            "use_mask_token": vision.mask_token,
            "use_mean_pooling": not vision.has_final_norm,
            "use_absolute_position_embeddings": True,
        }

    def links(self, vision: VisionConfig) -> list[Link]:
        width, rows = vision.hidden_size, vision.num_patches + 1
        mask = [plain("mask_token", "embeddings.mask_token", (width,), theirs=(1, 1, width))] if vision.mask_token else []
        return [
            plain("class_embedding", "embeddings.cls_token", (width,), theirs=(1, 1, width)),
            *mask,
            plain("position_embedding", "embeddings.position_embeddings", (rows, width), theirs=(1, rows, width)),
            *patch_links(vision, "embeddings.patch_embeddings.projection."),
            *(link for layer in range(vision.num_layers) for link in _layer(vision, layer)),
            *(norm_links("final_norm.", "layernorm.", width) if vision.has_final_norm else ()),
        ]


def _layer(vision: VisionConfig, layer: int) -> Iterator[Link]:
    width, inner, heads = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads
    ours, theirs = f"decoder.layers.{layer}.", f"encoder.layer.{layer}."
    attention = f"{ours}self_attention."
    for ours_norm, theirs_norm in (
        (f"{attention}linear_qkv.layer_norm_", "layernorm_before."),
        (f"{ours}mlp.linear_fc1.layer_norm_", "layernorm_after."),
    ):
        if vision.norm == "layer_norm":
            yield from norm_links(ours_norm, theirs + theirs_norm, width)
        else:
            yield plain(f"{ours_norm}weight", f"{theirs}{theirs_norm}weight", (width,))
    for part, rest in (("weight", (width,)), ("bias", ())):
        if part == "weight" or vision.qkv_bias:
            names = [f"{theirs}attention.{x}_proj.{part}" for x in "qkv"]
            yield qkv(f"{attention}linear_qkv.{part}", names, heads, heads, width // heads, *rest)
        yield plain(f"{attention}linear_proj.{part}", f"{theirs}attention.projection_layer.{part}", (width, *rest))
        yield plain(f"{ours}mlp.linear_fc1.{part}", f"{theirs}mlp.fc1.{part}", (inner, *rest))
        yield plain(f"{ours}mlp.linear_fc2.{part}", f"{theirs}mlp.fc2.{part}", (width, inner) if rest else (width,))
    if vision.qk_norm:
        for name, x in (("query", "q"), ("key", "k")):
            yield plain(f"{attention}{name}_norm.weight", f"{theirs}attention.{x}_norm.weight", (width,))
    yield plain(f"{attention}linear_proj.post.weight", f"{theirs}lambda_1", (width,))
    yield plain(f"{ours}mlp.linear_fc2.post.weight", f"{theirs}lambda_2", (width,))
