"""DINOv2, with and without register tokens. Source: transformers 5.23, models/dinov2, models/dinov2_with_registers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.checkpoint.hf.encoders.base import HF_ACTIVATIONS, EncoderKind, hf_activation, vit_sizes, vit_sizes_block
from megavlm.checkpoint.hf.encoders.clip import norm_links, patch_links
from megavlm.checkpoint.hf.links import Link, plain, qkv
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import VisionConfig

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Dinov2(EncoderKind):
    """https://arxiv.org/abs/2304.07193"""

    model_type = "dinov2"
    mean, std = IMAGENET
    renames = (
        (r"attention\.q_proj\.", "attention.attention.query."),
        (r"attention\.k_proj\.", "attention.attention.key."),
        (r"attention\.v_proj\.", "attention.attention.value."),
        (r"attention\.o_proj\.", "attention.output.dense."),
        (r"mlp\.down_proj\.", "mlp.weights_out."),
    )

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        swiglu, width = bool(config.use_swiglu_ffn), config.hidden_size
        problems.only(config, "drop_path_rate", 0, 0.0, default=0.0, block="vision_config")
        act = "silu" if swiglu else problems.choice(config, "hidden_act", HF_ACTIVATIONS, block="vision_config")
        return vit_sizes(config, problems) | {
            "ffn_hidden_size": inner_width(width, config.mlp_ratio, swiglu),
            "gated_mlp": swiglu,
            "activation": act,
            "norm_eps": config.layer_norm_eps,
            "qkv_bias": bool(config.qkv_bias),
            "layer_scale": True,
            "class_token": True,
            "pre_norm": False,
            "patch_bias": True,
            "mask_token": bool(getattr(config, "use_mask_token", True)),
        }

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        return vit_sizes_block(vision, self.model_type) | {
            "mlp_ratio": mlp_ratio(vision),
            "use_swiglu_ffn": vision.gated_mlp,
            "hidden_act": "gelu" if vision.gated_mlp else hf_activation(vision),
            "layer_norm_eps": vision.norm_eps,
            "qkv_bias": vision.qkv_bias,
            "use_mask_token": vision.mask_token,
            "drop_path_rate": 0.0,
        }

    def links(self, vision: VisionConfig) -> list[Link]:
        width = vision.hidden_size
        embeddings = [plain("class_embedding", "embeddings.cls_token", (width,), theirs=(1, 1, width))]
        if vision.mask_token:
            embeddings.append(plain("mask_token", "embeddings.mask_token", (width,), theirs=(1, width)))
        if vision.num_register_tokens:
            tokens = (vision.num_register_tokens, width)
            embeddings.append(plain("register_tokens", "embeddings.register_tokens", tokens, theirs=(1, *tokens)))
        rows = vision.num_patches + 1
        return [
            *embeddings,
            plain("position_embedding", "embeddings.position_embeddings", (rows, width), theirs=(1, rows, width)),
            *patch_links(vision, "embeddings.patch_embeddings.projection."),
            *(link for layer in range(vision.num_layers) for link in _layer(vision, layer)),
            *norm_links("final_norm.", "layernorm.", width),
        ]


class Dinov2WithRegisters(Dinov2):
    """https://arxiv.org/abs/2309.16588"""

    model_type = "dinov2_with_registers"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        own = {"num_register_tokens": config.num_register_tokens, "position_interpolation": "bicubic_antialiased", "mask_token": True}
        return super().from_hf(config, problems) | own

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        values = super().to_hf(vision) | {"num_register_tokens": vision.num_register_tokens}
        del values["use_mask_token"]
        return values


def inner_width(width: int, ratio: float, swiglu: bool) -> int:
    """Width of the MLP's middle: with SwiGLU two thirds, rounded up to a multiple of 8."""
    inner = int(width * ratio)
    return (int(inner * 2 / 3) + 7) // 8 * 8 if swiglu else inner


def mlp_ratio(vision: VisionConfig) -> int:
    """The whole number that gives the MLP's width. Raises ValueError when there is none."""
    for ratio in range(1, 65):
        if inner_width(vision.hidden_size, ratio, vision.gated_mlp) == vision.ffn_hidden_size:
            return ratio
    raise ValueError(f"model.vision.ffn_hidden_size={vision.ffn_hidden_size} is no whole multiple of hidden_size, which DINOv2 needs")


def _layer(vision: VisionConfig, layer: int) -> Iterator[Link]:
    width, inner, heads = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads
    ours, theirs = f"decoder.layers.{layer}.", f"encoder.layer.{layer}."
    attention = f"{theirs}attention."
    yield from norm_links(f"{ours}self_attention.linear_qkv.layer_norm_", f"{theirs}norm1.", width)
    yield from norm_links(f"{ours}mlp.linear_fc1.layer_norm_", f"{theirs}norm2.", width)
    first, second, rows = ("weights_in", "weights_out", 2 * inner) if vision.gated_mlp else ("fc1", "fc2", inner)
    for part, rest in (("weight", (width,)), ("bias", ())):
        if part == "weight" or vision.qkv_bias:
            names = [f"{attention}attention.{x}.{part}" for x in ("query", "key", "value")]
            yield qkv(f"{ours}self_attention.linear_qkv.{part}", names, heads, heads, width // heads, *rest)
        yield plain(f"{ours}self_attention.linear_proj.{part}", f"{attention}output.dense.{part}", (width, *rest))
        yield plain(f"{ours}mlp.linear_fc1.{part}", f"{theirs}mlp.{first}.{part}", (rows, *rest))
        yield plain(f"{ours}mlp.linear_fc2.{part}", f"{theirs}mlp.{second}.{part}", (width, inner) if rest else (width,))
    yield plain(f"{ours}self_attention.linear_proj.post.weight", f"{theirs}layer_scale1.lambda1", (width,))
    yield plain(f"{ours}mlp.linear_fc2.post.weight", f"{theirs}layer_scale2.lambda1", (width,))
