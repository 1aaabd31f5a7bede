"""The encoder alone with a linear head, for pretraining it by classifying labelled patches.

Shape legend: N patches of all tiles, D feature width, Q labelled patches.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule

from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.data.types import PackedBatch
from megavlm.models.language import weight_of
from megavlm.models.layers.configs import DTYPES
from megavlm.models.vision import build_encoder
from megavlm.models.vlm import TargetLoss
from megavlm.parallel.context import ParallelContext
from megavlm.parallel.step_parts import turn_on_gradient
from megavlm.tracking.timers import part
from megavlm_kernels.linear_cross_entropy import linear_cross_entropy


class VisionClassifier(MegatronModule):
    """`vision` is the encoder as the VLM has it; `vision_head` is dropped after the stage."""

    def __init__(
        self,
        model: ModelConfig,
        precision: PrecisionConfig,
        parallel: ParallelConfig,
        ctx: ParallelContext,
        num_classes: int,
        z_loss: float = 0.0,
    ) -> None:
        vision = build_encoder(model, precision, parallel, ctx.device)
        super().__init__(config=vision.config)
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        self.vision, self.z_loss = vision, z_loss
        self.vision_head = torch.nn.Linear(model.feature_size, num_classes, bias=False, dtype=DTYPES[precision.dtype], device=ctx.device)

    def set_input_tensor(self, tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """The encoder has no earlier pipeline stage."""

    def forward(self, batch: PackedBatch) -> TargetLoss:
        """Loss of each labelled patch; rows are the patches of all tiles in order."""
        assert batch.tiles_TCHW is not None, "classification needs the tiles of its batch"
        with part("encoder"):
            features_ND = self.vision(batch.tiles_TCHW).x_ND
        turn_on_gradient(features_ND, "encoder_backward")
        if self.vision.vision.class_token and self.vision.vision.keep_class_token:
            features_ND = features_ND.view(batch.num_tiles, -1, features_ND.shape[-1])[:, 1:].flatten(0, 1)
        with part("head"):
            hidden_QD = features_ND[batch.target_positions_Q]
            weight = weight_of(self.vision_head)
            found = linear_cross_entropy(hidden_QD, weight, batch.target_ids_Q, batch.target_weights_Q, z_loss=self.z_loss)
        return TargetLoss(*found, slice(None))
