"""InternLM2 (https://arxiv.org/abs/2403.17297): Llama under other names. Its class is code in its folders, which is never run.

Source: modeling_internlm2.py of the published folders. Such a folder is read, and trained and exported as a Llama.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megavlm.checkpoint.hf.families.causal_lm import CausalLM
from megavlm.checkpoint.hf.language import LANGUAGES
from megavlm.checkpoint.hf.links import Link, plain, stacked
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import LanguageConfig, ModelConfig


class InternLM2(CausalLM):
    """One tensor for query, key and value, in the order of ours: a group's query heads, its key, its value."""

    name, becomes = "internlm2", CausalLM.name

    def handles(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == self.name

    def model_from_hf(self, config: Any, problems: Problems) -> ModelConfig:
        problems.only(config, "bias", False, default=False)
        fields = LANGUAGES["llama"].from_hf(config, problems)
        return ModelConfig(family=CausalLM.name, text_only=True, language=LanguageConfig(**fields))

    def links(self, model: ModelConfig) -> list[Link]:
        language, width = model.language, model.language.hidden_size
        embedding = plain("language.embedding.word_embeddings.weight", "model.tok_embeddings.weight", (language.vocab_size, width))
        layers = [link for layer in range(language.num_layers) for link in _layer(language, layer)]
        norm = plain("language.decoder.final_layernorm.weight", "model.norm.weight", (width,))
        head = plain("language.output_layer.weight", "output.weight", (language.vocab_size, width))
        return [embedding, *layers, norm] + ([] if language.tie_embeddings else [head])


def _layer(language: LanguageConfig, layer: int) -> Iterator[Link]:
    width, inner, head = language.hidden_size, language.ffn_hidden_size, language.head_width
    heads, groups = language.num_attention_heads, language.kv_heads
    ours, theirs = f"language.decoder.layers.{layer}.", f"model.layers.{layer}."
    attention = f"{ours}self_attention."
    yield plain(f"{attention}linear_qkv.layer_norm_weight", f"{theirs}attention_norm.weight", (width,))
    yield plain(f"{attention}linear_qkv.weight", f"{theirs}attention.wqkv.weight", ((heads + 2 * groups) * head, width))
    yield plain(f"{attention}linear_proj.weight", f"{theirs}attention.wo.weight", (width, heads * head))
    yield plain(f"{ours}mlp.linear_fc1.layer_norm_weight", f"{theirs}ffn_norm.weight", (width,))
    yield stacked(f"{ours}mlp.linear_fc1.weight", [f"{theirs}feed_forward.{x}.weight" for x in ("w1", "w3")], (inner, inner), width)
    yield plain(f"{ours}mlp.linear_fc2.weight", f"{theirs}feed_forward.w2.weight", (width, inner))
