"""The vision transformers of Idefics2, Idefics3 and SmolVLM: SigLIP's layers, patches placed by fraction of the picture.

Source: transformers 5.23, models/idefics2, idefics3, smolvlm.
"""

from __future__ import annotations

from typing import Any

from megavlm.checkpoint.hf.encoders.base import EncoderKind
from megavlm.checkpoint.hf.encoders.clip import norm_links, patch_links, vit_block, vit_fields, vit_layers
from megavlm.checkpoint.hf.links import Link, plain
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import VisionConfig


class Idefics2Vision(EncoderKind):
    """https://arxiv.org/abs/2405.02246"""

    model_type = "idefics2_vision"

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        problems.only(config, "attention_dropout", 0.0, default=0.0, block="vision_config")
        own = {"class_token": False, "pre_norm": False, "patch_bias": True, "pooling_head": False, "positions": "bucketed"}
        return vit_fields(config, problems) | own

    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        return vit_block(vision, self.model_type)

    def links(self, vision: VisionConfig) -> list[Link]:
        return [
            *patch_links(vision, "embeddings.patch_embedding."),
            plain("position_embedding", "embeddings.position_embedding.weight", (vision.num_patches, vision.hidden_size)),
            *vit_layers(vision),
            *norm_links("final_norm.", "post_layernorm.", vision.hidden_size),
        ]


class Idefics3Vision(Idefics2Vision):
    """https://arxiv.org/abs/2408.12637"""

    model_type = "idefics3_vision"


class SmolVLMVision(Idefics2Vision):
    """https://arxiv.org/abs/2504.05299"""

    model_type = "smolvlm_vision"
