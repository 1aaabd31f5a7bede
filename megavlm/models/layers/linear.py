"""Row-parallel linear layers with something after the sum over tensor ranks: a second norm (Gemma 2) or a channel scale (DINOv2).

megatron-core's layer adds the result to the residual; what must happen before that happens here.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig


class _Post:
    """Mixin over a row-parallel linear layer: `post` is built with (config, output width, eps=)."""

    def __init__(self, *args: Any, config: TransformerConfig, post: type[torch.nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)  # type: ignore[call-arg]
        self.post = post(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        out, bias = super().forward(x)  # type: ignore[misc]
        return self.post(out if bias is None else out + bias), None


class PostRowParallelLinear(_Post, RowParallelLinear):
    """megatron-core's row-parallel layer, then `post`."""


def post_transformer_engine_linear() -> type:
    """The same over Transformer Engine's row-parallel layer."""
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    return type("PostTERowParallelLinear", (_Post, TERowParallelLinear), {})
