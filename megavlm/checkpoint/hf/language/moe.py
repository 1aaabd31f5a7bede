"""Language models with experts: Qwen3-MoE and Mixtral. Source: transformers 5.23, models/qwen3_moe, mixtral.

Live modules hold all experts of a layer in two tensors; on the disk each expert's matrices are apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from megavlm.checkpoint.hf.language.base import LanguageKind
from megavlm.checkpoint.hf.language.llama import llama_block, llama_fields, llama_links
from megavlm.checkpoint.hf.links import Link, plain, stacked
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import LanguageConfig

_FUSED = re.compile(r"^(?P<block>.*\.)experts\.(?P<kind>gate_up_proj|down_proj)$")


class _MixtureOfExperts(LanguageKind):
    block: str
    """Name of the module with router and experts."""
    matrices: tuple[str, str, str]
    """Names of an expert's gate, up and down projections."""

    def links(self, language: LanguageConfig) -> list[Link]:
        assert language.moe is not None
        found: list[Link] = []
        for link in llama_links(language):
            match = re.match(r"decoder\.layers\.(\d+)\.mlp\.(.*)$", link.key)
            if match is None or int(match[1]) in language.moe.dense_layers:
                found.append(link)
            elif match[2] == "linear_fc1.layer_norm_weight":
                found.append(plain(f"decoder.layers.{match[1]}.pre_mlp_layernorm.weight", link.names[0], link.shape))
                found += self._experts(language, int(match[1]))
        return found

    def _experts(self, language: LanguageConfig, layer: int) -> Iterator[Link]:
        assert language.moe is not None
        width, inner, count = language.hidden_size, language.moe.ffn_hidden_size, language.moe.num_experts
        ours, theirs = f"decoder.layers.{layer}.mlp.", f"layers.{layer}.{self.block}."
        gate, up, down = self.matrices
        yield plain(f"{ours}router.weight", f"{theirs}gate.weight", (count, width))
        for expert in range(count):
            own, name = f"{ours}experts.{expert}.", f"{theirs}experts.{expert}."
            yield stacked(f"{own}linear_fc1.weight", [f"{name}{x}.weight" for x in (gate, up)], (inner, inner), width)
            yield plain(f"{own}linear_fc2.weight", f"{name}{down}.weight", (width, inner))

    def disk_tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        match = _FUSED.match(name)
        if match is None:
            return {name.replace(".mlp.gate.", f".{self.block}.gate."): tensor}
        gate, up, down = self.matrices
        found: dict[str, torch.Tensor] = {}
        for expert, own in enumerate(tensor):
            prefix = f"{match['block'].removesuffix('mlp.')}{self.block}.experts.{expert}."
            names, parts = ((gate, up), own.chunk(2)) if match["kind"] == "gate_up_proj" else ((down,), (own,))
            found |= {f"{prefix}{n}.weight": part for n, part in zip(names, parts, strict=True)}
        return found


def _moe_fields(config: Any, num_experts: int, inner: int) -> dict[str, Any]:
    return {
        "num_experts": num_experts,
        "top_k": config.num_experts_per_tok,
        "ffn_hidden_size": inner,
        # transformers adds the balancing loss only where the model hands out the router's logits.
        "aux_loss": float(config.router_aux_loss_coef) if config.output_router_logits else 0.0,
    }


def _moe_block(language: LanguageConfig) -> dict[str, Any]:
    assert language.moe is not None
    return {
        "num_experts_per_tok": language.moe.top_k,
        "router_aux_loss_coef": language.moe.aux_loss,
        "output_router_logits": language.moe.aux_loss > 0,
        "sliding_window": None,
        "head_dim": language.head_width,
    }


class Qwen3Moe(_MixtureOfExperts):
    """https://arxiv.org/abs/2505.09388"""

    model_type, causal_class = "qwen3_moe", "Qwen3MoeForCausalLM"
    block, matrices = "mlp", ("gate_proj", "up_proj", "down_proj")

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        problems.only(config, "attention_bias", False, default=False, block="text_config")
        problems.only(config, "use_sliding_window", False, default=False, block="text_config")
        moe = _moe_fields(config, config.num_experts, config.moe_intermediate_size)
        step = config.decoder_sparse_step
        moe["norm_topk_prob"] = bool(config.norm_topk_prob)
        moe["dense_layers"] = [i for i in range(config.num_hidden_layers) if i in config.mlp_only_layers or (i + 1) % step]
        return llama_fields(config, problems) | {"qk_norm": True, "moe": moe}

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        _has_experts(language)
        assert language.moe is not None
        own = {
            "attention_bias": False,
            "use_sliding_window": False,
            "num_experts": language.moe.num_experts,
            "moe_intermediate_size": language.moe.ffn_hidden_size,
            "norm_topk_prob": language.moe.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(language.moe.dense_layers),
        }
        return llama_block(language, self.model_type) | _moe_block(language) | own


class Mixtral(_MixtureOfExperts):
    """https://arxiv.org/abs/2401.04088"""

    model_type, causal_class = "mixtral", "MixtralForCausalLM"
    block, matrices = "block_sparse_moe", ("w1", "w3", "w2")

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        problems.only(config, "sliding_window", None, block="text_config")
        problems.only(config, "router_jitter_noise", 0.0, default=0.0, block="text_config")
        moe = _moe_fields(config, config.num_local_experts, config.intermediate_size)
        return llama_fields(config, problems) | {"moe": moe}

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        _has_experts(language)
        assert language.moe is not None
        own = {"num_local_experts": language.moe.num_experts, "router_jitter_noise": 0.0}
        # All its layers have experts, and their width goes by the name of the dense ones'.
        return llama_block(language, self.model_type) | _moe_block(language) | own | {"intermediate_size": language.moe.ffn_hidden_size}


def _has_experts(language: LanguageConfig) -> None:
    if language.moe is None:
        raise ValueError("model.language.moe=None (it has experts in every layer)")
