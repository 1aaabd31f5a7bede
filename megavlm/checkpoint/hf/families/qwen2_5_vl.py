"""Qwen2.5-VL (https://arxiv.org/abs/2502.13923): an encoder with windows of attention. Source: transformers 5.23, models/qwen2_5_vl."""

from __future__ import annotations

from typing import Any, ClassVar

from megavlm.checkpoint.hf.encoders.qwen import Qwen25VLVision
from megavlm.checkpoint.hf.families.qwen2_vl import Qwen2VL
from megavlm.checkpoint.hf.language.qwen_vl import Qwen25VLText
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import ModelConfig


class Qwen25VL(Qwen2VL):
    """The names on the disk are Qwen2-VL's."""

    name, hf_class, processor_class = "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"
    vision_kind, text_kind = Qwen25VLVision(), Qwen25VLText()
    patch_norm: ClassVar[str] = "rms_norm"

    def model_from_hf(self, config: Any, problems: Problems) -> ModelConfig:
        block = config.vision_config
        if block.window_size % (block.patch_size * block.spatial_merge_size):
            problems.add(
                f"vision_config.window_size is {block.window_size}, supported: multiples of the "
                f"{block.patch_size * block.spatial_merge_size} pixels of a block of patches"
            )
            problems.check("config.json")
        return super().model_from_hf(config, problems)

    def projected_size(self, block: Any) -> int:
        return int(block.out_hidden_size)

    def projected(self, model: ModelConfig) -> dict[str, Any]:
        return {"out_hidden_size": model.language.hidden_size}
