"""Tiny encoder and LLM configs that families are put together from."""

from __future__ import annotations

from typing import Any

VOCABULARY = 101


def vit_config(tf: Any, kind: str, **changes: Any) -> Any:
    """A CLIP- or SigLIP-like encoder: 16-pixel tiles of 16 patches, 3 layers."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    cls = {"clip": tf.CLIPVisionConfig, "siglip": tf.SiglipVisionConfig}[kind]
    return cls(**(small | changes))


def text_config(tf: Any, kind: str, *, tie: bool = False, **changes: Any) -> Any:
    """A Llama-like LLM: 4 layers, 4 heads in 2 groups, 48 wide."""
    small: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": tie,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "qwen3":
        small["head_dim"] = 16
    cls = {
        "llama": tf.LlamaConfig,
        "mistral": tf.MistralConfig,
        "phi3": tf.Phi3Config,
        "qwen2": tf.Qwen2Config,
        "qwen3": tf.Qwen3Config,
    }[kind]
    return cls(**(small | changes))


def opt_config(tf: Any) -> Any:
    """An OPT: 4 layers, 4 heads, 48 wide."""
    return tf.OPTConfig(
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        dropout=0.0,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
