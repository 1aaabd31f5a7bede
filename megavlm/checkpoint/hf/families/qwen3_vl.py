"""Qwen3-VL (https://arxiv.org/abs/2511.21631): DeepStack, interleaved M-RoPE, learned positions beside rotary ones. Source: transformers
5.23, models/qwen3_vl."""

from __future__ import annotations

from typing import Any, ClassVar

from megavlm.checkpoint.hf.encoders.qwen import Qwen3VLVision
from megavlm.checkpoint.hf.families.qwen2_vl import Qwen2VL, merger_links
from megavlm.checkpoint.hf.language.qwen_vl import Qwen3VLText
from megavlm.checkpoint.hf.links import Link
from megavlm.config.schema import ModelConfig


class Qwen3VL(Qwen2VL):
    """Dense LLMs; the class with experts is another."""

    name, hf_class, processor_class = "qwen3_vl", "Qwen3VLForConditionalGeneration", "Qwen3VLProcessor"
    renames = ()
    visual_prefix, language_prefix = "model.visual.", "model.language_model."
    vision_kind, text_kind = Qwen3VLVision(), Qwen3VLText()
    merger: ClassVar[dict[str, str]] = {
        "patch_norm": "merger.norm",
        "linear_1": "merger.linear_fc1",
        "linear_2": "merger.linear_fc2",
    }
    video_processor = "Qwen3VLVideoProcessor"

    def projected_size(self, block: Any) -> int:
        return int(block.out_hidden_size)

    def projected(self, model: ModelConfig) -> dict[str, Any]:
        return {"out_hidden_size": model.language.hidden_size}

    def merger_links(self, model: ModelConfig) -> list[Link]:
        found = super().merger_links(model)
        merged = model.vision.hidden_size * model.projector.pixel_shuffle**2
        for i in range(len(model.vision.deepstack_layers)):
            theirs = f"deepstack_merger_list.{i}."
            names = {"input_norm": f"{theirs}norm", "linear_1": f"{theirs}linear_fc1", "linear_2": f"{theirs}linear_fc2"}
            found += merger_links(model, f"deepstack_{i}.", names, merged)
        return found
