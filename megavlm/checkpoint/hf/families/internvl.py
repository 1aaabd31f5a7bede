"""InternVL 2.5 and 3 (https://arxiv.org/abs/2412.05271, https://arxiv.org/abs/2504.10479): InternViT, pixel shuffle, an MLP, Qwen or Llama.

Source: transformers 5.23, models/internvl; pictures by models/got_ocr2's image processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.encoders import encoder_of
from megavlm.checkpoint.hf.families.base import TokenIds
from megavlm.checkpoint.hf.families.llava import ACTIVATIONS, Llava
from megavlm.checkpoint.hf.language import language_of
from megavlm.checkpoint.hf.links import Link, plain
from megavlm.checkpoint.hf.processors import interpolation_of, normalising, processor_block, resample_of
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import ImageConfig, ModelConfig, PictureMarks
from megavlm.data.tokenizer import Tokenizer

START, END, CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
"""What InternVL's processor writes before a picture, behind it, and for each visual token."""
MARKS = {"before": START, "after": END}
MAX_TILES = 12
"""InternVL's, where a folder has no processor."""


class InternVL(Llava):
    """A grid of tiles and the whole picture: data.image.policy=tiles, thumbnail=true."""

    name, hf_class, processor_class = "internvl", "InternVLForConditionalGeneration", "InternVLProcessor"
    image_token_field = "image_token_id"
    tokenizer_fields = {
        "start_image_token": START,
        "end_image_token": END,
        "context_image_token": CONTEXT,
        "video_token": "<video>",
    }
    encoders = ("internvl_vision",)

    def features(self, config: Any, vision: dict[str, Any], problems: Problems) -> dict[str, Any]:
        problems.only(config, "vision_feature_select_strategy", "default")
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            problems.add(f"vision_feature_layer is {layer}, supported: one number")
            layer = -1
        # The class takes the encoder's result for -1, final norm and all, and raw hidden states otherwise.
        return {"feature_layer": layer, "final_norm": layer == -1 and vision["has_final_norm"], "keep_class_token": False}

    def projector_from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        shuffle = int(1 / config.downsample_ratio)
        if shuffle * config.downsample_ratio != 1:
            problems.add(f"downsample_ratio is {config.downsample_ratio}, supported: one over a whole number")
        activation = problems.choice(config, "projector_hidden_act", ACTIVATIONS)
        return {"num_layers": 2, "bias": True, "activation": activation, "pixel_shuffle": shuffle, "input_norm": True}

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
        return {
            "architectures": [self.hf_class],
            "model_type": self.name,
            "image_seq_length": model.visual_tokens_per_tile,
            "image_token_id": ids.image,
            "downsample_ratio": 1 / model.projector.pixel_shuffle,
            "projector_hidden_act": activations[model.projector.activation],
            "vision_feature_layer": model.vision.feature_layer,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": model.language.tie_embeddings,
            **ids.special(),
            "text_config": language_of(model.language).to_hf(model.language) | ids.special(),
            "vision_config": encoder_of(model.vision, self.encoders).to_hf(model.vision),
        }

    def projector_links(self, model: ModelConfig) -> list[Link]:
        width, inputs = model.language.hidden_size, model.vision.feature_size * model.projector.pixel_shuffle**2
        shapes = {"layer_norm": (inputs,), "linear_1": (width, inputs), "linear_2": (width, width)}
        ours = {"layer_norm": "input_norm"}
        return [
            plain(f"{ours.get(name, name)}.{part}", f"{name}.{part}", shape if part == "weight" else shape[:1])
            for name, shape in shapes.items()
            for part in ("weight", "bias")
        ]

    def marks(self, image: ImageConfig) -> PictureMarks:
        return PictureMarks(before=START, after=END)

    def image_from_hf(self, folder: Path, model: ModelConfig) -> ImageConfig:
        block, file = processor_block(folder)
        side = model.vision.image_size_px
        if set(block.get("size", {}).values()) - {side, None}:
            raise HuggingFaceError(f"{file}: size is {block['size']}, but the encoder's tiles are {side} pixels: they must be the same")
        # InternVLProcessor cuts pictures unless it is told not to, whatever the image processor's own crop_to_patches says.
        least, most = block.get("min_patches", 1), block.get("max_patches", MAX_TILES)
        values = {"policy": "tiles", "min_tiles": least, "max_tiles": most, "thumbnail": most > 1, "marks": MARKS}
        return ImageConfig.model_validate(values | {"interpolation": interpolation_of(block, file, "GotOcr2ImageProcessor")})

    def check_pictures(self, model: ModelConfig, image: ImageConfig) -> None:
        if image.policy != "tiles" or (image.max_tiles > 1 and not image.thumbnail):
            raise HuggingFaceError(
                f"the model was trained with data.image.policy={image.policy}, thumbnail={image.thumbnail}, but {self.processor_class} cuts"
                " pictures as policy=tiles, thumbnail=true does: the exported model would see other pictures than it learned from"
            )
        for field in ("max_tokens_per_image", "max_tokens_per_sample"):
            if getattr(image, field) is not None:
                raise HuggingFaceError(
                    f"the model was trained with data.image.{field}={getattr(image, field)}, which {self.processor_class} does not know: "
                    "limit pictures by data.image.max_tiles instead"
                )

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        side = model.vision.image_size_px
        if tokenizer.image_token != CONTEXT or (image.marks.before, image.marks.after) != (START, END):
            raise HuggingFaceError(
                f"data.image_token={tokenizer.image_token!r}, data.image.marks.before={image.marks.before!r}, after={image.marks.after!r}: "
                f"{self.processor_class} writes {START}, {CONTEXT} for each visual token, {END}; train with these"
            )
        processor = {
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": True,
            "min_patches": image.min_tiles,
            "max_patches": image.max_tiles,
            "do_resize": True,
            "size": {"height": side, "width": side},
            "resample": resample_of(image),
            **normalising(model.vision),
        }
        # The class asks for one; pictures alone are learned here.
        video = {"video_processor_type": "InternVLVideoProcessor", "size": processor["size"], **normalising(model.vision)}
        own = {"processor_class": self.processor_class, "image_seq_length": model.visual_tokens_per_tile}
        return {"processor_config.json": own | {"image_processor": processor, "video_processor": video}}
