"""Gemma 3 with pictures (https://arxiv.org/abs/2503.19786): SigLIP, averaged patches, Gemma 3.

The tokens of one picture see each other both ways. Pictures are not cut into crops ("pan and scan"). Source: transformers 5.23,
models/gemma3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.families.base import TokenIds
from megavlm.checkpoint.hf.families.paligemma import SiglipGemma, stretching
from megavlm.checkpoint.hf.links import Link, plain
from megavlm.checkpoint.hf.processors import processor_block
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import ImageConfig, ModelConfig, PictureMarks
from megavlm.data.prompt import Prompt
from megavlm.data.tokenizer import Tokenizer

START, SOFT, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"


class Gemma3(SiglipGemma):
    """4B, 12B and 27B; the smaller ones are text alone."""

    name, hf_class, processor_class = "gemma3", "Gemma3ForConditionalGeneration", "Gemma3Processor"
    image_processor = "Gemma3ImageProcessor"
    token_fields = {"boi_token_index": START, "eoi_token_index": END}
    tokenizer_fields = {"image_token": SOFT, "boi_token": START, "eoi_token": END}
    languages, bidirectional = ("gemma3_text",), "pictures"

    def model_from_hf(self, config: Any, problems: Problems) -> ModelConfig:
        # Its head skips what Gemma 3 without pictures does.
        problems.only(config.text_config, "final_logit_softcapping", None, block="text_config")
        return super().model_from_hf(config, problems)

    def projector_from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        side = config.vision_config.image_size // config.vision_config.patch_size
        tokens = int(config.mm_tokens_per_image**0.5)
        if tokens == 0 or tokens**2 != config.mm_tokens_per_image or side % tokens:
            problems.add(f"mm_tokens_per_image is {config.mm_tokens_per_image}, supported: squares of divisors of {side} patches")
        return {
            "kind": "average_pool",
            "num_layers": 1,
            "bias": False,
            "pixel_shuffle": max(side // max(tokens, 1), 1),
            "norm_eps": config.vision_config.layer_norm_eps,
        }

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        return super().config_to_hf(model, ids) | {"mm_tokens_per_image": model.visual_tokens_per_tile, **ids.more}

    def projector_links(self, model: ModelConfig) -> list[Link]:
        width, inputs = model.language.hidden_size, model.feature_size
        return [
            plain("norm.weight", "mm_soft_emb_norm.weight", (inputs,)),
            plain("projection", "mm_input_projection_weight", (inputs, width)),
        ]

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        inputs = super().hf_inputs(model, prompt)
        return inputs | {"token_type_ids": _of_pictures(inputs["input_ids"], prompt.num_tiles, model.visual_tokens_per_tile)}

    def marks(self, image: ImageConfig) -> PictureMarks:
        """What the processor makes of the template's <start_of_image>."""
        return PictureMarks(written=START, before=f"\n\n{START}", after=f"{END}\n\n")

    def image_from_hf(self, folder: Path, model: ModelConfig) -> ImageConfig:
        block, file = processor_block(folder)
        if block.get("do_pan_and_scan"):
            raise HuggingFaceError(f"{file}: do_pan_and_scan is true, supported: false (one square a picture)")
        return super().image_from_hf(folder, model)

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        ours, theirs = image.marks, self.marks(image)
        if tokenizer.image_token != SOFT or (ours.before, ours.after) != (theirs.before, theirs.after):
            raise HuggingFaceError(
                f"data.image_token={tokenizer.image_token!r}, data.image.marks.before={ours.before!r}, after={ours.after!r}: "
                f"{self.processor_class} writes {theirs.before!r}, {SOFT} for each visual token, {theirs.after!r}; train with these"
            )
        own = {"processor_class": self.processor_class, "image_seq_length": model.visual_tokens_per_tile}
        processor = stretching(model, image, "Gemma3ImageProcessor") | {"do_pan_and_scan": False}
        return {"processor_config.json": own | {"image_processor": processor}}


def _of_pictures(ids_1L: torch.Tensor, pictures: int, tokens: int) -> torch.Tensor:
    """int64 (1, L): 1 where a picture's placeholder stands. They are the id of which there are so many, in runs of whole pictures."""
    found = torch.zeros_like(ids_1L)
    if pictures:
        values, counts = ids_1L[0].unique_consecutive(return_counts=True)
        for value in values[counts >= tokens].tolist():
            own = counts[values == value]
            if int(own.sum()) == pictures * tokens and bool((own % tokens == 0).all()):
                found[ids_1L == value] = 1
    return found
