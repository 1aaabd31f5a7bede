"""megatron-core's configurations of the encoder and the LLM."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.schema import LanguageConfig, MoeConfig, ParallelConfig, PrecisionConfig, VisionConfig
from megavlm.models.layers.activations import ACTIVATIONS
from megavlm.topology.pipeline import PipelineSplit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NORM_NAMES = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}


@dataclass
class LayerConfig(TransformerConfig):
    """megatron-core's configuration, and what our layers read beside it."""

    packed_attention: str = "auto"
    """precision.attention."""
    context_split: str = "pack"
    """parallel.context_split."""
    context_comm: str = "auto"
    """parallel.context_comm."""
    recompute_mlp: bool = False
    """parallel.recompute_modules names the MLP; megatron-core's own way would not keep gradients of what is frozen below."""
    offload_layers: int = 0
    """parallel.offload_activations."""
    local_layers: bool = False
    """megatron-core's own layers also where Transformer Engine is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # The name of the switch by which an MLP takes the activation of its spec (`GatedActivation`). Set afterwards, because
        # megatron-core checks there that Transformer Engine knows the function.
        self.use_te_activation_func = self.gated_linear_unit


def _leave_unset(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _recompute(kind: str, parallel: ParallelConfig) -> dict[str, Any]:
    """megatron-core's fields; `run_layers` does what they say of whole layers."""
    if kind == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": parallel.recompute_layers or sys.maxsize,
        }
    if kind == "selective":
        again: dict[str, Any] = {"recompute_mlp": "mlp" in parallel.recompute_modules}
        if "core_attn" in parallel.recompute_modules:
            again |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
        return again
    return {}


def _common(precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device, recompute: str) -> dict[str, Any]:
    dtype = DTYPES[precision.dtype]
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "use_cpu_initialization": device.type == "cpu",
        # Weights come from models/init.py or from a checkpoint. Initialisation stays switched on, with nothing to do, because
        # megatron-core marks tensor-parallel parameters there; unmarked ones count once instead of per rank in the gradient norm.
        "init_method": _leave_unset,
        "output_layer_init_method": _leave_unset,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "packed_attention": precision.attention,
        "calculate_per_token_loss": True,
        "local_layers": precision.wants_local_layers,
        **_recompute(recompute, parallel),
        "offload_layers": parallel.offload_activations,
        **_transformer_engine_fp8(precision, parallel),
    }


def _transformer_engine_fp8(precision: PrecisionConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """What megatron-core makes Transformer Engine's FP8 recipe of. On every module's config, also of those that stay in bf16: by it the
    schedule tells layers, with the first microbatch of a step, that weights have changed."""
    if precision.fp8 == "none" or precision.fp8_backend != "transformer_engine":
        return {}
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": "tensorwise" if precision.fp8 == "current" else precision.fp8,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
        # Sharded parameters are not wrapped by what hears of first microbatches: cast anew each time.
        "disable_parameter_transpose_cache": parallel.zero >= 2,
    }


def language_transformer_config(
    language: LanguageConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device
) -> TransformerConfig:
    """megatron-core's configuration of the LLM."""
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    return LayerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.kv_heads,
        kv_channels=language.head_width,
        ffn_hidden_size=language.ffn_hidden_size,
        layernorm_epsilon=language.norm_eps,
        normalization=NORM_NAMES[language.norm],
        layernorm_zero_centered_gamma=language.zero_centered_norm,
        gated_linear_unit=language.gated_mlp,
        activation_func=ACTIVATIONS[language.activation],
        add_bias_linear=language.linear_bias,
        add_qkv_bias=language.qkv_bias,
        qk_layernorm=language.qk_norm,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_model_parallel_layout=PipelineSplit.of(language.num_layers, parallel).modules() if parallel.pipeline > 1 else None,
        context_parallel_size=parallel.context,
        context_split=parallel.context_split,
        context_comm=parallel.context_comm,
        sequence_parallel=parallel.sequence,
        # With two virtual chunks and two stages, batched point-to-point messages to the same peer arrive in the wrong
        # order over gloo and activations are taken for gradients: send them one by one (docs/architecture.md, traps).
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        deallocate_pipeline_outputs=False,
        **({} if language.moe is None else _experts(language.moe, parallel)),
        **_common(precision, parallel, device, parallel.recompute),
    )


def _experts(moe: MoeConfig, parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_router_topk": moe.top_k,
        # Normalised weights of the best experts are the softmax over their logits alone.
        "moe_router_pre_softmax": not moe.norm_topk_prob,
        "moe_router_load_balancing_type": "aux_loss" if moe.aux_loss else "none",
        "moe_aux_loss_coeff": moe.aux_loss,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1 if parallel.expert > 1 else parallel.tensor,
    }


def vision_transformer_config(
    vision: VisionConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device
) -> TransformerConfig:
    """megatron-core's configuration of the encoder: tensor-parallel, on one pipeline stage, never sequence-parallel."""
    return LayerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        ffn_hidden_size=vision.ffn_hidden_size,
        layernorm_epsilon=vision.norm_eps,
        normalization=NORM_NAMES[vision.norm],
        gated_linear_unit=vision.gated_mlp,
        activation_func=ACTIVATIONS[vision.activation],
        add_bias_linear=vision.linear_bias,
        add_qkv_bias=vision.qkv_bias,
        **_common(precision, parallel, device, parallel.encoder_recompute),
    )


def projector_transformer_config(
    vision: VisionConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device
) -> TransformerConfig:
    """megatron-core's configuration of the projector's linear layers: the encoder's, whose heads need not divide here."""
    return vision_transformer_config(vision.model_copy(update={"num_attention_heads": parallel.tensor}), precision, parallel, device)
