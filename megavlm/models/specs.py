"""Layer specs and megatron-core configurations of the encoder and the LLM.

With Transformer Engine on a GPU the layers are Transformer Engine's; elsewhere megatron-core's own linear layers with the
norms below. Both have the same checkpoint keys (those of Transformer Engine), and the same core attention interface.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megavlm.config.schema import LanguageConfig, ParallelConfig, PrecisionConfig, VisionConfig
from megavlm.models.attention import PackedAttention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (https://arxiv.org/abs/1910.07467) that megatron-core's sequence parallelism accepts."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each tensor rank sees part of the rows: megatron-core sums gradients marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """Layer norm that megatron-core's sequence parallelism accepts."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's sigmoid approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU, tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_tanh": gelu_tanh}


def has_transformer_engine() -> bool:
    """True when Transformer Engine is importable and a GPU is there to run it."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def layer_spec(*, causal: bool, rms_norm: bool, qk_norm: bool = False) -> ModuleSpec:
    """One pre-norm transformer layer."""
    mask = AttnMaskType.padding_causal if causal else AttnMaskType.padding
    if has_transformer_engine():
        return _transformer_engine_layer(mask, qk_norm)
    norm = RMSNorm if rms_norm else LayerNorm
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=norm if qk_norm else IdentityOp,
                    k_layernorm=norm if qk_norm else IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
            mlp_bda=get_bias_dropout_add,
            # Keys as Transformer Engine names them (it fuses the norm into the linear layer after it).
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _transformer_engine_layer(mask: AttnMaskType, qk_norm: bool) -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TENorm, TERowParallelLinear

    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=TELayerNormColumnParallelLinear,
                    core_attention=PackedAttention,
                    linear_proj=TERowParallelLinear,
                    q_layernorm=TENorm if qk_norm else IdentityOp,
                    k_layernorm=TENorm if qk_norm else IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(config: TransformerConfig, layer: ModuleSpec, *, rms_norm: bool, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline chunk and the norm after the last one."""
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        norm: Any = TENorm
    else:
        norm = RMSNorm if rms_norm else LayerNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm)


def recompute_input(x: torch.Tensor, block: torch.nn.Module) -> torch.Tensor:
    """`x`, made to require a gradient where recomputation would otherwise lose the gradients of `block`'s layers.

    megatron-core's checkpoint function gives no gradient at all when its input needs none: a frozen embedding or encoder bottom
    under layers that train.
    """
    recomputes = block.config.recompute_granularity == "full" and torch.is_grad_enabled()  # type: ignore[union-attr]
    if not recomputes or x.requires_grad or not any(p.requires_grad for p in block.parameters()):
        return x
    return x.detach().requires_grad_()


def _leave_unset(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _common(precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> dict[str, Any]:
    dtype = DTYPES[precision.dtype]
    recompute: dict[str, Any] = {}
    if parallel.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif parallel.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
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
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "calculate_per_token_loss": True,
        **recompute,
    }


def language_transformer_config(
    language: LanguageConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device
) -> TransformerConfig:
    """megatron-core's configuration of the LLM."""
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.kv_heads,
        kv_channels=language.head_width,
        ffn_hidden_size=language.ffn_hidden_size,
        layernorm_epsilon=language.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=language.qkv_bias,
        qk_layernorm=language.qk_norm,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        # With two virtual chunks and two stages, batched point-to-point messages to the same peer arrive in the wrong
        # order over gloo and activations are taken for gradients: send them one by one (docs/architecture.md, traps).
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        deallocate_pipeline_outputs=False,
        **_common(precision, parallel, device),
    )


def vision_transformer_config(
    vision: VisionConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device
) -> TransformerConfig:
    """megatron-core's configuration of the encoder: tensor-parallel, on one pipeline stage, never sequence-parallel."""
    return TransformerConfig(
        num_layers=vision.num_used_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        ffn_hidden_size=vision.ffn_hidden_size,
        layernorm_epsilon=vision.norm_eps,
        normalization="LayerNorm",
        activation_func=ACTIVATIONS[vision.activation],
        add_bias_linear=True,
        add_qkv_bias=True,
        **_common(precision, parallel, device),
    )
