"""SmolVLM (https://arxiv.org/abs/2504.05299): Idefics3 in small. Source: transformers 5.23, models/smolvlm."""

from __future__ import annotations

from megavlm.checkpoint.hf.families.idefics3 import Idefics3


class SmolVLM(Idefics3):
    """Other names, the same model; video is not read."""

    name, hf_class, processor_class = "smolvlm", "SmolVLMForConditionalGeneration", "SmolVLMProcessor"
    encoders = ("smolvlm_vision",)
