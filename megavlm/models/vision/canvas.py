"""An encoder that sees a picture's tiles together: Llama 3.2 Vision's. Source: transformers 5.23, models/mllama.

Every picture is filled up to `max_tiles` tiles, and every tile to a multiple of 8 rows. What is filled in has no content, but is there:
rows of the picture attend to it, and it attends to rows of the picture, only not to what else is filled in. The published weights were
trained so. Here filled-in rows stand behind the picture's own, so that two attention calls a picture take the place of a mask.

Shape legend: T tiles, I pictures, J tiles of a canvas, P patches of a tile, E rows of a tile (class token and patches), R rows of a tile
when filled up, M rows of all canvases, D encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock

from megavlm.config.schema import ParallelConfig, PrecisionConfig, VisionConfig
from megavlm.data.types import PictureTiles
from megavlm.models.layers.configs import DTYPES, vision_transformer_config
from megavlm.models.layers.gates import TanhGate
from megavlm.models.layers.masks import Piece
from megavlm.models.layers.packing import Packing, pack
from megavlm.models.layers.run import run_layers
from megavlm.models.layers.specs import block_spec, layer_spec
from megavlm.models.vision.encoder import VisionEncoder, vision_style
from megavlm.models.vision.features import Features
from megavlm.parallel.host import on_device

ROW_MULTIPLE = 8
"""Rows of a tile are filled up to a multiple of this; a class token and n x n patches never are one."""


@dataclass
class _Order:
    """Rows of the canvases, each picture's own before what is filled in."""

    rows_M: torch.Tensor
    """Which row of (I, J, R) stands where."""
    tile_M: torch.Tensor
    """Which tile of (I, J) that row belongs to."""
    back: torch.Tensor
    """(I x J x E): where the class token and patches of each tile stand, filled-in tiles too."""
    packing: Packing


class CanvasEncoder(VisionEncoder):
    """uint8 tiles (T, C, side, side) and how each picture was cut -> `Features` of all tiles of all canvases."""

    def __init__(self, vision: VisionConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> None:
        super().__init__(vision, precision, parallel, device)
        assert vision.canvas is not None
        self.canvas = vision.canvas
        width, rows, tiles = vision.hidden_size, len(self.canvas.grids) + 1, self.canvas.max_tiles
        new: dict[str, Any] = {"dtype": DTYPES[precision.dtype], "device": device}
        # One vector for each row of each tile of each grid; grid 0 is no picture at all.
        self.tile_position_embedding = torch.nn.Parameter(torch.empty(rows, tiles * (vision.num_patches + 1) * width, **new))
        self.position_gate = torch.nn.Parameter(torch.empty(1, **new))
        self.pre_tile_position_embedding = torch.nn.Parameter(torch.empty(rows, tiles * width, **new))
        self.pre_tile_gate = torch.nn.Parameter(torch.empty(1, **new))
        self.post_tile_position_embedding = torch.nn.Parameter(torch.empty(rows, tiles * width, **new))
        self.post_tile_gate = torch.nn.Parameter(torch.empty(1, **new))
        config = vision_transformer_config(
            vision.model_copy(update={"num_layers": self.canvas.num_global_layers}), precision, parallel, device
        )
        self.global_decoder = TransformerBlock(
            config=config,
            spec=block_spec(
                config, layer_spec(replace(vision_style(vision), post=TanhGate), local=precision.wants_local_layers), norm=vision.norm
            ),
            pre_process=True,
            post_process=True,
            post_layer_norm=False,
        )

    def forward(self, pixels: torch.Tensor, grids: Sequence[PictureTiles] | None = None) -> Features:  # type: ignore[override]
        """Features of every tile of every canvas, in order; without `grids` each tile is a picture.

        Raises ValueError when the tiles are not those that `grids` tell, or a picture is no grid of at most `max_tiles` tiles.
        """
        grids = [PictureTiles(1, 1, 1)] * pixels.shape[0] if grids is None else grids
        ids = on_device([self._grid_number(grid) for grid in grids], pixels.device)
        if sum(grid.tiles for grid in grids) != pixels.shape[0]:
            raise ValueError(f"{pixels.shape[0]} tiles, but the pictures of the batch have {sum(grid.tiles for grid in grids)}")
        x_IJED = self._embedded(pixels, grids, ids)
        count, tiles, rows, width = x_IJED.shape
        filled = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
        order = _order(grids, tiles, rows, filled, pixels.device)
        x_MD = torch.nn.functional.pad(x_IJED, (0, 0, 0, filled - rows)).reshape(-1, width)[order.rows_M]
        x_MBD, taken = run_layers(self.decoder, x_MD.unsqueeze(1), order.packing, taps=self.vision.feature_layers)
        assert self.final_norm is not None
        tile_places = self.post_tile_position_embedding[ids].view(count * tiles, width) * self.post_tile_gate.tanh()
        x_MBD = self.final_norm(x_MBD) + tile_places[order.tile_M].unsqueeze(1)
        x_MBD, _ = run_layers(self.global_decoder, x_MBD, order.packing)
        states = [x.squeeze(1)[order.back] for x in (x_MBD, *taken)]
        # Hidden states channel by channel: all that stand for channel 0, then those for channel 1, ...
        features = torch.cat([states[0], torch.stack(states[1:], dim=-1).flatten(-2)], dim=-1)
        side = self.vision.grid_side
        return Features(features, [(side, side)] * (count * tiles), [rows] * (count * tiles))

    def untrained_parameters(self) -> set[torch.nn.Parameter]:
        """None: every weight is read."""
        return set()

    def _grid_number(self, grid: PictureTiles) -> int:
        if grid.tiles != grid.rows * grid.columns or (grid.rows, grid.columns) not in self.canvas.grids:
            raise ValueError(
                f"a picture of {grid.tiles} tiles in {grid.rows} x {grid.columns}, but model.vision.canvas knows grids of at most "
                f"{self.canvas.max_tiles} tiles without a thumbnail: use data.image.policy=canvas"
            )
        return self.canvas.grids.index((grid.rows, grid.columns)) + 1

    def _embedded(self, pixels: torch.Tensor, grids: Sequence[PictureTiles], ids_I: torch.Tensor) -> torch.Tensor:
        """(I, J, E, D): class tokens and patches with all their positions, normed."""
        assert self.class_embedding is not None and self.position_embedding is not None and self.pre_norm is not None
        count, tiles, width = len(grids), self.canvas.max_tiles, self.vision.hidden_size
        slots_T = on_device([i * tiles + j for i, grid in enumerate(grids) for j in range(grid.tiles)], pixels.device)
        patches_TPD = self.patch_embedding(self.patchify(pixels))
        empty = patches_TPD.new_zeros(count * tiles, *patches_TPD.shape[1:])
        x = empty.index_copy(0, slots_T, patches_TPD).view(count, tiles, -1, width)
        x = x + self.pre_tile_position_embedding[ids_I].view(count, tiles, 1, width) * self.pre_tile_gate.tanh()
        x = torch.cat([self.class_embedding.expand(count, tiles, 1, -1), x], dim=2)
        gate = self.position_gate.tanh()
        x = x + (1 - gate) * self.position_embedding
        x = x + gate * self.tile_position_embedding[ids_I].view(count, tiles, -1, width)
        embedded: torch.Tensor = self.pre_norm(x)
        return embedded


def _order(grids: Sequence[PictureTiles], tiles: int, rows: int, filled: int, device: torch.device) -> _Order:
    """How the rows of all canvases are laid out, and what they see."""
    found, pieces = [], []
    size = tiles * filled
    row = torch.arange(size)
    for number, grid in enumerate(grids):
        is_own = (row // filled < grid.tiles) & (row % filled < rows)
        found.append(torch.cat([row[is_own], row[~is_own]]) + number * size)
        start, own = number * size, int(is_own.sum())
        pieces += [Piece(start, own, start, size, start), Piece(start + own, size - own, start, own, start + own)]
    rows_M = torch.cat(found)
    place = torch.empty_like(rows_M)
    place[rows_M] = torch.arange(rows_M.numel())
    packing = pack([size] * len(grids), device, causal=False)
    packing.pieces = tuple(p for p in pieces if p.query_length)
    back = place.view(-1, filled)[:, :rows].flatten()
    return _Order(rows_M.to(device), (rows_M // filled).to(device), back.to(device), packing)
