"""Mllama's text model: Llama with cross-attention layers. Source: transformers 5.23, models/mllama.

It stands in no list of language models: without pictures its further layers are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.checkpoint.hf.language.base import LanguageKind
from megavlm.checkpoint.hf.language.llama import llama_block, llama_fields, llama_layer
from megavlm.checkpoint.hf.links import Link, plain, stacked
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import CrossAttentionConfig, LanguageConfig

READ_ONLY_TOKENS = 8
"""Rows that the class's embedding has behind the vocabulary."""


class MllamaText(LanguageKind):
    """https://arxiv.org/abs/2407.21783, section 7.2"""

    model_type, causal_class = "mllama_text_model", "MllamaForCausalLM"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        problems.only(config, "tie_word_embeddings", False, block="text_config")
        return llama_fields(config, problems) | {
            "read_only_tokens": READ_ONLY_TOKENS,
            "cross_attention": CrossAttentionConfig(
                layers=list(config.cross_attention_layers), qk_norm=True, before_first_picture="all", mlp_without_picture=False
            ),
        }

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        block = llama_block(language, self.model_type)
        block.pop("attention_dropout")
        layers = language.cross_attention.layers if language.cross_attention is not None else []
        return block | {"cross_attention_layers": layers, "dropout": 0.0}

    def links(self, language: LanguageConfig) -> list[Link]:
        assert language.cross_attention is not None
        width, rows = language.hidden_size, language.num_tokens
        layers = [
            link
            for layer in range(language.num_layers)
            for link in (_cross_layer if layer in language.cross_attention.layers else llama_layer)(language, layer)
        ]
        embedding = plain("embedding.word_embeddings.weight", "embed_tokens.weight", (rows, width))
        return [embedding, *layers, plain("decoder.final_layernorm.weight", "norm.weight", (width,))]


def _cross_layer(language: LanguageConfig, layer: int) -> Iterator[Link]:
    width, inner, head = language.hidden_size, language.ffn_hidden_size, language.head_width
    ours, theirs = f"decoder.layers.{layer}.", f"layers.{layer}."
    heads, groups = language.num_attention_heads * head, language.kv_heads * head
    yield plain(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", (width,))
    for name, rows in (("q", heads), ("k", groups), ("v", groups)):
        yield plain(f"{ours}self_attention.linear_{name}.weight", f"{theirs}cross_attn.{name}_proj.weight", (rows, width))
    for name, norm in (("query", "q"), ("key", "k")):
        yield plain(f"{ours}self_attention.{name}_norm.weight", f"{theirs}cross_attn.{norm}_norm.weight", (head,))
    yield plain(f"{ours}self_attention.linear_proj.weight", f"{theirs}cross_attn.o_proj.weight", (width, heads))
    yield plain(f"{ours}self_attention.linear_proj.post.gate", f"{theirs}cross_attn_attn_gate", (1,))
    yield plain(f"{ours}mlp.linear_fc1.layer_norm_weight", f"{theirs}post_attention_layernorm.weight", (width,))
    yield stacked(f"{ours}mlp.linear_fc1.weight", [f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up")], (inner, inner), width)
    yield plain(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (width, inner))
    yield plain(f"{ours}mlp.linear_fc2.post.gate", f"{theirs}cross_attn_mlp_gate", (1,))
