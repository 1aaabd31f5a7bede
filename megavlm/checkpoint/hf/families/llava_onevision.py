"""LLaVA-OneVision (https://arxiv.org/abs/2408.03326): LLaVA-NeXT with SigLIP, and one tile for each of several pictures.

Source: transformers 5.23, models/llava_onevision.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.families.base import TokenIds
from megavlm.checkpoint.hf.families.llava_next import LlavaNext
from megavlm.checkpoint.hf.processors import normalising
from megavlm.checkpoint.hf.reading import CONFIG, hf_config, read_json
from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.prompt import Prompt
from megavlm.data.tokenizer import Tokenizer


class LlavaOnevision(LlavaNext):
    """data.image.policy=anyres with anyres_several=whole. Video is left out."""

    name, hf_class, processor_class = "llava_onevision", "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor"
    image_processor = "LlavaOnevisionImageProcessor"

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        return {name: value for name, value in super().config_to_hf(model, ids).items() if name != "image_seq_length"}

    def picture_config(self, model: ModelConfig, image: ImageConfig) -> dict[str, Any]:
        most = image.anyres_max_tiles or max(rows * columns for rows, columns in image.anyres_grids)
        return super().picture_config(model, image) | {"vision_aspect_ratio": f"anyres_max_{most}"}

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        """batch_num_images says whether the pictures of this sample have grids."""
        inputs = super().hf_inputs(model, prompt)
        if prompt.tiles_per_picture is not None:
            several, whole = len(prompt.tiles_per_picture), set(prompt.tiles_per_picture) == {1}
            inputs["batch_num_images"] = torch.tensor([several] if whole else [1] * several)
        return inputs

    def image_from_hf(self, folder: Path, model: ModelConfig) -> ImageConfig:
        ratio = hf_config(read_json(folder / CONFIG)).vision_aspect_ratio
        found = re.fullmatch(r"anyres_max_(\d+)", ratio)
        if found is None:
            raise HuggingFaceError(f"{folder / CONFIG}: vision_aspect_ratio is {ratio!r}, supported: anyres_max_ and a number")
        own = {"anyres_several": "whole", "anyres_max_tiles": int(found[1])}
        return ImageConfig.model_validate(self._anyres(folder, model) | own)

    def check_pictures(self, model: ModelConfig, image: ImageConfig) -> None:
        super().check_pictures(model, image)
        if image.anyres_several != "whole":
            raise HuggingFaceError(
                f"the model was trained with data.image.anyres_several={image.anyres_several}, but {self.processor_class} gives each of "
                "several pictures one tile (anyres_several=whole): the exported model would see other pictures than it learned from"
            )

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        files = super().processor_files(model, image, tokenizer)
        config = files["processor_config.json"]
        strategy = config["vision_feature_select_strategy"]
        for name in ("patch_size", "num_additional_image_tokens"):
            del config[name]
        ratio = config["image_processor"].pop("vision_aspect_ratio")
        # The processor takes one off for "default".
        own = {"num_image_tokens": model.vision.num_patches + int(strategy == "default"), "vision_aspect_ratio": ratio}
        # The class asks for one; pictures alone are learned here.
        size = config["image_processor"]["size"]
        video = {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": size, **normalising(model.vision)}
        return {"processor_config.json": config | own | {"video_processor": video}}
