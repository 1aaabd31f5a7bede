"""Prompts: token ids with expanded placeholders, and pixels; what generation and comparisons of logits feed a model.

Shape legend: L tokens of a prompt, S tokens of all prompts, T tiles, C channels, X pixels of all pictures, N visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megavlm.config.schema import ModelConfig
from megavlm.data.types import PackedBatch, PictureTiles, SampleRef


@dataclass(frozen=True)
class Prompt:
    """What one sequence starts from."""

    ids: Sequence[int]
    """Token ids; each picture's placeholder stands there once per visual token (`Chat.encode_prompt` does this)."""
    tiles_TCHW: torch.Tensor | None = None
    """uint8 tiles of all pictures of the prompt, in order; None: no picture, or native resolution."""
    pixels_X: torch.Tensor | None = None
    """Native resolution only: uint8, all pictures one after another, each (C, H, W) flattened."""
    tile_grids: list[tuple[int, int]] | None = None
    """Native resolution only: (rows, columns) of patches of each picture."""
    feature_rows_N: torch.Tensor | None = None
    """int64: row of this prompt's projected features that each visual token takes, -1 the image_newline; None: all rows in order."""

    tiles_per_picture: list[int] | None = None
    """Tiles of each picture, in order; None: native resolution, or not known (each tile a picture)."""
    picture_tiles: list[PictureTiles] | None = None
    """How each picture was cut; None: native resolution, or each tile is a picture."""
    instructions: list[list[int]] | None = None
    """Of each picture, the text that goes with it in the projector's own vocabulary (InstructBLIP)."""
    sizes: list[tuple[int, int]] | None = None
    """(width, height) of each picture as it was decoded; some Hugging Face processors hand them on."""

    @property
    def num_tiles(self) -> int:
        """Tiles, or with native resolution pictures."""
        if self.tile_grids is not None:
            return len(self.tile_grids)
        return 0 if self.tiles_TCHW is None else len(self.tiles_TCHW)

    @property
    def cuts(self) -> list[PictureTiles]:
        """How each picture was cut, without native resolution."""
        return self.picture_tiles if self.picture_tiles is not None else [PictureTiles(1, 1, 1)] * self.num_tiles

    def num_placeholders(self, model: ModelConfig) -> int:
        """Tokens that stand for the pictures when no feature is left out or repeated."""
        if model.language.cross_attention is None:
            return self.num_feature_rows(model)
        return len(self.tile_grids) if self.tile_grids is not None else len(self.cuts)

    def num_feature_rows(self, model: ModelConfig) -> int:
        """Rows that the projector makes of the pictures."""
        if self.tile_grids is not None:
            return sum(model.visual_tokens(rows, columns) for rows, columns in self.tile_grids)
        return self.num_tiles * model.visual_tokens_per_tile


def prompt_batch(prompts: Sequence[Prompt], image_token_id: int, model: ModelConfig) -> PackedBatch:
    """All prompts end to end in one `PackedBatch` without targets; what generation and logit comparisons feed the model."""
    ids = [torch.as_tensor(list(p.ids), dtype=torch.int64) for p in prompts]
    tokens_S = torch.cat(ids)
    batch = token_batch(tokens_S, torch.cat([torch.arange(len(i)) for i in ids]), [len(i) for i in ids])
    return replace(
        batch,
        image_positions_N=torch.nonzero(tokens_S == image_token_id).squeeze(1),
        num_tiles=sum(p.num_tiles for p in prompts),
        tiles_TCHW=_joined([p.tiles_TCHW for p in prompts]),
        pixels_X=_joined([p.pixels_X for p in prompts]),
        tile_grids=[grid for p in prompts for grid in p.tile_grids or ()] if any(p.tile_grids for p in prompts) else None,
        picture_tiles=None if any(p.tile_grids for p in prompts) else [cut for p in prompts for cut in p.cuts],
        feature_rows_N=_joined(_feature_rows(prompts, model)),
        **instruction_fields([own for p in prompts for own in p.instructions or ()]),
    )


def instruction_fields(instructions: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Fields of a PackedBatch from the instruction of each picture; {} where there are none."""
    if not instructions:
        return {}
    ids = torch.tensor([token for own in instructions for token in own], dtype=torch.int64)
    return {"instruction_ids_W": ids, "instruction_lengths": [len(own) for own in instructions]}


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [part for part in parts if part is not None and len(part)]
    return torch.cat(present) if present else None


def _feature_rows(prompts: Sequence[Prompt], model: ModelConfig) -> list[torch.Tensor | None]:
    """Rows of the whole batch's projected features instead of each prompt's own."""
    if all(p.feature_rows_N is None for p in prompts):
        return []
    found: list[torch.Tensor | None] = []
    start = 0
    for prompt in prompts:
        made = prompt.num_feature_rows(model)
        rows = torch.arange(made) if prompt.feature_rows_N is None else prompt.feature_rows_N
        found.append(torch.where(rows < 0, rows, rows + start))
        start += made
    return found


def token_batch(tokens_S: torch.Tensor, positions_S: torch.Tensor, lengths: list[int]) -> PackedBatch:
    """Tokens without pictures or targets."""
    none = torch.empty(0, dtype=torch.int64)
    return PackedBatch(
        tokens_S=tokens_S,
        positions_S=positions_S,
        segment_lengths=lengths,
        segment_samples=[SampleRef("prompt", i) for i in range(len(lengths))],
        segment_tasks=[""] * len(lengths),
        target_positions_Q=none,
        target_ids_Q=none,
        target_weights_Q=torch.empty(0),
        target_segments_Q=none,
        image_positions_N=none,
        num_tiles=0,
    )
