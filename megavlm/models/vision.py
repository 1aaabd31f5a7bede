"""Vision encoder: a pre-LayerNorm vision transformer on megatron-core layers, tensor-parallel, pictures packed end to end.

Shape legend: T tiles, C channels, P patches of a tile, E patches plus class token, D encoder width, X pixels of all pictures,
N patches of all pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from megavlm.config.schema import ParallelConfig, PrecisionConfig, VisionConfig
from megavlm.models.native import Grid, interpolated_positions, split_pictures
from megavlm.models.packing import pack
from megavlm.models.specs import DTYPES, LayerNorm, block_spec, layer_spec, recompute_input, vision_transformer_config


class VisionEncoder(MegatronModule):
    """uint8 tiles (T, C, side, side) -> features (T, num_features, D); or, with `grids`, pictures in their own size -> (N, D).

    Weights that the configured feature layer never reads (layers above it, a pooling head) are `carried`: frozen, outside
    the computation, kept so that an imported checkpoint is exported again without loss. Their names and shapes come from
    the family (`carried_shapes`).
    """

    def __init__(
        self,
        vision: VisionConfig,
        precision: PrecisionConfig,
        parallel: ParallelConfig,
        device: torch.device,
        carried_shapes: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        config = vision_transformer_config(vision, precision, parallel, device)
        super().__init__(config=config)
        self.vision = vision
        dtype, width = DTYPES[precision.dtype], vision.hidden_size
        new = {"dtype": dtype, "device": device}
        self.patch_embedding = torch.nn.Linear(
            vision.num_channels * vision.patch_size_px**2, width, bias=vision.patch_bias, dtype=dtype, device=device
        )
        self.position_embedding = torch.nn.Parameter(torch.empty(vision.num_patches + int(vision.class_token), width, **new))
        self.class_embedding = torch.nn.Parameter(torch.empty(width, **new)) if vision.class_token else None
        self.pre_norm = LayerNorm(config, width, vision.norm_eps).to(device) if vision.pre_norm else None
        layer = layer_spec(causal=False, rms_norm=False)
        self.decoder = TransformerBlock(
            config=config, spec=block_spec(config, layer, rms_norm=False), pre_process=True, post_process=True, post_layer_norm=False
        )
        self.final_norm = LayerNorm(config, width, vision.norm_eps).to(device)
        self.carried = torch.nn.ParameterDict(
            {
                carried_name(name): torch.nn.Parameter(torch.empty(shape, **new), requires_grad=False)
                for name, shape in (carried_shapes or {}).items()
            }
        )
        mean, std = (torch.tensor(v, dtype=torch.float32, device=device).view(1, -1, 1, 1) for v in (vision.image_mean, vision.image_std))
        # Plain tensors, not buffers: they are settings, and a bf16 cast of the module must not round them.
        self._mean, self._inverse_std = mean * 255.0, 1.0 / (std * 255.0)

    def patchify(self, tiles_TCHW: torch.Tensor) -> torch.Tensor:
        """uint8 tiles -> normalised patches (T, P, C x patch x patch) in the encoder's dtype, channels first in each patch."""
        size = self.vision.patch_size_px
        pixels = (tiles_TCHW.float() - self._mean) * self._inverse_std
        patches = pixels.unfold(2, size, size).unfold(3, size, size)  # T, C, rows, columns, size, size
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2).to(self.config.params_dtype)

    def forward(self, pixels: torch.Tensor, grids: Sequence[Grid] | None = None) -> torch.Tensor:
        """Features of every tile, in order. There must be at least one.

        With `grids`, (rows, columns) of patches of each picture, `pixels` is flat (X,), each picture (C, height, width); the
        features of all patches come end to end, without class tokens.
        """
        if grids is not None:
            return self._native(pixels, grids)
        x = self.patch_embedding(self.patchify(pixels))
        num_tiles = x.shape[0]
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(num_tiles, 1, -1), x], dim=1)
        x = x + self.position_embedding
        length = x.shape[1]
        x = self._layers(x.flatten(0, 1), [length] * num_tiles).view(num_tiles, length, -1)
        if self.class_embedding is not None and not self.vision.keep_class_token:
            x = x[:, 1:]
        return x

    def _native(self, pixels_X: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Each picture one segment, with positions interpolated to its grid."""
        pictures = split_pictures(pixels_X, grids, self.vision.num_channels, self.vision.patch_size_px)
        patches = torch.cat([self.patchify(picture.unsqueeze(0))[0] for picture in pictures])
        extra = int(self.class_embedding is not None)
        table = self.position_embedding[extra:]
        positions = {grid: interpolated_positions(table, *grid) for grid in set(grids)}
        x_ND = self.patch_embedding(patches) + torch.cat([positions[grid] for grid in grids])
        lengths = [rows * columns for rows, columns in grids]
        if self.class_embedding is None:
            return self._layers(x_ND, lengths)
        first = (self.class_embedding + self.position_embedding[0]).unsqueeze(0)
        x = torch.cat([part for picture in x_ND.split(lengths) for part in (first, picture)])
        lengths = [length + 1 for length in lengths]
        return torch.cat([picture[1:] for picture in self._layers(x, lengths).split(lengths)])

    def _layers(self, x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Everything after the embeddings: rows of segments of `lengths`, which do not see each other."""
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        packing = pack(lengths, x.device, causal=False)
        x = self.decoder(recompute_input(x.unsqueeze(1), self.decoder), None, packed_seq_params=packing).squeeze(1)
        return self.final_norm(x) if self.vision.final_norm else x

    def untrained_parameters(self) -> set[torch.nn.Parameter]:
        """Parameters that no gradient can reach: they are frozen whatever the recipe says."""
        unused = set(self.carried.values())
        if not self.vision.final_norm:
            unused |= set(self.final_norm.parameters())
        return unused


def carried_name(name: str) -> str:
    """A carried weight's name as a parameter name (dots are not allowed in one)."""
    return name.replace(".", "__")
