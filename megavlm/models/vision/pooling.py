"""Attention pooling: one feature a picture, read by a learned query (SigLIP, https://arxiv.org/abs/2303.15343).

Shape legend: T pictures, N features of all pictures, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from megavlm.config.schema import VisionConfig
from megavlm.models.layers.activations import ACTIVATIONS
from megavlm.parallel.host import on_device


class PoolingHead(torch.nn.Module):
    """transformers' `SiglipMultiheadAttentionPoolingHead`, for pictures of unequal length too; whole on every tensor rank."""

    def __init__(self, vision: VisionConfig, new: dict[str, Any]) -> None:
        super().__init__()
        width = vision.hidden_size
        self.probe = torch.nn.Parameter(torch.empty(1, 1, width, **new))
        self.attention = torch.nn.MultiheadAttention(width, vision.num_attention_heads, batch_first=True, **new)
        self.norm = torch.nn.LayerNorm(width, eps=vision.norm_eps, **new)
        self.fc1 = torch.nn.Linear(width, vision.ffn_hidden_size, **new)
        self.fc2 = torch.nn.Linear(vision.ffn_hidden_size, width, **new)
        self.activation = ACTIVATIONS[vision.activation]

    def forward(self, x_ND: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """(T, D)."""
        padded = pad_sequence(list(x_ND.split(lengths)), batch_first=True)
        length_T = on_device(lengths, x_ND.device)
        hidden = torch.arange(padded.shape[1], device=x_ND.device)[None] >= length_T[:, None]
        probe = self.probe.expand(len(lengths), -1, -1)
        x = self.attention(probe, padded, padded, key_padding_mask=hidden, need_weights=False)[0]
        return (x + self.fc2(self.activation(self.fc1(self.norm(x)))))[:, 0]
