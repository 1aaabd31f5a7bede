"""Idefics3 (https://arxiv.org/abs/2408.12637): square tiles, pixel shuffle, a linear projection.

Source: transformers 5.23, models/idefics3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.families.base import input_ids, normalised
from megavlm.checkpoint.hf.families.idefics2 import FAKE, Idefics
from megavlm.checkpoint.hf.families.native import edges_of
from megavlm.checkpoint.hf.links import Link, plain
from megavlm.checkpoint.hf.processors import interpolation_of, normalising, processor_block, resample_of
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import ImageConfig, ModelConfig, PictureMarks
from megavlm.data.prompt import Prompt
from megavlm.data.tokenizer import Tokenizer


class Idefics3(Idefics):
    """Its pixel shuffle has the channel order of ours."""

    name, hf_class, processor_class = "idefics3", "Idefics3ForConditionalGeneration", "Idefics3Processor"
    encoders = ("idefics3_vision",)

    def projector_from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        return {"num_layers": 1, "bias": False, "pixel_shuffle": config.scale_factor}

    def projector_to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {"scale_factor": model.projector.pixel_shuffle}

    def projector_links(self, model: ModelConfig) -> list[Link]:
        shape = (model.language.hidden_size, model.vision.feature_size * model.projector.pixel_shuffle**2)
        return [plain("linear_1.weight", "modality_projection.proj.weight", shape)]

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": input_ids(prompt)}
        if prompt.tiles_TCHW is not None:
            inputs["pixel_values"] = normalised(model.vision, prompt.tiles_TCHW)[None]
        return inputs

    @property
    def image_processor(self) -> str:
        return self.hf_class.removesuffix("ForConditionalGeneration") + "ImageProcessor"

    def marks(self, image: ImageConfig) -> PictureMarks:
        if image.policy != "split":
            return PictureMarks(before=FAKE + "<global-img>", after=FAKE)
        return PictureMarks(
            after=FAKE,
            tile_before=FAKE + "<row_{row}_col_{column}>",
            tile_row_end="\n",
            whole_before="\n" + FAKE + "<global-img>",
            single_before=FAKE + "<global-img>",
        )

    def image_from_hf(self, folder: Path, model: ModelConfig) -> ImageConfig:
        block, file = processor_block(folder)
        side = model.vision.image_size_px
        tile = block.get("max_image_size", {}).get("longest_edge", side)
        if tile != side:
            raise HuggingFaceError(f"{file}: max_image_size is {tile}, but the encoder's tiles are {side} pixels: they must be the same")
        interpolation = interpolation_of(block, file, self.image_processor)
        if not block.get("do_image_splitting", True):
            return ImageConfig(policy="fixed", interpolation=interpolation)
        longest = edges_of(folder).get("longest_edge") or 4 * side
        return ImageConfig(policy="split", longest_edge_px=longest, interpolation=interpolation)

    def check_pictures(self, model: ModelConfig, image: ImageConfig) -> None:
        if image.policy not in ("split", "fixed") or image.fit != "stretch" or image.max_tokens_per_image is not None:
            raise HuggingFaceError(
                f"the model was trained with data.image.policy={image.policy}, fit={image.fit}, max_tokens_per_image="
                f"{image.max_tokens_per_image}, but {self.hf_class}'s processor cuts pictures as policy=split does, or stretches them to "
                "one tile (policy=fixed, fit=stretch), without a cap: the exported model would see other pictures than it learned from"
            )

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        self.check_image_token(self.hf_class, tokenizer)
        side = model.vision.image_size_px
        processor = {
            "image_processor_type": self.image_processor,
            "do_image_splitting": image.policy == "split",
            "do_pad": True,
            # Without splitting the processor resizes once more, to the tile; the first resize is left out as in training.
            "do_resize": image.policy == "split",
            "size": {"longest_edge": image.longest_edge_px or side},
            "max_image_size": {"longest_edge": side},
            "resample": resample_of(image),
            **normalising(model.vision),
        }
        own = {"processor_class": self.processor_class, "image_seq_len": model.visual_tokens_per_tile, "image_processor": processor}
        return {"processor_config.json": own}
