"""Mllama's vision model: tiles on one canvas. Source: transformers 5.23, models/mllama.

It stands in no list of encoders: only Mllama itself hands it whole pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.checkpoint.hf.encoders.base import HF_ACTIVATIONS, EncoderKind, hf_activation
from megavlm.checkpoint.hf.encoders.clip import norm_links, patch_links
from megavlm.checkpoint.hf.links import Link, plain, qkv
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import VisionConfig
from megavlm.config.vision import CanvasConfig


class MllamaVision(EncoderKind):
    """https://arxiv.org/abs/2407.21783, section 7.1"""

    model_type = "mllama_vision_model"
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        canvas = CanvasConfig(max_tiles=config.max_num_tiles, num_global_layers=config.num_global_layers)
        grids = [list(grid) for grid in canvas.grids]
        if [list(ratio) for ratio in config.supported_aspect_ratios] != grids:
            problems.add(f"vision_config.supported_aspect_ratios is {config.supported_aspect_ratios}, supported: {grids}")
        # Of the norms before and between the two stacks the config says nothing.
        problems.only(config, "norm_eps", 1e-5, block="vision_config")
        width = config.hidden_size * (1 + len(config.intermediate_layers_indices))
        problems.only(config, "vision_output_dim", width, block="vision_config")
        return {
            "image_size_px": config.image_size,
            "patch_size_px": config.patch_size,
            "num_channels": config.num_channels,
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.attention_heads,
            "ffn_hidden_size": config.intermediate_size,
            "activation": problems.choice(config, "hidden_act", HF_ACTIVATIONS, block="vision_config"),
            "norm_eps": config.norm_eps,
            "qkv_bias": False,
            "attention_output_bias": False,
            "class_token": True,
            "keep_class_token": True,
            "pre_norm": True,
            # Theirs are counted from the first layer's output, ours from the embeddings.
            "feature_layer": [layer + 1 for layer in config.intermediate_layers_indices],
            "canvas": canvas,
        }

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        canvas = vision.canvas or CanvasConfig()
        return {
            "model_type": self.model_type,
            "image_size": vision.image_size_px,
            "patch_size": vision.patch_size_px,
            "num_channels": vision.num_channels,
            "num_hidden_layers": vision.num_layers,
            "num_global_layers": canvas.num_global_layers,
            "max_num_tiles": canvas.max_tiles,
            "supported_aspect_ratios": [list(grid) for grid in canvas.grids],
            "intermediate_layers_indices": [layer - 1 for layer in vision.feature_layers],
            "vision_output_dim": vision.feature_size,
            "hidden_size": vision.hidden_size,
            "attention_heads": vision.num_attention_heads,
            "intermediate_size": vision.ffn_hidden_size,
            "hidden_act": hf_activation(vision),
            "norm_eps": vision.norm_eps,
        }

    def links(self, vision: VisionConfig) -> list[Link]:
        assert vision.canvas is not None
        width, rows, grids = vision.hidden_size, vision.num_patches + 1, len(vision.canvas.grids) + 1
        tiles, position = vision.canvas.max_tiles, "gated_positional_embedding."
        links = [
            plain("class_embedding", "class_embedding", (width,)),
            *patch_links(vision, "patch_embedding."),
            plain("position_embedding", f"{position}embedding", (rows, width)),
            plain("position_gate", f"{position}gate", (1,)),
            plain("tile_position_embedding", f"{position}tile_embedding.weight", (grids, tiles * rows * width)),
        ]
        for where in ("pre", "post"):
            theirs = f"{where}_tile_positional_embedding."
            links.append(plain(f"{where}_tile_position_embedding", f"{theirs}embedding.weight", (grids, tiles * width)))
            links.append(plain(f"{where}_tile_gate", f"{theirs}gate", (1,)))
        return [
            *links,
            *norm_links("pre_norm.", "layernorm_pre.", width),
            *norm_links("final_norm.", "layernorm_post.", width),
            *(link for layer in range(vision.num_layers) for link in _layer(vision, "decoder", "transformer", layer)),
            *(
                link
                for layer in range(vision.canvas.num_global_layers)
                for link in _layer(vision, "global_decoder", "global_transformer", layer, gated=True)
            ),
        ]


def _layer(vision: VisionConfig, stack: str, theirs: str, number: int, *, gated: bool = False) -> Iterator[Link]:
    width, inner, heads = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads
    ours, theirs = f"{stack}.layers.{number}.", f"{theirs}.layers.{number}."
    yield from norm_links(f"{ours}self_attention.linear_qkv.layer_norm_", f"{theirs}input_layernorm.", width)
    yield from norm_links(f"{ours}mlp.linear_fc1.layer_norm_", f"{theirs}post_attention_layernorm.", width)
    names = [f"{theirs}self_attn.{x}_proj.weight" for x in "qkv"]
    yield qkv(f"{ours}self_attention.linear_qkv.weight", names, heads, heads, width // heads, width)
    yield plain(f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight", (width, width))
    for name, shape in (("fc1", (inner, width)), ("fc2", (width, inner))):
        yield plain(f"{ours}mlp.linear_{name}.weight", f"{theirs}mlp.{name}.weight", shape)
        yield plain(f"{ours}mlp.linear_{name}.bias", f"{theirs}mlp.{name}.bias", shape[:1])
    if gated:
        yield plain(f"{ours}self_attention.linear_proj.post.gate", f"{theirs}gate_attn", (1,))
        yield plain(f"{ours}mlp.linear_fc2.post.gate", f"{theirs}gate_ffn", (1,))
