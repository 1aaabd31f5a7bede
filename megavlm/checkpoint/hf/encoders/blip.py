"""BLIP-2's vision transformer, EVA's by its weights. Source: transformers 5.23, models/blip_2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.checkpoint.hf.encoders.base import EncoderKind
from megavlm.checkpoint.hf.encoders.clip import Clip, norm_links, patch_links, vit_block, vit_fields
from megavlm.checkpoint.hf.links import Link, plain, qkv
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import VisionConfig


class Blip2Vision(EncoderKind):
    """https://arxiv.org/abs/2301.12597"""

    model_type = "blip_2_vision_model"
    mean, std = Clip.mean, Clip.std

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        config.num_channels = 3  # no field of this class
        return vit_fields(config, problems) | {
            "class_token": True,
            "pre_norm": False,
            "patch_bias": True,
            "qkv_bias": bool(config.qkv_bias),
        }

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        values = vit_block(vision, self.model_type) | {"qkv_bias": vision.qkv_bias}
        del values["num_channels"]
        return values

    def links(self, vision: VisionConfig) -> list[Link]:
        width, rows = vision.hidden_size, vision.num_patches + 1
        return [
            plain("class_embedding", "embeddings.class_embedding", (width,), theirs=(1, 1, width)),
            *patch_links(vision, "embeddings.patch_embedding."),
            plain("position_embedding", "embeddings.position_embedding", (rows, width), theirs=(1, rows, width)),
            *(link for layer in range(vision.num_layers) for link in _layer(vision, layer)),
            *norm_links("final_norm.", "post_layernorm.", width),
        ]


class InstructBlipVision(Blip2Vision):
    """The same by another name."""

    model_type = "instructblip_vision_model"


def _layer(vision: VisionConfig, layer: int) -> Iterator[Link]:
    width, inner, heads = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads
    ours, theirs = f"decoder.layers.{layer}.", f"encoder.layers.{layer}."
    yield from norm_links(f"{ours}self_attention.linear_qkv.layer_norm_", f"{theirs}layer_norm1.", width)
    yield from norm_links(f"{ours}mlp.linear_fc1.layer_norm_", f"{theirs}layer_norm2.", width)
    for part, rest in (("weight", (width,)), ("bias", ())):
        if part == "weight" or vision.qkv_bias:
            yield qkv(f"{ours}self_attention.linear_qkv.{part}", [f"{theirs}self_attn.qkv.{part}"], heads, heads, width // heads, *rest)
        yield plain(f"{ours}self_attention.linear_proj.{part}", f"{theirs}self_attn.projection.{part}", (width, *rest))
        yield plain(f"{ours}mlp.linear_fc1.{part}", f"{theirs}mlp.fc1.{part}", (inner, *rest))
    yield plain(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.fc2.weight", (width, inner))
    yield plain(f"{ours}mlp.linear_fc2.bias", f"{theirs}mlp.fc2.bias", (width,))
