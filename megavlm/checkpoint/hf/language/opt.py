"""OPT (https://arxiv.org/abs/2205.01068), also inside BLIP-2. Source: transformers 5.23, models/opt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.checkpoint.hf.language.base import LanguageKind
from megavlm.checkpoint.hf.links import Link, plain, qkv
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import LanguageConfig

OFFSET = 2
"""Rows of the table of positions that OPT keeps for itself."""
EPS = 1e-5
"""Of its layer norms: torch's default, no field of the config."""
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class Opt(LanguageKind):
    """Learned positions, layer norms, biases everywhere, an MLP without gate."""

    model_type, causal_class = "opt", "OPTForCausalLM"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        problems.only(config, "do_layer_norm_before", True, block="text_config")
        problems.only(config, "_remove_final_layer_norm", False, default=False, block="text_config")
        problems.only(config, "enable_bias", True, default=True, block="text_config")
        problems.only(config, "layer_norm_elementwise_affine", True, default=True, block="text_config")
        problems.only(config, "word_embed_proj_dim", config.hidden_size, block="text_config")
        return {
            "vocab_size": config.vocab_size,
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "ffn_hidden_size": config.ffn_dim,
            "activation": problems.choice(config, "activation_function", ACTIVATIONS, block="text_config"),
            "gated_mlp": False,
            "norm": "layer_norm",
            "norm_eps": EPS,
            "qkv_bias": True,
            "linear_bias": True,
            "positions": "learned",
            "position_offset": OFFSET,
            "tie_embeddings": bool(config.tie_word_embeddings),
            "max_positions": config.max_position_embeddings,
        }

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "vocab_size": language.vocab_size,
            "num_hidden_layers": language.num_layers,
            "hidden_size": language.hidden_size,
            "word_embed_proj_dim": language.hidden_size,
            "num_attention_heads": language.num_attention_heads,
            "ffn_dim": language.ffn_hidden_size,
            "activation_function": {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(language.activation, "relu"),
            "do_layer_norm_before": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "max_position_embeddings": language.max_positions,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "layerdrop": 0.0,
            "tie_word_embeddings": language.tie_embeddings,
            "use_cache": True,
        }

    def links(self, language: LanguageConfig) -> list[Link]:
        width = language.hidden_size
        return [
            plain("embedding.word_embeddings.weight", "decoder.embed_tokens.weight", (language.vocab_size, width)),
            plain("position_embedding.weight", "decoder.embed_positions.weight", (language.max_positions + OFFSET, width)),
            *(link for layer in range(language.num_layers) for link in _layer(language, layer)),
            *_both("decoder.final_layernorm.", "decoder.final_layer_norm.", width),
        ]


def _layer(language: LanguageConfig, layer: int) -> Iterator[Link]:
    width, inner, heads, head = language.hidden_size, language.ffn_hidden_size, language.num_attention_heads, language.head_width
    ours, theirs = f"decoder.layers.{layer}.", f"decoder.layers.{layer}."
    attention = f"{ours}self_attention."
    yield from _both(f"{attention}linear_qkv.layer_norm_", f"{theirs}self_attn_layer_norm.", width)
    for part, rest in (("weight", (width,)), ("bias", ())):
        yield qkv(f"{attention}linear_qkv.{part}", [f"{theirs}self_attn.{x}_proj.{part}" for x in "qkv"], heads, heads, head, *rest)
    yield from _both(f"{attention}linear_proj.", f"{theirs}self_attn.out_proj.", width, width)
    yield from _both(f"{ours}mlp.linear_fc1.layer_norm_", f"{theirs}final_layer_norm.", width)
    yield from _both(f"{ours}mlp.linear_fc1.", f"{theirs}fc1.", inner, width)
    yield from _both(f"{ours}mlp.linear_fc2.", f"{theirs}fc2.", width, inner)


def _both(ours: str, theirs: str, *shape: int) -> Iterator[Link]:
    """Weight and bias of a linear layer or a norm."""
    yield plain(f"{ours}weight", f"{theirs}weight", shape)
    yield plain(f"{ours}bias", f"{theirs}bias", shape[:1])
