"""CLIP's and SigLIP's vision transformers. Source: transformers 5.23, models/clip, models/siglip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.checkpoint.hf.encoders.base import HF_ACTIVATIONS, EncoderKind, hf_activation, vit_sizes, vit_sizes_block
from megavlm.checkpoint.hf.links import Link, plain, qkv
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import VisionConfig


class Clip(EncoderKind):
    """https://arxiv.org/abs/2103.00020"""

    model_type = "clip_vision_model"
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        return vit_fields(config, problems) | {"class_token": True, "pre_norm": True, "patch_bias": False}

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        return vit_block(vision, self.model_type)

    def links(self, vision: VisionConfig) -> list[Link]:
        width = vision.hidden_size
        return [
            plain("class_embedding", "embeddings.class_embedding", (width,)),
            *_embeddings(vision),
            # Spelt so in transformers.
            *norm_links("pre_norm.", "pre_layrnorm.", width),
            *vit_layers(vision),
            *norm_links("final_norm.", "post_layernorm.", width),
        ]


class Siglip(EncoderKind):
    """https://arxiv.org/abs/2303.15343"""

    model_type = "siglip_vision_model"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        has_head = bool(getattr(config, "vision_use_head", True))
        return vit_fields(config, problems) | {"class_token": False, "pre_norm": False, "patch_bias": True, "pooling_head": has_head}

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        return vit_block(vision, self.model_type) | {"vision_use_head": vision.pooling_head}

    def links(self, vision: VisionConfig) -> list[Link]:
        return [
            *_embeddings(vision),
            *vit_layers(vision),
            *norm_links("final_norm.", "post_layernorm.", vision.hidden_size),
            *(pooling_links(vision) if vision.pooling_head else ()),
        ]


def vit_fields(config: Any, problems: Problems) -> dict[str, Any]:
    """Sizes, by the names that CLIP and its descendants use."""
    return vit_sizes(config, problems) | {
        "ffn_hidden_size": config.intermediate_size,
        "activation": problems.choice(config, "hidden_act", HF_ACTIVATIONS, block="vision_config"),
        "norm_eps": config.layer_norm_eps,
    }


def vit_block(vision: VisionConfig, model_type: str) -> dict[str, Any]:
    """The way back of `vit_fields`."""
    return vit_sizes_block(vision, model_type) | {
        "intermediate_size": vision.ffn_hidden_size,
        "hidden_act": hf_activation(vision),
        "layer_norm_eps": vision.norm_eps,
        "attention_dropout": 0.0,
    }


def _embeddings(vision: VisionConfig) -> Iterator[Link]:
    width, rows = vision.hidden_size, vision.num_patches + int(vision.class_token)
    yield from patch_links(vision, "embeddings.patch_embedding.")
    yield plain("position_embedding", "embeddings.position_embedding.weight", (rows, width))


def patch_links(vision: VisionConfig, name: str) -> Iterator[Link]:
    """The patch embedding, a convolution at Hugging Face."""
    width, channels, size = vision.hidden_size, vision.num_channels, vision.patch_size_px
    yield plain("patch_embedding.weight", f"{name}weight", (width, channels * size**2), theirs=(width, channels, size, size))
    if vision.patch_bias:
        yield plain("patch_embedding.bias", f"{name}bias", (width,))


def norm_links(ours: str, theirs: str, width: int) -> Iterator[Link]:
    """A LayerNorm's weight and bias."""
    for part in ("weight", "bias"):
        yield plain(ours + part, theirs + part, (width,))


def vit_layers(vision: VisionConfig) -> Iterator[Link]:
    """All transformer layers, by CLIP's names."""
    width, inner, heads = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads
    for layer in range(vision.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"encoder.layers.{layer}."
        yield from norm_links(f"{ours}self_attention.linear_qkv.layer_norm_", f"{theirs}layer_norm1.", width)
        yield from norm_links(f"{ours}mlp.linear_fc1.layer_norm_", f"{theirs}layer_norm2.", width)
        for part, rest in (("weight", True), ("bias", False)):
            names = [f"{theirs}self_attn.{x}_proj.{part}" for x in "qkv"]
            yield qkv(f"{ours}self_attention.linear_qkv.{part}", names, heads, heads, width // heads, *((width,) if rest else ()))
            yield plain(f"{ours}self_attention.linear_proj.{part}", f"{theirs}self_attn.out_proj.{part}", (width, width)[: 1 + rest])
            yield plain(f"{ours}mlp.linear_fc1.{part}", f"{theirs}mlp.fc1.{part}", (inner, width)[: 1 + rest])
            yield plain(f"{ours}mlp.linear_fc2.{part}", f"{theirs}mlp.fc2.{part}", (width, inner)[: 1 + rest])


def pooling_links(vision: VisionConfig) -> Iterator[Link]:
    """SigLIP's attention-pooling head."""
    width, inner = vision.hidden_size, vision.ffn_hidden_size
    yield plain("pooling_head.probe", "head.probe", (1, 1, width))
    for name, shape in (("in_proj_weight", (3 * width, width)), ("in_proj_bias", (3 * width,)), ("out_proj.weight", (width, width)),
                        ("out_proj.bias", (width,))):  # fmt: skip
        yield plain(f"pooling_head.attention.{name}", f"head.attention.{name}", shape)
    yield from norm_links("pooling_head.norm.", "head.layernorm.", width)
    yield plain("pooling_head.fc1.weight", "head.mlp.fc1.weight", (inner, width))
    yield plain("pooling_head.fc1.bias", "head.mlp.fc1.bias", (inner,))
    yield plain("pooling_head.fc2.weight", "head.mlp.fc2.weight", (width, inner))
    yield plain("pooling_head.fc2.bias", "head.mlp.fc2.bias", (width,))
