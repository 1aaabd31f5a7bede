"""Phi-3 and Phi-4-mini (https://arxiv.org/abs/2404.14219): Llama with fused weights. Source: transformers 5.23, models/phi3."""

from __future__ import annotations

from typing import Any

from megavlm.checkpoint.hf.language.base import LanguageKind
from megavlm.checkpoint.hf.language.llama import llama_block, llama_fields
from megavlm.checkpoint.hf.language.windows import everywhere_block, everywhere_fields
from megavlm.checkpoint.hf.links import Link, plain, qkv
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import LanguageConfig


class Phi3(LanguageKind):
    """Query, key and value are one tensor, and so are gate and up."""

    model_type, causal_class = "phi3", "Phi3ForCausalLM"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        return llama_fields(config, problems, partial=True) | {"family": self.model_type} | everywhere_fields(config)

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        block = llama_block(language, self.model_type) | everywhere_block(language)
        block["rope_parameters"]["partial_rotary_factor"] = language.rotary_fraction
        # The class reads this field, and not the one among rope_parameters.
        parameters = language.rope_scaling.parameters if language.rope_scaling is not None else {}
        block["original_max_position_embeddings"] = parameters.get("original_max_position_embeddings", language.max_positions)
        # The class's own ids may lie outside this vocabulary; whoever writes a folder knows the right ones.
        return block | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

    def links(self, language: LanguageConfig) -> list[Link]:
        width = language.hidden_size
        return [
            plain("embedding.word_embeddings.weight", "embed_tokens.weight", (language.vocab_size, width)),
            *(link for layer in range(language.num_layers) for link in _layer(language, layer)),
            plain("decoder.final_layernorm.weight", "norm.weight", (width,)),
        ]


def _layer(language: LanguageConfig, layer: int) -> list[Link]:
    width, inner, head = language.hidden_size, language.ffn_hidden_size, language.head_width
    heads, groups = language.num_attention_heads, language.kv_heads
    ours, theirs = f"decoder.layers.{layer}.", f"layers.{layer}."
    attention = f"{ours}self_attention."
    return [
        plain(f"{attention}linear_qkv.layer_norm_weight", f"{theirs}input_layernorm.weight", (width,)),
        qkv(f"{attention}linear_qkv.weight", [f"{theirs}self_attn.qkv_proj.weight"], heads, groups, head, width),
        plain(f"{attention}linear_proj.weight", f"{theirs}self_attn.o_proj.weight", (width, heads * head)),
        plain(f"{ours}mlp.linear_fc1.layer_norm_weight", f"{theirs}post_attention_layernorm.weight", (width,)),
        plain(f"{ours}mlp.linear_fc1.weight", f"{theirs}mlp.gate_up_proj.weight", (2 * inner, width)),
        plain(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (width, inner)),
    ]
