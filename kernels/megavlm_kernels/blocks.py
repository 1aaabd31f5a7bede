"""Element-wise work of plain torch on a CPU, cut into blocks of rows whose temporaries stay in the cache and are used again.

A chain of torch operations over a large tensor reads and writes memory once for each, and every new temporary costs page faults besides.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS = 1 << 18
"""1 MiB in fp32: a handful of temporaries of one block fits in the second and third level of cache."""
FEW_ELEMENTS = 1 << 16
"""Up to here torch's own operations with their autograd are quicker on a CPU than blocks of rows: no Python stands between them."""


def row_blocks(num_rows: int, width: int) -> Iterator[slice]:
    """Slices of rows with at most BLOCK_ELEMENTS elements each (or one row); all are equal but the last."""
    step = rows_per_block(num_rows, width)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def rows_per_block(num_rows: int, width: int) -> int:
    """Rows of the largest block."""
    return max(1, min(num_rows, BLOCK_ELEMENTS // max(1, width)))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for fp32 and below, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
