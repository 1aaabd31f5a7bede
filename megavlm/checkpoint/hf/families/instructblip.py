"""InstructBLIP (https://arxiv.org/abs/2305.06500): BLIP-2 whose Q-Former also reads the question. Source: transformers 5.23,
models/instructblip.
"""

from __future__ import annotations

from typing import Any

import torch

from megavlm.checkpoint.hf.families.blip_2 import Blip2, qformer_of
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import ModelConfig
from megavlm.data.prompt import Prompt


class InstructBlip(Blip2):
    """The question goes to the Q-Former in its own vocabulary, and to the language model in that one's."""

    name, hf_class, processor_class = "instructblip", "InstructBlipForConditionalGeneration", "InstructBlipProcessor"
    encoders = ("instructblip_vision_model",)
    qformer_type, embeddings = "instructblip_qformer", "qformer.embeddings."

    def qformer_from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        qformer = config.qformer_config
        words = {"vocab_size": qformer.vocab_size, "max_positions": qformer.max_position_embeddings}
        return super().qformer_from_hf(config, problems) | {"instruction": words}

    def qformer_to_hf(self, model: ModelConfig) -> dict[str, Any]:
        values, words = super().qformer_to_hf(model), qformer_of(model).instruction
        del values["use_qformer_text_input"]
        if words is None:
            raise ValueError("model.projector.qformer.instruction=None (its Q-Former reads the question)")
        return values | {"vocab_size": words.vocab_size, "max_position_embeddings": words.max_positions}

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        instructions = prompt.instructions or [[1]]
        longest = max(len(own) for own in instructions)
        ids, mask = (torch.zeros(len(instructions), longest, dtype=torch.int64) for _ in range(2))
        for row, own in enumerate(instructions):
            ids[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), 1
        return super().hf_inputs(model, prompt) | {"qformer_input_ids": ids, "qformer_attention_mask": mask}
