"""The LLMs inside Qwen2-VL, Qwen2.5-VL and Qwen3-VL: Qwen2 and Qwen3 with M-RoPE. Source: transformers 5.23, models/qwen2_vl, qwen3_vl.

They stand in no list of language models: transformers has no class for one of them alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

from megavlm.checkpoint.hf.language.base import LanguageKind
from megavlm.checkpoint.hf.language.llama import llama_block, llama_fields, llama_links
from megavlm.checkpoint.hf.language.windows import layerwise_block, layerwise_fields
from megavlm.checkpoint.hf.links import Link
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import LanguageConfig


class Qwen2VLText(LanguageKind):
    """https://arxiv.org/abs/2409.12191"""

    model_type, causal_class = "qwen2_vl_text", ""
    sections: ClassVar[list[int]] = [16, 24, 24]
    """What the class takes when its config says nothing."""

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        own = {"qkv_bias": True, "mrope_sections": list(config.rope_parameters.get("mrope_section", self.sections))}
        return llama_fields(config, problems) | own | layerwise_fields(config, problems)

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        block = llama_block(language, self.model_type) | layerwise_block(language)
        block["rope_parameters"] = block["rope_parameters"] | {"mrope_section": language.mrope_sections}
        return block

    def links(self, language: LanguageConfig) -> list[Link]:
        return llama_links(language)


class Qwen25VLText(Qwen2VLText):
    """https://arxiv.org/abs/2502.13923"""

    model_type = "qwen2_5_vl_text"


class Qwen3VLText(LanguageKind):
    """https://arxiv.org/abs/2511.21631"""

    model_type, causal_class = "qwen3_vl_text", ""
    sections: ClassVar[list[int]] = [24, 20, 20]

    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        problems.only(config, "attention_bias", False, default=False, block="text_config")
        sections = list(config.rope_parameters.get("mrope_section", self.sections))
        return llama_fields(config, problems) | {"qk_norm": True, "mrope_sections": sections, "mrope_interleaved": True}

    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        block = llama_block(language, self.model_type) | {"attention_bias": False, "head_dim": language.head_width}
        own = {"mrope_section": language.mrope_sections, "mrope_interleaved": True}
        block["rope_parameters"] = block["rope_parameters"] | own
        return block

    def links(self, language: LanguageConfig) -> list[Link]:
        return llama_links(language)
