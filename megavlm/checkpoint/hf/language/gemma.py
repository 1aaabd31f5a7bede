"""Gemma 1, 2 and 3 (text). Source: transformers 5.23, models/gemma, gemma2, gemma3."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from megavlm.checkpoint.hf.language.base import LanguageKind
from megavlm.checkpoint.hf.language.llama import llama_links
from megavlm.checkpoint.hf.language.rope import rope_block, rope_fields
from megavlm.checkpoint.hf.language.windows import FULL, SLIDING, layerwise_block, layerwise_fields
from megavlm.checkpoint.hf.links import Link, plain
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import LanguageConfig

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu", "relu": "relu"}


class Gemma(LanguageKind):
    """https://arxiv.org/abs/2403.08295"""

    model_type, causal_class = "gemma", "GemmaForCausalLM"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        return gemma_fields(config, problems, "hidden_act") | rope_fields(config, problems)

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        return gemma_block(language, self.model_type, "hidden_act") | {"rope_parameters": rope_block(language)}

    def links(self, language: LanguageConfig) -> list[Link]:
        return llama_links(language)


class Gemma2(LanguageKind):
    """https://arxiv.org/abs/2408.00118"""

    model_type, causal_class = "gemma2", "Gemma2ForCausalLM"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        return (
            gemma_fields(config, problems, "hidden_activation")
            | rope_fields(config, problems)
            | sandwich_fields(config, problems)
            | {"attention_softcap": config.attn_logit_softcapping}
        )

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        return gemma_block(language, self.model_type, "hidden_activation") | sandwich_block(language) | {
            "rope_parameters": rope_block(language),
            "attn_logit_softcapping": language.attention_softcap,
        }  # fmt: skip

    def links(self, language: LanguageConfig) -> list[Link]:
        return list(sandwich_links(language))


class Gemma3Text(LanguageKind):
    """https://arxiv.org/abs/2503.19786"""

    model_type, causal_class = "gemma3_text", "Gemma3ForCausalLM"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        rope = config.rope_parameters
        # The class has the setting and does not use it.
        problems.only(config, "attn_logit_softcapping", None, block="text_config")
        if rope[SLIDING].get("rope_type", "default") != "default":
            problems.add(f"text_config.rope_parameters.{SLIDING}.rope_type is {rope[SLIDING]['rope_type']!r}, supported: default")
        return (
            gemma_fields(config, problems, "hidden_activation")
            | rope_fields(SimpleNamespace(rope_parameters=rope[FULL]), problems)
            | sandwich_fields(config, problems)
            | {"rope_local_theta": float(rope[SLIDING]["rope_theta"]), "qk_norm": True}
        )

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        # Written out also where both bases are one: the class's own default is another.
        local = {"rope_type": "default", "rope_theta": language.rope_local_theta or language.rope_theta}
        return gemma_block(language, self.model_type, "hidden_activation") | sandwich_block(language) | {
            "rope_parameters": {FULL: rope_block(language), SLIDING: local},
            "attn_logit_softcapping": language.attention_softcap,
        }  # fmt: skip

    def links(self, language: LanguageConfig) -> list[Link]:
        return list(sandwich_links(language))


def gemma_fields(config: Any, problems: Problems, activation: str) -> dict[str, Any]:
    """What all of them have in common; `activation` is the name of that field."""
    problems.only(config, "attention_bias", False, default=False, block="text_config")
    problems.only(config, "use_bidirectional_attention", False, default=False, block="text_config")
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "ffn_hidden_size": config.intermediate_size,
        "activation": problems.choice(config, activation, ACTIVATIONS, block="text_config"),
        "norm_eps": config.rms_norm_eps,
        "zero_centered_norm": True,
        "embedding_scale": config.hidden_size**0.5,
        "tie_embeddings": bool(config.tie_word_embeddings),
        "max_positions": config.max_position_embeddings,
    }


def gemma_block(language: LanguageConfig, model_type: str, activation: str) -> dict[str, Any]:
    """The way back of `gemma_fields`."""
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "model_type": model_type,
        "vocab_size": language.vocab_size,
        "num_hidden_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.kv_heads,
        "head_dim": language.head_width,
        "intermediate_size": language.ffn_hidden_size,
        activation: activations[language.activation],
        "rms_norm_eps": language.norm_eps,
        "max_position_embeddings": language.max_positions,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": language.tie_embeddings,
        "use_cache": True,
    }


def sandwich_fields(config: Any, problems: Problems) -> dict[str, Any]:
    """What Gemma 2 and 3 add."""
    return {
        "sandwich_norm": True,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "logit_softcap": config.final_logit_softcapping,
    } | layerwise_fields(config, problems)


def sandwich_block(language: LanguageConfig) -> dict[str, Any]:
    """The way back of `sandwich_fields`."""
    scale, windows = language.attention_scale, layerwise_block(language)
    return {
        "query_pre_attn_scalar": language.head_width if scale is None else round(scale**-2),
        "final_logit_softcapping": language.logit_softcap,
        "sliding_window": windows["sliding_window"],
        "layer_types": windows["layer_types"],
    }


def sandwich_links(language: LanguageConfig) -> Iterator[Link]:
    """Llama's weights, with norms before and after attention and MLP."""
    width = (language.hidden_size,)
    for link in llama_links(language):
        match = re.match(r"(decoder\.(layers\.\d+\.))(.*)$", link.key)
        ours, theirs, rest = match.groups() if match is not None else ("", "", "")
        if rest == "mlp.linear_fc1.layer_norm_weight":
            yield plain(link.key, f"{theirs}pre_feedforward_layernorm.weight", width)
            continue
        yield link
        if rest == "self_attention.linear_proj.weight":
            yield plain(f"{ours}self_attention.linear_proj.post.weight", f"{theirs}post_attention_layernorm.weight", width)
        if rest == "mlp.linear_fc2.weight":
            yield plain(f"{ours}mlp.linear_fc2.post.weight", f"{theirs}post_feedforward_layernorm.weight", width)
