"""Projected rows -> visual tokens, in the order of the picture.

Shape legend: R rows that come out of a projector's layers, N visual tokens, H LLM width.
"""

from __future__ import annotations

import torch


def arranged(x_RH: torch.Tensor, rows_N: torch.Tensor | None, image_newline: torch.Tensor | None = None) -> torch.Tensor:
    """(N, H): `rows_N` says which row each token takes, -1 being the image_newline; None: all rows in order."""
    if image_newline is None:
        # Not x[rows]: that would take -1 for the last row.
        return x_RH if rows_N is None else x_RH.index_select(0, rows_N)
    # Joined even where no row ends: overlapped gradient reduction waits for the gradient of every weight.
    table = torch.cat([x_RH, image_newline.unsqueeze(0)])
    return table[:-1] if rows_N is None else table[rows_N]
