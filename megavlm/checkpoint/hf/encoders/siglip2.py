"""SigLIP2 NaFlex: pictures in their own aspect ratio. Source: transformers 5.23, models/siglip2.

The fixed sizes of SigLIP2 are published as siglip_vision_model.
"""

from __future__ import annotations

import math
from typing import Any

from megavlm.checkpoint.hf.encoders.base import HF_ACTIVATIONS, EncoderKind
from megavlm.checkpoint.hf.encoders.clip import norm_links, pooling_links, vit_block, vit_layers
from megavlm.checkpoint.hf.links import Link, plain
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import VisionConfig


class Siglip2(EncoderKind):
    """https://arxiv.org/abs/2502.14786"""

    model_type = "siglip2_vision_model"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        side = math.isqrt(config.num_patches)
        if side**2 != config.num_patches:
            problems.add(f"vision_config.num_patches is {config.num_patches}, supported: a square")
        return {
            "image_size_px": side * config.patch_size,
            "patch_size_px": config.patch_size,
            "num_channels": config.num_channels,
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "ffn_hidden_size": config.intermediate_size,
            "activation": problems.choice(config, "hidden_act", HF_ACTIVATIONS, block="vision_config"),
            "norm_eps": config.layer_norm_eps,
            "class_token": False,
            "pre_norm": False,
            "patch_bias": True,
            "patch_channels_last": True,
            "position_interpolation": "bilinear_antialiased",
            "pooling_head": bool(getattr(config, "vision_use_head", True)),
        }

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        values = vit_block(vision, self.model_type) | {"num_patches": vision.num_patches, "vision_use_head": vision.pooling_head}
        del values["image_size"]
        return values

    def links(self, vision: VisionConfig) -> list[Link]:
        width, inputs = vision.hidden_size, vision.num_channels * vision.patch_size_px**2
        return [
            plain("patch_embedding.weight", "embeddings.patch_embedding.weight", (width, inputs)),
            plain("patch_embedding.bias", "embeddings.patch_embedding.bias", (width,)),
            plain("position_embedding", "embeddings.position_embedding.weight", (vision.num_patches, width)),
            *vit_layers(vision),
            *norm_links("final_norm.", "post_layernorm.", width),
            *(pooling_links(vision) if vision.pooling_head else ()),
        ]
