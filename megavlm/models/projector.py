"""Projector: visual features -> the LLM's width.

Shape legend: T tiles, F features of a tile, R rows that come out of the layers, N visual tokens, D encoder width, H LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.models.native import Grid
from megavlm.models.specs import DTYPES, LayerNorm, vision_transformer_config


def pixel_shuffle(x_TFD: torch.Tensor, factor: int, grid: Grid | None = None) -> torch.Tensor:
    """Merge factor x factor neighbours into the channel dimension: (T, rows x columns, D) -> (T, rows x columns / factor^2, D x factor^2).

    Channels are ordered row within the block, column within the block, channel. `grid` is (rows, columns); None: a square.

    Raises ValueError when the blocks do not tile the grid.
    """
    tiles, features, width = x_TFD.shape
    rows, columns = grid or (int(features**0.5),) * 2
    if rows % factor or columns % factor:
        raise ValueError(
            f"a picture of {rows} x {columns} patches does not divide into model.projector.pixel_shuffle={factor} squared blocks"
        )
    x = x_TFD.reshape(tiles, rows // factor, factor, columns // factor, factor, width)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(tiles, features // factor**2, factor * factor * width)


class Projector(MegatronModule):
    """(T, F, D) -> (N, H), one or two linear layers, tensor-parallel over the width between them; then, with LLaVA-NeXT's grids,
    the rows of tiles are put into the order of the picture with a learned `image_newline` at the end of each."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> None:
        config: TransformerConfig = vision_transformer_config(model.vision, precision, parallel, device)
        super().__init__(config=config)
        projector, output_size = model.projector, model.language.hidden_size
        self.factor = projector.pixel_shuffle
        input_size = model.vision.hidden_size * self.factor**2
        self.input_norm = LayerNorm(config, input_size).to(device) if projector.input_norm else None
        linear = {"config": config, "init_method": config.init_method, "bias": projector.bias}
        if projector.num_layers == 1:
            self.linear_1 = ColumnParallelLinear(input_size, output_size, gather_output=True, **linear)
            self.linear_2 = None
        else:
            middle = projector.hidden_size or output_size
            self.linear_1 = ColumnParallelLinear(input_size, middle, gather_output=False, **linear)
            self.linear_2 = RowParallelLinear(middle, output_size, input_is_parallel=True, skip_bias_add=False, **linear)
        self.image_newline = None
        if projector.image_newline:
            # Whole on every tensor rank; each computes its whole gradient, as for biases.
            self.image_newline = torch.nn.Parameter(torch.empty(output_size, dtype=DTYPES[precision.dtype], device=device))

    def forward(self, features: torch.Tensor, grids: Sequence[Grid] | None = None, rows_N: torch.Tensor | None = None) -> torch.Tensor:
        """Visual tokens (N, H), picture after picture.

        `features` is (T, F, D), or with `grids` (rows, columns of each picture) all patches end to end, (patches, D). `rows_N` says
        which row of the result each token takes, -1 being the image_newline; None: all rows in order.
        """
        x = self._shuffled(features, grids)
        if self.input_norm is not None:
            x = self.input_norm(x)
        x = x.unsqueeze(1)  # megatron-core's linear layers take (rows, batch, width)
        x, _ = self.linear_1(x)
        if self.linear_2 is not None:
            x, _ = self.linear_2(F.gelu(x))
        return self._arranged(x.squeeze(1), rows_N)

    def _shuffled(self, features: torch.Tensor, grids: Sequence[Grid] | None) -> torch.Tensor:
        """What the layers take, (R, width)."""
        if grids is None:
            x = features if self.factor == 1 else pixel_shuffle(features, self.factor)
            return x.flatten(0, 1)
        if self.factor == 1:
            return features
        pictures = features.split([rows * columns for rows, columns in grids])
        return torch.cat([pixel_shuffle(x.unsqueeze(0), self.factor, grid)[0] for x, grid in zip(pictures, grids, strict=True)])

    def _arranged(self, x_RH: torch.Tensor, rows_N: torch.Tensor | None) -> torch.Tensor:
        if self.image_newline is None:
            # Not x[rows]: that would take -1 for the last row.
            return x_RH if rows_N is None else x_RH.index_select(0, rows_N)
        # Joined even where no row ends: overlapped gradient reduction waits for the gradient of every weight.
        table = torch.cat([x_RH, self.image_newline.unsqueeze(0)])
        return table[:-1] if rows_N is None else table[rows_N]
