"""Language models alone: every class of `language/`, without pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megavlm.checkpoint.hf.families.base import Family, TokenIds, input_ids
from megavlm.checkpoint.hf.language import LANGUAGES, language, language_of
from megavlm.checkpoint.hf.links import Link, prefixed
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.data.prompt import Prompt


class CausalLM(Family):
    """Llama, Qwen and others without an encoder."""

    name, hf_class = "causal_lm", "AutoModelForCausalLM"

    def handles(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") in LANGUAGES

    def model_from_hf(self, config: Any, problems: Problems) -> ModelConfig:
        fields = language(config.model_type).from_hf(config, problems)
        return ModelConfig(family=self.name, text_only=True, language=LanguageConfig(**fields))

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        kind = language_of(model.language)
        return {"architectures": [kind.causal_class], **kind.to_hf(model.language), **ids.special()}

    def links(self, model: ModelConfig) -> list[Link]:
        kind = language_of(model.language)
        return [
            *prefixed(kind.links(model.language), "language.", "model."),
            *prefixed(kind.head(model.language, "lm_head.weight", "model.embed_tokens.weight"), "language.", ""),
        ]

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        return {"input_ids": input_ids(prompt)}
