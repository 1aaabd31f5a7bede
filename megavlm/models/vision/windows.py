"""Attention inside square windows of a picture (Qwen2.5-VL, https://arxiv.org/abs/2502.13923, section 2.1).

Patches are reordered once so that both windows and pictures are runs of rows; a layer then only picks which of the two its segments are.

Shape legend: N patches of all pictures, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch

from megavlm.config.schema import VisionConfig
from megavlm.models.layers.packing import Packing, pack
from megavlm.models.vision.pictures import Grid

Tables = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class Windows:
    """Where patches go before the first layer, and back; and the segments of each layer."""

    def __init__(self, vision: VisionConfig, grids: Sequence[Grid], rotary: Tables, device: torch.device) -> None:
        assert vision.attention_window_px is not None
        side = vision.attention_window_px // vision.patch_size_px
        order, lengths, start = [], [], 0
        for grid in grids:
            own, own_lengths = window_order(grid, side)
            order.append(own + start)
            lengths += own_lengths
            start += grid[0] * grid[1]
        on_host = torch.cat(order)
        self._order_N, self._back_N = on_host.to(device), torch.argsort(on_host).to(device)
        turned = {name: (cos[self._order_N], sin[self._order_N]) for name, (cos, sin) in rotary.items()}
        self._windows = pack(lengths, device, causal=False, rotary=turned)
        self._pictures = pack([rows * columns for rows, columns in grids], device, causal=False, rotary=turned)
        self._full = frozenset(layer + 1 for layer in vision.full_attention_layers)

    def order(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Window after window."""
        return x_ND[self._order_N]

    def back(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Row after row of each picture again."""
        return x_ND[self._back_N]

    def packing(self, layer_number: int) -> Packing:
        """Segments of a layer, counted from 1."""
        return self._pictures if layer_number in self._full else self._windows


@lru_cache(maxsize=4096)
def window_order(grid: Grid, side: int) -> tuple[torch.Tensor, list[int]]:
    """Patches of a picture window by window (int64), and how many each window has; those at the right and lower edge may have fewer."""
    rows, columns = grid
    number = torch.arange(rows * columns).view(rows, columns)
    windows = [number[r : r + side, c : c + side].flatten() for r in range(0, rows, side) for c in range(0, columns, side)]
    return torch.cat(windows), [window.numel() for window in windows]


def layer_packings(
    vision: VisionConfig, grids: Sequence[Grid], lengths: Sequence[int], rotary: Tables, device: torch.device
) -> tuple[Packing | Callable[[int], Packing], Windows | None]:
    """What `run_layers` takes as packing, and the reordering of patches that goes with it, if any.

    `lengths` are the rows of each picture, class and register tokens included; `rotary` holds cos and sin (N, K) by name.
    """
    if vision.attention_window_px is None:
        return pack(lengths, device, causal=False, rotary=rotary), None
    windows = Windows(vision, grids, rotary, device)
    return windows.packing, windows
