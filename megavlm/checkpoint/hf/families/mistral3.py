"""Mistral Small 3.1: Pixtral's encoder, patches merged by a linear layer. Source: transformers 5.23, models/mistral3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megavlm.checkpoint.hf.families.base import TokenIds
from megavlm.checkpoint.hf.families.llava import ACTIVATIONS
from megavlm.checkpoint.hf.families.pixtral import Pixtral
from megavlm.checkpoint.hf.links import Link, plain
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import ModelConfig


class Mistral3(Pixtral):
    """A norm, a merger back to the encoder's width, then LLaVA's MLP."""

    name, hf_class = "mistral3", "Mistral3ForConditionalGeneration"

    def handles(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == self.name

    def features(self, config: Any, vision: dict[str, Any], problems: Problems) -> dict[str, Any]:
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            problems.add(f"vision_feature_layer is {layer}, supported: one layer (the class's norm is one layer wide)")
            layer = -1
        return {"feature_layer": layer}

    def projector_from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        return {
            "num_layers": 2,
            "bias": bool(config.multimodal_projector_bias),
            "activation": problems.choice(config, "projector_hidden_act", ACTIVATIONS),
            "pixel_shuffle": config.spatial_merge_size,
            "merged_order": "channels",
            "merge_linear": True,
            "patch_norm": "rms_norm",
            "norm_eps": config.text_config.rms_norm_eps,
        }

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        values = super().config_to_hf(model, ids)
        del values["vision_feature_select_strategy"]
        return values | {"model_type": self.name, "spatial_merge_size": model.projector.pixel_shuffle}

    def projector_links(self, model: ModelConfig) -> list[Link]:
        width, merged = model.vision.hidden_size, model.vision.hidden_size * model.projector.pixel_shuffle**2
        return [
            plain("patch_norm.weight", "norm.weight", (width,)),
            plain("merge_linear.weight", "patch_merger.merging_layer.weight", (width, merged)),
            *super().projector_links(model),
        ]
