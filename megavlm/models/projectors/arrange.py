"""Projected rows -> visual tokens, in the order of the picture.

Shape legend: R rows that come out of a projector's layers, N visual tokens, H LLM width.
"""

from __future__ import annotations

import torch

from megavlm.data.blends import rows_and_weights


def arranged(x_RH: torch.Tensor, rows_N: torch.Tensor | None, image_newline: torch.Tensor | None = None) -> torch.Tensor:
    """(N, H): `rows_N` says which row each token takes, -1 being the image_newline, or which four it mixes; None: all rows in order."""
    # Joined even where no row ends: overlapped gradient reduction waits for the gradient of every weight.
    table = x_RH if image_newline is None else torch.cat([x_RH, image_newline.unsqueeze(0)])
    if rows_N is None:
        return table[: len(x_RH)]
    rows, weights_N4 = rows_and_weights(rows_N)
    # Without a newline not table[rows]: that would take -1 for the last row.
    taken = table.index_select(0, rows.flatten()).unflatten(0, rows.shape) if image_newline is None else table[rows]
    return taken if weights_N4 is None else (taken.float() * weights_N4.unsqueeze(-1)).sum(1).to(x_RH.dtype)
