"""Llama, Mistral, Qwen2 and Qwen3. Source: transformers 5.23, models/llama, mistral, qwen2, qwen3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.checkpoint.hf.language.base import LanguageKind
from megavlm.checkpoint.hf.language.rope import rope_block, rope_fields
from megavlm.checkpoint.hf.language.windows import everywhere_block, everywhere_fields, layerwise_block, layerwise_fields
from megavlm.checkpoint.hf.links import Link, plain, qkv, stacked
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import LanguageConfig


class Llama(LanguageKind):
    """https://arxiv.org/abs/2302.13971; Vicuna is one."""

    model_type, causal_class = "llama", "LlamaForCausalLM"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        biased = bool(getattr(config, "mlp_bias", False))
        problems.only(config, "attention_bias", biased, default=False, block="text_config")
        return llama_fields(config, problems) | {"qkv_bias": biased, "linear_bias": biased}

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        return llama_block(language, self.model_type) | {
            "attention_bias": language.linear_bias,
            "mlp_bias": language.linear_bias,
            "head_dim": language.head_width,
        }

    def links(self, language: LanguageConfig) -> list[Link]:
        return llama_links(language)


class Qwen2(LanguageKind):
    """https://arxiv.org/abs/2407.10671"""

    model_type, causal_class = "qwen2", "Qwen2ForCausalLM"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        return llama_fields(config, problems) | {"qkv_bias": True} | layerwise_fields(config, problems)

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        return llama_block(language, self.model_type) | layerwise_block(language)

    def links(self, language: LanguageConfig) -> list[Link]:
        return llama_links(language)


class Qwen3(LanguageKind):
    """https://arxiv.org/abs/2505.09388"""

    model_type, causal_class = "qwen3", "Qwen3ForCausalLM"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        problems.only(config, "attention_bias", False, default=False, block="text_config")
        return llama_fields(config, problems) | {"qk_norm": True} | layerwise_fields(config, problems)

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        own = {"attention_bias": False, "head_dim": language.head_width}
        return llama_block(language, self.model_type) | own | layerwise_block(language)

    def links(self, language: LanguageConfig) -> list[Link]:
        return llama_links(language)


class Mistral(LanguageKind):
    """https://arxiv.org/abs/2310.06825"""

    model_type, causal_class = "mistral", "MistralForCausalLM"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        return llama_fields(config, problems) | {"family": self.model_type} | everywhere_fields(config)

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        return llama_block(language, self.model_type) | {"head_dim": language.head_width} | everywhere_block(language)

    def links(self, language: LanguageConfig) -> list[Link]:
        return llama_links(language)


def llama_fields(config: Any, problems: Problems, *, partial: bool = False) -> dict[str, Any]:
    """What Llama and its descendants have in common; `partial`: the class can rotate a part of each head only."""
    problems.only(config, "hidden_act", "silu", block="text_config")
    head_dim = getattr(config, "head_dim", None)
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "head_dim": None if head_dim is None or head_dim * config.num_attention_heads == config.hidden_size else head_dim,
        "ffn_hidden_size": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        **rope_fields(config, problems, partial=partial),
        "tie_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
        "max_positions": config.max_position_embeddings,
    }


def llama_block(language: LanguageConfig, model_type: str) -> dict[str, Any]:
    """The way back of `llama_fields`."""
    return {
        "model_type": model_type,
        "vocab_size": language.vocab_size,
        "num_hidden_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.kv_heads,
        "intermediate_size": language.ffn_hidden_size,
        "hidden_act": "silu",
        "rms_norm_eps": language.norm_eps,
        "rope_parameters": rope_block(language),
        "max_position_embeddings": language.max_positions,
        "attention_dropout": 0.0,
        "tie_word_embeddings": language.tie_embeddings,
        "use_cache": True,
    }


def llama_links(language: LanguageConfig) -> list[Link]:
    """Embedding, layers and final norm by Llama's names; biases and norms where the config has them."""
    width = language.hidden_size
    embedding = plain("embedding.word_embeddings.weight", "embed_tokens.weight", (language.vocab_size, width))
    layers = [link for layer in range(language.num_layers) for link in llama_layer(language, layer)]
    return [embedding, *layers, plain("decoder.final_layernorm.weight", "norm.weight", (width,))]


def llama_layer(language: LanguageConfig, layer: int) -> Iterator[Link]:
    """One layer."""
    width, inner, head = language.hidden_size, language.ffn_hidden_size, language.head_width
    heads, groups = language.num_attention_heads, language.kv_heads
    ours, theirs = f"decoder.layers.{layer}.", f"layers.{layer}."
    attention = f"{ours}self_attention."
    yield plain(f"{attention}linear_qkv.layer_norm_weight", f"{theirs}input_layernorm.weight", (width,))
    yield qkv(f"{attention}linear_qkv.weight", [f"{theirs}self_attn.{x}_proj.weight" for x in "qkv"], heads, groups, head, width)
    if language.qkv_bias:
        yield qkv(f"{attention}linear_qkv.bias", [f"{theirs}self_attn.{x}_proj.bias" for x in "qkv"], heads, groups, head)
    if language.qk_norm:
        for x in "qk":
            yield plain(f"{attention}{x}_layernorm.weight", f"{theirs}self_attn.{x}_norm.weight", (head,))
    yield plain(f"{attention}linear_proj.weight", f"{theirs}self_attn.o_proj.weight", (width, heads * head))
    if language.linear_bias:
        yield plain(f"{attention}linear_proj.bias", f"{theirs}self_attn.o_proj.bias", (width,))
    yield plain(f"{ours}mlp.linear_fc1.layer_norm_weight", f"{theirs}post_attention_layernorm.weight", (width,))
    yield stacked(f"{ours}mlp.linear_fc1.weight", [f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up")], (inner, inner), width)
    yield plain(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (width, inner))
    if language.linear_bias:
        yield stacked(f"{ours}mlp.linear_fc1.bias", [f"{theirs}mlp.{x}_proj.bias" for x in ("gate", "up")], (inner, inner))
        yield plain(f"{ours}mlp.linear_fc2.bias", f"{theirs}mlp.down_proj.bias", (width,))
