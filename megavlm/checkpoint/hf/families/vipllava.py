"""ViP-LLaVA (https://arxiv.org/abs/2312.00784): LLaVA on features of several layers, normed. Source: transformers 5.23, models/vipllava."""

from __future__ import annotations

from typing import Any

from megavlm.checkpoint.hf.families.base import TokenIds
from megavlm.checkpoint.hf.families.llava import ACTIVATIONS, Llava
from megavlm.checkpoint.hf.links import Link, plain
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import ModelConfig


class VipLlava(Llava):
    """Square tiles, one a picture; the class token is always dropped."""

    name, hf_class = "vipllava", "VipLlavaForConditionalGeneration"
    encoders = ("clip_vision_model",)

    def features(self, config: Any, vision: dict[str, Any], problems: Problems) -> dict[str, Any]:
        layer = config.vision_feature_layer
        return {"feature_layer": list(layer) if isinstance(layer, list | tuple) else layer, "keep_class_token": False}

    def projector_from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        activation = problems.choice(config, "projector_hidden_act", ACTIVATIONS)
        return {"num_layers": 2, "bias": True, "activation": activation, "input_norm": True, "norm_eps": config.projector_layernorm_eps}

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        values = super().config_to_hf(model, ids) | {"projector_layernorm_eps": model.projector.norm_eps}
        return {
            name: value for name, value in values.items() if name not in ("multimodal_projector_bias", "vision_feature_select_strategy")
        }

    def projector_links(self, model: ModelConfig) -> list[Link]:
        norm = [plain(f"input_norm.{part}", f"projector_layernorm.{part}", (model.vision.feature_size,)) for part in ("weight", "bias")]
        return [*norm, *super().projector_links(model)]
