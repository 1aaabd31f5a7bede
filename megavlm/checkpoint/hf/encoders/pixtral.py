"""Pixtral's vision transformer (https://arxiv.org/abs/2410.07073): RMSNorm, gated MLP, no biases, two-dimensional rotary positions.

Source: transformers 5.23, models/pixtral.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.checkpoint.hf.encoders.base import HF_ACTIVATIONS, EncoderKind, hf_activation, vit_sizes, vit_sizes_block
from megavlm.checkpoint.hf.encoders.clip import patch_links
from megavlm.checkpoint.hf.links import Link, plain, qkv, stacked
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import VisionConfig

NORM_EPS = 1e-5
"""Written into the class, not into its config."""


class Pixtral(EncoderKind):
    """Pictures of any size; image_size only bounds what the processor hands over."""

    model_type = "pixtral"
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        problems.only(config, "attention_dropout", 0.0, default=0.0, block="vision_config")
        rope = config.rope_parameters or {}
        if rope.get("rope_type", "axial") != "axial":
            problems.add(f"vision_config.rope_parameters.rope_type is {rope['rope_type']!r}, supported: axial")
        return vit_sizes(config, problems) | {
            "ffn_hidden_size": config.intermediate_size,
            "activation": problems.choice(config, "hidden_act", HF_ACTIVATIONS, block="vision_config"),
            "gated_mlp": True,
            "norm": "rms_norm",
            "norm_eps": NORM_EPS,
            "qkv_bias": False,
            "linear_bias": False,
            "positions": "rotary",
            "rotary_layout": "alternating",
            "rope_theta": float(rope.get("rope_theta", 10000.0)),
            "class_token": False,
            "pre_norm": True,
            "patch_bias": False,
            "has_final_norm": False,
        }

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        return vit_sizes_block(vision, self.model_type) | {
            "intermediate_size": vision.ffn_hidden_size,
            "hidden_act": hf_activation(vision),
            "attention_dropout": 0.0,
            "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
        }

    def links(self, vision: VisionConfig) -> list[Link]:
        return [
            *patch_links(vision, "patch_conv."),
            plain("pre_norm.weight", "ln_pre.weight", (vision.hidden_size,)),
            *(link for layer in range(vision.num_layers) for link in _layer(vision, layer)),
        ]


def _layer(vision: VisionConfig, layer: int) -> Iterator[Link]:
    width, inner, heads = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads
    ours, theirs = f"decoder.layers.{layer}.", f"transformer.layers.{layer}."
    yield plain(f"{ours}self_attention.linear_qkv.layer_norm_weight", f"{theirs}attention_norm.weight", (width,))
    names = [f"{theirs}attention.{x}_proj.weight" for x in "qkv"]
    yield qkv(f"{ours}self_attention.linear_qkv.weight", names, heads, heads, width // heads, width)
    yield plain(f"{ours}self_attention.linear_proj.weight", f"{theirs}attention.o_proj.weight", (width, width))
    yield plain(f"{ours}mlp.linear_fc1.layer_norm_weight", f"{theirs}ffn_norm.weight", (width,))
    gated = [f"{theirs}feed_forward.{x}_proj.weight" for x in ("gate", "up")]
    yield stacked(f"{ours}mlp.linear_fc1.weight", gated, (inner, inner), width)
    yield plain(f"{ours}mlp.linear_fc2.weight", f"{theirs}feed_forward.down_proj.weight", (width, inner))
