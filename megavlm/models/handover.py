"""What a pipeline stage hands to the next: its hidden states, and below them the visual features that later layers still read.

Features for layers of later stages (cross-attention, DeepStack) cannot be computed there: encoder and projector stand on the first
stage. So they travel as further rows of the one tensor that stages exchange, and their gradients come back the same way. Every stage
computes from the batch alone how many rows of which kind arrive, so none are announced.

In training all microbatches of a step are padded to the rows of the largest. megatron-core could tell each message's shape beforehand
instead (`variable_seq_lengths`); that costs a message and a device synchronisation for every message, and its interleaved schedule would
take one neighbour's shape for the other's where both are the same rank, because shapes go out in one batch.

Hidden states are this rank's rows (context and sequence parallelism cut them). Side rows are whole on every rank: what reads them must
give each tensor rank the whole gradient (a layer that reads part of them scatters a whole tensor; its backward pass gathers), while
context ranks may differ, since gradients are summed over them.

Shape legend: L this rank's rows of the sequence, M rows of one side tensor, R rows of a message, D LLM width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from megavlm.config.schema import ModelConfig
from megavlm.data.types import PackedBatch
from megavlm.models.language.cross import PICTURES, picture_rows

Sides = dict[str, torch.Tensor]
"""Name -> rows (M, 1, D) that layers further up read."""


def side_rows(model: ModelConfig, batch: PackedBatch, layers_done: int) -> dict[str, int]:
    """Name -> M of the side tensors that the layers after the first `layers_done` read, in the order in which they travel."""
    layers = 0 if model.text_only else len(model.vision.deepstack_layers)
    rows = {deepstack_side(i): batch.image_positions_N.numel() for i in range(layers_done, layers)}
    cross = model.language.cross_attention
    if cross is not None and max(cross.layers) >= layers_done:
        rows[PICTURES] = sum(total for _, total in picture_rows(model, batch))
    return rows


def deepstack_side(number: int) -> str:
    """Name of what DeepStack adds to visual tokens behind the LLM's layer `number`, counted from 0."""
    return f"deepstack_{number}"


def join(x_LBD: torch.Tensor, sides: Mapping[str, torch.Tensor], rows: Mapping[str, int]) -> torch.Tensor:
    """(R, 1, D): hidden states, then those of `sides` that `rows` names."""
    return torch.cat([x_LBD, *(sides[name].to(x_LBD.dtype) for name in rows)]) if rows else x_LBD


def part(received_RBD: torch.Tensor, num_rows: int, rows: Mapping[str, int]) -> tuple[torch.Tensor, Sides]:
    """(hidden states (L, 1, D), side tensors): the way back of `join`, `num_rows` being L; padding at the end is left out."""
    if not rows and received_RBD.shape[0] == num_rows:
        return received_RBD, {}
    x_LBD, *parts = received_RBD[: num_rows + sum(rows.values())].split([num_rows, *rows.values()])
    return x_LBD, dict(zip(rows, parts, strict=True))


def pad(x_RBD: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Rows of zeros below, up to `num_rows`."""
    missing = num_rows - x_RBD.shape[0]
    assert missing >= 0, f"a message of {x_RBD.shape[0]} rows, where the step's largest has {num_rows}"
    return F.pad(x_RBD, (0, 0, 0, 0, 0, missing)) if missing else x_RBD
