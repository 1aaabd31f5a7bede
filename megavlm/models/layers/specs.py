"""Layer specs of the encoder and the LLM.

With Transformer Engine on a GPU the layers are Transformer Engine's; elsewhere megatron-core's own linear layers with the
norms of `norms.py`. Both have the same checkpoint keys (those of Transformer Engine), and the same core attention interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules, get_transformer_layer_offset

from megavlm.models.layers.activations import GatedActivation
from megavlm.models.layers.attention import AttentionStyle, PackedAttention
from megavlm.models.layers.linear import PostRowParallelLinear, post_transformer_engine_linear
from megavlm.models.layers.norms import NORMS, LayerScale


@dataclass(frozen=True)
class LayerStyle:
    """What tells one family's transformer layer from another's, beside the sizes."""

    causal: bool
    norm: str
    """rms_norm or layer_norm."""
    qk_norm: bool = False
    """A norm on each head's query and key."""
    post: type[torch.nn.Module] | None = None
    """What attention's and MLP's output pass before they are added to the residual: a norm, LayerScale, or nothing."""
    attention: AttentionStyle = field(default_factory=AttentionStyle)
    self_attention: type = SelfAttention
    mlp: ModuleSpec | None = None
    """Instead of the dense MLP (mixture of experts)."""


def post_of(*, norm: str | None = None, scale: bool = False) -> type[torch.nn.Module] | None:
    """`LayerStyle.post` by what the config says."""
    return LayerScale if scale else NORMS[norm] if norm is not None else None


def has_transformer_engine() -> bool:
    """True when Transformer Engine is importable and a GPU is there to run it."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def layer_spec(style: LayerStyle, *, local: bool = False) -> ModuleSpec:
    """One pre-norm transformer layer; `local`: of megatron-core's own parts, also where Transformer Engine is there."""
    parts = _transformer_engine_parts(style) if has_transformer_engine() and not local else _local_parts(style)
    mask = AttnMaskType.padding_causal if style.causal else AttnMaskType.padding
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm_before,
            self_attention=ModuleSpec(
                module=style.self_attention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column,
                    core_attention=partial(PackedAttention, style=style.attention),
                    linear_proj=parts.row,
                    q_layernorm=parts.norm if style.qk_norm else IdentityOp,
                    k_layernorm=parts.norm if style.qk_norm else IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm_before if style.mlp is None else parts.norm,
            mlp=style.mlp or ModuleSpec(module=MLP, submodules=MLPSubmodules(parts.column, GatedActivation, parts.row)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=parts.key_map,
        ),
    )


@dataclass(frozen=True)
class _Parts:
    """One backend's modules."""

    norm: Any
    norm_before: Any
    """Before a column-parallel layer; Transformer Engine has it inside that layer."""
    column: Any
    row: Any
    key_map: dict[str, str]


def _local_parts(style: LayerStyle) -> _Parts:
    norm = NORMS[style.norm]
    row: Any = ModuleSpec(module=PostRowParallelLinear, params={"post": style.post}) if style.post else RowParallelLinear
    # Keys as Transformer Engine names them (it fuses the norm into the linear layer after it).
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if style.mlp is None:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return _Parts(norm, norm, ColumnParallelLinear, row, keys)


def _transformer_engine_parts(style: LayerStyle) -> _Parts:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TENorm, TERowParallelLinear

    row: Any = ModuleSpec(module=post_transformer_engine_linear(), params={"post": style.post}) if style.post else TERowParallelLinear
    return _Parts(TENorm, IdentityOp, TELayerNormColumnParallelLinear, row, {})


def block_spec(
    config: TransformerConfig, layer: ModuleSpec | Sequence[ModuleSpec], *, norm: str, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline chunk and the norm after the last one. `layer` is one for all, or one for each layer of the model."""
    if has_transformer_engine() and not getattr(config, "local_layers", False):
        from megatron.core.extensions.transformer_engine import TENorm

        final: Any = TENorm
    else:
        final = NORMS[norm]
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    if isinstance(layer, ModuleSpec):
        layers = [layer] * count
    else:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        layers = list(layer[first : first + count])
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final)
