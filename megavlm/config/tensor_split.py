"""Which matrices tensor parallelism can cut, and which modules are whole on every tensor rank instead."""

from __future__ import annotations

from collections.abc import Mapping

from megavlm.config.model import ModelConfig
from megavlm.config.parallel import ParallelConfig

_WAY_OUT = ": use fewer tensor ranks, or parallel.encoder_tensor=auto, with which it is whole on each of them"


def encoder_tensor_ranks(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Tensor ranks that share each layer of the encoders: those of the LLM, or 1."""
    return _ranks(encoder_widths(model), parallel)


def projector_tensor_ranks(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Tensor ranks that share each layer of the projector: those of the LLM, or 1."""
    return _ranks(projector_widths(model), parallel)


def _ranks(widths: Mapping[str, int], parallel: ParallelConfig) -> int:
    if parallel.encoder_tensor == 1 or parallel.encoder_data_parallel is not False:
        return 1
    divides = all(width % parallel.tensor == 0 for width in widths.values())
    return parallel.tensor if divides or parallel.encoder_tensor is None else 1


def encoder_widths(model: ModelConfig) -> dict[str, int]:
    """Field of the model block -> heads or width that tensor ranks of the encoder must divide."""
    named = [("vision", model.vision), *((f"vision_beside[{i}]", other) for i, other in enumerate(model.vision_beside))]
    found = {}
    for name, encoder in named:
        found[f"{name}.num_attention_heads"] = encoder.num_attention_heads
        found[f"{name}.ffn_hidden_size"] = encoder.ffn_hidden_size
    return found


def projector_widths(model: ModelConfig) -> dict[str, int]:
    """Field of the model block -> heads or width that tensor ranks of the projector must divide."""
    projector = model.projector
    if projector.kind == "average_pool":
        return {}  # whole in every layout
    found = {"projector.hidden_size": projector.hidden_size or model.language.hidden_size}
    if projector.merge_linear:
        found["projector.merge_linear (the width of the encoders' features)"] = model.feature_size
    if projector.resampler is not None:
        found |= {
            "projector.resampler.num_attention_heads": projector.resampler.num_attention_heads,
            "projector.resampler.num_query_groups": projector.resampler.num_query_groups,
            "projector.resampler.ffn_hidden_size": projector.resampler.ffn_hidden_size or 4 * model.language.hidden_size,
        }
    if projector.qformer is not None:
        found |= {
            "projector.qformer.num_attention_heads": projector.qformer.num_attention_heads,
            "projector.qformer.ffn_hidden_size": projector.qformer.ffn_hidden_size,
        }
    return found


def check_tensor_split(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Whether every matrix of the model can be cut for the tensor-parallel ranks. Raises ValueError naming what does not divide."""
    tensor = parallel.tensor
    heads, kv = model.language.num_attention_heads, model.language.kv_heads
    if heads % tensor or (kv % tensor and tensor % kv):
        raise ValueError(f"parallel.tensor={tensor} does not divide model.language's {heads} attention heads and {kv} key/value heads")
    if model.language.cross_attention is not None and kv % tensor:
        raise ValueError(f"parallel.tensor={tensor} does not divide the {kv} key/value heads of model.language.cross_attention")
    language = {"language.ffn_hidden_size": model.language.ffn_hidden_size, "language.hidden_size": model.language.hidden_size}
    for name, width in language.items():
        if width % tensor:
            raise ValueError(f"parallel.tensor={tensor} does not divide model.{name}={width}")
    if model.text_only:
        for field in ("encoder_tensor", "encoder_data_parallel"):
            if getattr(parallel, field) not in (None, False):
                raise ValueError(f"parallel.{field}: model.text_only=true has no encoder: leave it out")
        return
    for widths, ranks in (
        (encoder_widths(model), encoder_tensor_ranks(model, parallel)),
        (projector_widths(model), projector_tensor_ranks(model, parallel)),
    ):
        for name, width in widths.items():
            if width % ranks:
                raise ValueError(f"parallel.tensor={tensor} does not divide model.{name}={width}{_WAY_OUT}")
