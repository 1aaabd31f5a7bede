"""Vision encoder: a pre-norm vision transformer on megatron-core layers, tensor-parallel, pictures packed end to end.

The packing of NaViT (https://arxiv.org/abs/2307.06304, section 2): every picture, and every tile, is one segment of one sequence.

Shape legend: T tiles, C channels, X pixels of all pictures, N patches of all pictures, M rows of all pictures with class and register
tokens, D encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from megavlm.config.schema import ParallelConfig, PrecisionConfig, VisionConfig
from megavlm.config.vision import ROTARY_POSITIONS
from megavlm.models.layers.attention import AttentionStyle
from megavlm.models.layers.compiled import compile_mlps
from megavlm.models.layers.configs import DTYPES, vision_transformer_config
from megavlm.models.layers.norms import NORMS
from megavlm.models.layers.run import run_layers
from megavlm.models.layers.specs import LayerStyle, block_spec, layer_spec, post_of
from megavlm.models.vision.attention import EncoderAttention, PlainOutputAttention, WideNormAttention
from megavlm.models.vision.features import Features
from megavlm.models.vision.pictures import Grid, check_pixels
from megavlm.models.vision.pooling import PoolingHead
from megavlm.models.vision.positions import POSITIONS, interpolated_positions
from megavlm.models.vision.rotary import rotary_tables
from megavlm.models.vision.windows import layer_packings
from megavlm_kernels.normalise_patchify import patches_of_pictures, patches_of_tiles


class VisionEncoder(MegatronModule):
    """uint8 tiles (T, C, side, side), or with `grids` pictures in their own size -> `Features`.

    Weights that the configured features never read (layers above them, an unused final norm or pooling head) are built all the same and
    stay frozen, so that an imported checkpoint is exported again without loss.
    """

    def __init__(self, vision: VisionConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> None:
        config = vision_transformer_config(vision, precision, parallel, device)
        super().__init__(config=config)
        self.vision = vision
        dtype, width = DTYPES[precision.dtype], vision.hidden_size
        new: dict[str, Any] = {"dtype": dtype, "device": device}
        inputs = vision.num_channels * vision.temporal_patch_size * vision.patch_size_px**2
        self.patch_embedding = torch.nn.Linear(inputs, width, bias=vision.patch_bias, **new)
        self.position_embedding = None
        if vision.num_position_rows:
            rows = vision.num_position_rows + int(vision.class_token)
            self.position_embedding = torch.nn.Parameter(torch.empty(rows, width, **new))
        self.class_embedding = torch.nn.Parameter(torch.empty(width, **new)) if vision.class_token else None
        self.register_tokens = None
        if vision.num_register_tokens:
            self.register_tokens = torch.nn.Parameter(torch.empty(vision.num_register_tokens, width, **new))
        self.mask_token = torch.nn.Parameter(torch.empty(width, **new)) if vision.mask_token else None
        norm = NORMS[vision.norm]
        # Transformer Engine's layers cannot be traced.
        config.local_layers = config.local_layers or precision.compile_encoder
        self.pre_norm = norm(config, width, vision.norm_eps).to(device) if vision.pre_norm else None
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(config, layer_spec(vision_style(vision), local=config.local_layers), norm=vision.norm),
            pre_process=True,
            post_process=True,
            post_layer_norm=False,
        )
        if precision.compile_encoder:
            compile_mlps(self.decoder, device)
        self.final_norm = norm(config, width, vision.norm_eps).to(device) if vision.has_final_norm else None
        self.pooling_head = PoolingHead(vision, new) if vision.pooling_head else None
        mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (vision.image_mean, vision.image_std))
        # Plain tensors, not buffers: they are settings, and a bf16 cast of the module must not round them.
        self._mean, self._inverse_std = mean * 255.0, 1.0 / (std * 255.0)

    def forward(self, pixels: torch.Tensor, grids: Sequence[Grid] | None = None) -> Features:
        """Features of every picture, in order. There must be at least one.

        Without `grids`, `pixels` are tiles (T, C, side, side). With them, (rows, columns) of patches of each picture, they are flat (X,),
        each picture (C, height, width).
        """
        patches_N, grids = self._patches(pixels, grids)
        x_ND = self.patch_embedding(patches_N)
        if self.position_embedding is not None:
            x_ND = x_ND + self._positions(self.position_embedding, grids)
        lengths = [rows * columns for rows, columns in grids]
        x_MD, rows_M = self._with_extra_tokens(x_ND, lengths)
        if self.pre_norm is not None:
            x_MD = self.pre_norm(x_MD)
        taken, deep = self._layers(x_MD, grids, rows_M)
        features = torch.cat(taken, dim=-1)
        if self.vision.final_norm:
            assert self.final_norm is not None
            features = self.final_norm(features)
        selected = self._selected(features, lengths, list(grids))
        selected.deep = deep
        if self.vision.pooled:
            assert self.pooling_head is not None
            return Features(self.pooling_head(selected.x_ND, selected.lengths), selected.grids, [1] * len(grids))
        return selected

    def _layers(self, x_MD: torch.Tensor, grids: Sequence[Grid], rows_M: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Hidden states (M, D) of the feature layers, and of those whose features go past the projector (DeepStack)."""
        vision = self.vision
        rotary = {"global": rotary_tables(vision, grids, x_MD.device)} if vision.positions in ROTARY_POSITIONS else {}
        packing, windows = layer_packings(vision, grids, rows_M, rotary, x_MD.device)
        if windows is not None:
            x_MD = windows.order(x_MD)
        taps = (*vision.feature_layers, *(layer + 1 for layer in vision.deepstack_layers))
        _, taken = run_layers(self.decoder, x_MD.unsqueeze(1), packing, num_layers=vision.num_used_layers, taps=taps)
        states = [x.squeeze(1) if windows is None else windows.back(x.squeeze(1)) for x in taken]
        return states[: len(vision.feature_layers)], states[len(vision.feature_layers) :]

    def patchify(self, tiles_TCHW: torch.Tensor) -> torch.Tensor:
        """uint8 tiles -> normalised patches (T, P, C x frames x patch x patch) in the encoder's dtype, channels first in each patch."""
        count, _, height, width = tiles_TCHW.shape
        patches_NE = patches_of_tiles(tiles_TCHW, *self._patching(), **self._patch_order())
        return patches_NE.view(count, height // self.vision.patch_size_px * (width // self.vision.patch_size_px), -1)

    def _patches(self, pixels: torch.Tensor, grids: Sequence[Grid] | None) -> tuple[torch.Tensor, list[Grid]]:
        """All patches end to end (N, values), and each picture's grid.

        Raises ValueError when there are not as many pixels as the grids say.
        """
        size = self.vision.patch_size_px
        if grids is None:
            grid = (pixels.shape[2] // size, pixels.shape[3] // size)
            return patches_of_tiles(pixels, *self._patching(), **self._patch_order()), [grid] * pixels.shape[0]
        check_pixels(pixels, grids, self.vision.num_channels, size)
        return patches_of_pictures(pixels, grids, *self._patching(), **self._patch_order()), list(grids)

    def _patching(self) -> tuple[torch.Tensor, torch.Tensor, int, torch.dtype]:
        return self._mean, self._inverse_std, self.vision.patch_size_px, self.config.params_dtype

    def _patch_order(self) -> dict[str, Any]:
        return {"frames": self.vision.temporal_patch_size, "channels_last": self.vision.patch_channels_last}

    def _positions(self, table: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """(N, D): position vectors of all patches."""
        place = POSITIONS[self.vision.positions]
        if place is interpolated_positions:
            place = partial(interpolated_positions, method=self.vision.position_interpolation)
        own = {grid: place(table[int(self.vision.class_token) :], *grid) for grid in set(grids)}
        if len(own) == 1:
            return own[grids[0]].repeat(len(grids), 1)
        return torch.cat([own[grid] for grid in grids])

    def _with_extra_tokens(self, x_ND: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Class and register tokens before the patches of each picture: (M, D) and rows of each picture."""
        first = []
        if self.class_embedding is not None:
            own = self.class_embedding if self.position_embedding is None else self.class_embedding + self.position_embedding[0]
            first.append(own.unsqueeze(0))
        if self.register_tokens is not None:
            first.append(self.register_tokens)
        if not first:
            return x_ND, lengths
        extra = torch.cat(first)
        if len(set(lengths)) == 1:
            before = extra.expand(len(lengths), -1, -1)
            x_MD = torch.cat([before, x_ND.view(len(lengths), lengths[0], -1)], dim=1).flatten(0, 1)
            return x_MD, [length + extra.shape[0] for length in lengths]
        x_MD = torch.cat([part for picture in x_ND.split(lengths) for part in (extra, picture)])
        return x_MD, [length + extra.shape[0] for length in lengths]

    def _selected(self, x_MD: torch.Tensor, lengths: list[int], grids: list[Grid]) -> Features:
        """Drop what is no feature: register tokens, and the class token unless it is kept."""
        vision = self.vision
        extra = int(vision.class_token) + vision.num_register_tokens
        if not extra:
            return Features(x_MD, grids, lengths)
        keeps = vision.class_token and vision.keep_class_token
        kept_lengths = [length + int(keeps) for length in lengths]
        if len(set(lengths)) == 1:
            x_TMD = x_MD.view(len(lengths), lengths[0] + extra, -1)
            x_TMD = torch.cat([x_TMD[:, :1], x_TMD[:, extra:]], dim=1) if keeps and extra > 1 else x_TMD if keeps else x_TMD[:, extra:]
            return Features(x_TMD.flatten(0, 1), grids, kept_lengths)
        parts = []
        for picture in x_MD.split([length + extra for length in lengths]):
            parts += [picture[:1], picture[extra:]] if keeps else [picture[extra:]]
        return Features(torch.cat(parts), grids, kept_lengths)

    def untrained_parameters(self) -> set[torch.nn.Parameter]:
        """Parameters that no gradient can reach: they are frozen whatever the recipe says."""
        unused: set[torch.nn.Parameter] = set()
        for layer in list(self.decoder.layers)[self.vision.num_used_layers :]:
            unused |= set(layer.parameters())
        if self.final_norm is not None and not self.vision.final_norm:
            unused |= set(self.final_norm.parameters())
        if self.pooling_head is not None and not self.vision.pooled:
            unused |= set(self.pooling_head.parameters())
        if self.mask_token is not None:
            unused.add(self.mask_token)
        return unused


def vision_style(vision: VisionConfig) -> LayerStyle:
    """The encoder's layers by what its config says."""
    return LayerStyle(
        causal=False,
        norm=vision.norm,
        post=post_of(scale=vision.layer_scale),
        attention=AttentionStyle(),
        self_attention=WideNormAttention if vision.qk_norm else EncoderAttention if vision.attention_output_bias else PlainOutputAttention,
    )
