"""precision.attention reaches every layer, and is refused where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megavlm.config.schema import ParallelConfig, PrecisionConfig
from megavlm.models.layers import attention
from megavlm.models.layers.attention import PackedAttention
from megavlm.models.layers.configs import language_transformer_config, vision_transformer_config
from megavlm.testing.in_rank import in_rank
from megavlm.testing.tiny import tiny_batch, tiny_model_config
from megavlm_kernels.packed_attention import BackendError


def test_a_backend_that_is_not_here_is_refused_when_a_layer_is_built() -> None:
    model, precision = tiny_model_config(), PrecisionConfig(dtype="bf16", attention="varlen")
    for make, part in ((language_transformer_config, model.language), (vision_transformer_config, model.vision)):
        config = make(part, precision, ParallelConfig(), torch.device("cpu"))  # type: ignore[arg-type]
        with pytest.raises(BackendError, match="varlen cannot run here: it needs a CUDA device"):
            PackedAttention(config, 1, AttnMaskType.padding_causal, "self")


@in_rank
def test_every_layer_asks_for_it(ctx: Any) -> None:
    from megavlm.models.vlm import VisionLanguageModel

    model = tiny_model_config()
    chunk = VisionLanguageModel(model, PrecisionConfig(dtype="fp32", attention="sdpa"), ParallelConfig(), ctx, 0)
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    asked, real = [], attention.packed_attention

    def recording(*args: Any, **options: Any) -> torch.Tensor:
        asked.append(options["backend"])
        return real(*args, **options)

    attention.packed_attention = recording  # type: ignore[assignment]
    try:
        chunk(tiny_batch(model))
    finally:
        attention.packed_attention = real
    assert asked == ["sdpa"] * (model.vision.num_used_layers + model.language.num_layers)
