"""LLaVA-NeXT, or LLaVA-1.6 (https://llava-vl.github.io/blog/2024-01-30-llava-next/): LLaVA on a grid of tiles, without the padding.

Source: transformers 5.23, models/llava_next. Shape legend: I pictures, T most tiles of one, C channels, H height, W width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.families.base import TokenIds, normalised
from megavlm.checkpoint.hf.families.llava import Llava
from megavlm.checkpoint.hf.links import Link, plain
from megavlm.checkpoint.hf.processors import interpolation_of, normalising, processor_block, resample_of
from megavlm.checkpoint.hf.reading import CONFIG, Problems, hf_config, read_json
from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.prompt import Prompt
from megavlm.data.tokenizer import Tokenizer


class LlavaNext(Llava):
    """data.image.policy=anyres."""

    name, hf_class, processor_class = "llava_next", "LlavaNextForConditionalGeneration", "LlavaNextProcessor"
    image_processor = "LlavaNextImageProcessor"
    renames = (*Llava.renames, (r"^model\.image_newline$", "image_newline"))

    def features(self, config: Any, vision: dict[str, Any], problems: Problems) -> dict[str, Any]:
        found = super().features(config, vision, problems)
        if found["keep_class_token"]:
            problems.add(
                "vision_feature_select_strategy is full, which keeps the class token among the patches of a picture; supported: default"
            )
        return found

    def projector_from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        return super().projector_from_hf(config, problems) | {"image_newline": True}

    def picture_config(self, model: ModelConfig, image: ImageConfig) -> dict[str, Any]:
        side = model.vision.image_size_px
        return {"image_grid_pinpoints": [[rows * side, columns * side] for rows, columns in image.anyres_grids]}

    def links(self, model: ModelConfig) -> list[Link]:
        newline = plain("projector.image_newline", "image_newline", (model.language.hidden_size,))
        return [*super().links(model), *([newline] if model.projector.image_newline else ())]

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        """pixel_values are (I, T, C, H, W), image_sizes (I, 2): heights and widths."""
        inputs = super().hf_inputs(model, prompt)
        if prompt.tiles_TCHW is not None:
            assert prompt.tiles_per_picture is not None and prompt.sizes is not None, "anyres needs the pictures' sizes"
            pictures = normalised(model.vision, prompt.tiles_TCHW).split(prompt.tiles_per_picture)
            inputs["pixel_values"] = pad_sequence(list(pictures), batch_first=True)
            inputs["image_sizes"] = torch.tensor([(height, width) for width, height in prompt.sizes])
        return inputs

    def image_from_hf(self, folder: Path, model: ModelConfig) -> ImageConfig:
        return ImageConfig.model_validate(self._anyres(folder, model))

    def _anyres(self, folder: Path, model: ModelConfig) -> dict[str, Any]:
        interpolation = interpolation_of(*processor_block(folder), self.image_processor)
        return {"policy": "anyres", "anyres_grids": self._grids(folder, model), "interpolation": interpolation}

    def _grids(self, folder: Path, model: ModelConfig) -> list[tuple[int, int]]:
        """(rows, columns) of tiles that both config and processor choose from."""
        side, block, file = model.vision.image_size_px, *processor_block(folder)
        pinpoints = [list(point) for point in hf_config(read_json(folder / CONFIG)).image_grid_pinpoints]
        own = [list(point) for point in block.get("image_grid_pinpoints", pinpoints)]
        if own != pinpoints:
            raise HuggingFaceError(f"{file}: image_grid_pinpoints are {own}, those of {CONFIG} are {pinpoints}: they must be the same")
        for field in ("size", "crop_size"):
            sides = set((block.get(field) or {}).values())
            if sides - {side, None}:
                raise HuggingFaceError(
                    f"{file}: {field} is {block[field]}, but the encoder's tiles are {side} pixels: they must be the same"
                )
        if wrong := [point for point in pinpoints if point[0] % side or point[1] % side]:
            raise HuggingFaceError(f"{folder / CONFIG}: image_grid_pinpoints {wrong} are no multiples of the encoder's {side} pixels")
        return [(height // side, width // side) for height, width in pinpoints]

    def check_pictures(self, model: ModelConfig, image: ImageConfig) -> None:
        if image.policy != "anyres":
            raise HuggingFaceError(
                f"the model was trained with data.image.policy={image.policy}, but {self.hf_class} and its processor lay pictures out as "
                "policy=anyres does: the exported model would see other pictures than it learned from"
            )
        for field in ("max_tokens_per_image", "max_tokens_per_sample"):
            if getattr(image, field) is not None:
                raise HuggingFaceError(
                    f"the model was trained with data.image.{field}={getattr(image, field)}, which {self.processor_class} does not know: "
                    "limit pictures by data.image.anyres_grids instead"
                )

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        files, side = super().processor_files(model, image, tokenizer), model.vision.image_size_px
        square = {"height": side, "width": side}
        files["processor_config.json"]["image_processor"] = {
            "image_processor_type": self.image_processor,
            **self.picture_config(model, image),
            "do_resize": True,
            "do_pad": True,
            "size": square,
            "crop_size": square,
            "do_center_crop": False,
            "resample": resample_of(image),
            **normalising(model.vision),
        }
        return files

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        if not model.projector.image_newline:
            raise HuggingFaceError(f"model.projector.image_newline is false, but {self.hf_class} has one")
        return super().config_to_hf(model, ids)
