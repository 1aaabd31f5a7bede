"""Tiny language models with experts."""

from __future__ import annotations

from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import VOCABULARY

_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _qwen3_moe(**changes: Any) -> Any:
    own = {"head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4, "norm_topk_prob": True}
    return lambda tf: tf.Qwen3MoeConfig(**(_SMALL | own | changes))


def _mixtral(**changes: Any) -> Any:
    return lambda tf: tf.MixtralConfig(**(_SMALL | {"intermediate_size": 64, "num_local_experts": 4} | changes))


CASES = [
    Case("Qwen3-MoE", "causal_lm", _qwen3_moe()),
    Case("Qwen3-MoE, dense layers between", "causal_lm", _qwen3_moe(mlp_only_layers=[0], decoder_sparse_step=2), slow=True),
    Case("Qwen3-MoE, weights of all experts' softmax", "causal_lm", _qwen3_moe(norm_topk_prob=False, tie_word_embeddings=True), slow=True),
    Case("Mixtral", "causal_lm", _mixtral(), slow=True),
]
