"""Weights and matrix products of one layer of the LLM, by what its config says: dense, with experts, or reading pictures."""

from __future__ import annotations

from megavlm.config.schema import LanguageConfig


def layer_parameters(config: LanguageConfig, layer: int, tensor: int = 1) -> int:
    """Of the layer, counted from 0, on one of `tensor` ranks, without its experts.

    Key/value heads fewer than tensor ranks are held by several of them.
    """
    width, heads, groups = config.hidden_size, config.num_attention_heads // tensor, max(config.kv_heads // tensor, 1)
    split = (width + int(config.qkv_bias)) * (heads + 2 * groups) * config.head_width + heads * config.head_width * width
    if not has_experts(config, layer):
        split += _mlp(config, config.ffn_hidden_size // tensor)
    return split + _norms(config, layer) + _router(config, layer) + (2 * width if config.linear_bias else 0)


def expert_parameters(config: LanguageConfig, layer: int, tensor: int = 1, expert: int = 1) -> int:
    """Of the layer's experts on one rank: `expert` ranks hold some of them each, whole; without these tensor ranks split each of them."""
    if config.moe is None or not has_experts(config, layer):
        return 0
    columns = config.moe.ffn_hidden_size if expert > 1 else config.moe.ffn_hidden_size // tensor
    return config.moe.num_experts // expert * _mlp(config, columns)


def embedding_parameters(config: LanguageConfig) -> int:
    """Of the tokens' embeddings, split over tensor ranks."""
    return (config.vocab_size + config.read_only_tokens) * config.hidden_size


def position_parameters(config: LanguageConfig) -> int:
    """Of the table of learned positions, which every tensor rank holds."""
    return (config.max_positions + config.position_offset) * config.hidden_size if config.positions == "learned" else 0


def norm_parameters(config: LanguageConfig) -> int:
    """Of one norm as wide as the model."""
    return config.hidden_size * (2 if config.norm == "layer_norm" else 1)


def layer_flops(config: LanguageConfig, layer: int) -> int:
    """Forward FLOPs of a layer's matrix products on one token, attention's scores and sums apart; of experts, those it goes to.

    A cross-attention layer's keys and values are paid for by feature: `picture_flops`.
    """
    width, query, key_value = config.hidden_size, config.num_attention_heads * config.head_width, config.kv_heads * config.head_width
    attention = 2 * width * query + 2 * query * width + (0 if reads_pictures(config, layer) else 4 * width * key_value)
    return attention + 2 * _router(config, layer) + mlp_flops(config, layer)


def mlp_flops(config: LanguageConfig, layer: int) -> int:
    """Forward FLOPs of a layer's MLP, or of the experts that a token goes to, on one token."""
    inner = config.ffn_hidden_size
    if config.moe is not None and has_experts(config, layer):
        inner = config.moe.top_k * config.moe.ffn_hidden_size
    return 2 * (3 if config.gated_mlp else 2) * config.hidden_size * inner


def picture_flops(config: LanguageConfig) -> int:
    """Forward FLOPs of a cross-attention layer on one feature of a picture: its key and its value."""
    return 4 * config.hidden_size * config.kv_heads * config.head_width


def has_experts(config: LanguageConfig, layer: int) -> bool:
    """Has the layer experts instead of one MLP?"""
    return config.moe is not None and layer not in config.moe.dense_layers


def reads_pictures(config: LanguageConfig, layer: int) -> bool:
    """Is it a cross-attention layer?"""
    return config.cross_attention is not None and layer in config.cross_attention.layers


def _mlp(config: LanguageConfig, inner: int) -> int:
    into = 2 if config.gated_mlp else 1
    return (into * (config.hidden_size + int(config.linear_bias)) + config.hidden_size) * inner


def _norms(config: LanguageConfig, layer: int) -> int:
    per_head = config.cross_attention.qk_norm if config.cross_attention and reads_pictures(config, layer) else config.qk_norm
    gates = 2 if reads_pictures(config, layer) else 0
    return (4 if config.sandwich_norm else 2) * norm_parameters(config) + (2 * config.head_width if per_head else 0) + gates


def _router(config: LanguageConfig, layer: int) -> int:
    """Every tensor rank holds it whole."""
    return config.moe.num_experts * config.hidden_size if config.moe is not None and has_experts(config, layer) else 0
