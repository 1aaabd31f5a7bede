"""Pixtral (https://arxiv.org/abs/2410.07073): LLaVA's class around an encoder that takes pictures in their own size.

Source: transformers 5.23, models/llava and models/pixtral.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.hf.families.base import TokenIds, input_ids
from megavlm.checkpoint.hf.families.llava import Llava
from megavlm.checkpoint.hf.families.native import check_native, edges_of, padded_pictures
from megavlm.checkpoint.hf.processors import interpolation_of, normalising, processor_block, resample_of
from megavlm.config.schema import ImageConfig, ModelConfig, PictureMarks
from megavlm.data.prompt import Prompt
from megavlm.data.tokenizer import Tokenizer

LONGEST_EDGE = 1024
"""Of a folder without processor."""


class Pixtral(Llava):
    """Placeholders are rows x columns of patches; [IMG_BREAK] and [IMG_END] between them are text."""

    name, processor_class = "pixtral", "PixtralProcessor"
    encoders = ("pixtral",)

    def handles(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "llava" and (config.get("vision_config") or {}).get("model_type") == "pixtral"

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        values = super().config_to_hf(model, ids) | {"model_type": "llava"}
        del values["image_seq_length"]  # every picture has another
        return values

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": input_ids(prompt)}
        if prompt.pixels_X is not None:
            pixels, sizes = padded_pictures(model.vision, prompt)
            inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        return inputs

    def marks(self, image: ImageConfig) -> PictureMarks:
        return PictureMarks(row_end="[IMG_BREAK]", last_row_end="[IMG_END]")

    def image_from_hf(self, folder: Path, model: ModelConfig) -> ImageConfig:
        interpolation = interpolation_of(*processor_block(folder), "PixtralImageProcessor")
        longest = edges_of(folder).get("longest_edge") or LONGEST_EDGE
        return ImageConfig(
            policy="native", whole_patches="stretch", min_tokens_per_image=1, longest_edge_px=longest, interpolation=interpolation
        )

    def check_pictures(self, model: ModelConfig, image: ImageConfig) -> None:
        check_native(self.hf_class, image, "stretch")

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        patch, merge = model.vision.patch_size_px, model.projector.pixel_shuffle
        processor = {
            "image_processor_type": "PixtralImageProcessor",
            "do_resize": True,
            "size": {"longest_edge": image.longest_edge_px},
            "patch_size": {"height": patch, "width": patch},
            "resample": resample_of(image),
            **normalising(model.vision),
        }
        return {
            "processor_config.json": {
                "processor_class": self.processor_class,
                "image_token": tokenizer.image_token,
                "patch_size": patch,
                "spatial_merge_size": merge,
                "image_processor": processor,
            }
        }
