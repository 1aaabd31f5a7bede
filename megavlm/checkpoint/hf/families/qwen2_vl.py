"""Qwen2-VL (https://arxiv.org/abs/2409.12191): pictures in their own size, a patch merger, M-RoPE. Source: transformers 5.23,
models/qwen2_vl.

Shape legend: N patches of all pictures, C channels, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.encoders.base import EncoderKind
from megavlm.checkpoint.hf.encoders.qwen import Qwen2VLVision
from megavlm.checkpoint.hf.families.base import Family, TokenIds, input_ids, normalised, ties
from megavlm.checkpoint.hf.language.base import LanguageKind
from megavlm.checkpoint.hf.language.qwen_vl import Qwen2VLText
from megavlm.checkpoint.hf.links import Link, plain, prefixed
from megavlm.checkpoint.hf.processors import interpolation_of, normalising, processor_block, resample_of
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import ImageConfig, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megavlm.data.prompt import Prompt
from megavlm.data.resizing_native import DEFAULT_MAX_TOKENS
from megavlm.data.tokenizer import Tokenizer
from megavlm.models.vision.pictures import split_pictures

IMAGE_PAD = "<|image_pad|>"
_PIXEL_LIMITS = {"shortest_edge": ("min_tokens_per_image", "min_pixels", 1), "longest_edge": ("max_tokens_per_image", "max_pixels", 0)}
"""Key of the processor's size -> our field, the key's old name, whether to round up."""
_DEFAULT_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
"""Of transformers' Qwen2VLImageProcessor, where a folder's processor says nothing."""


class Qwen2VL(Family):
    """What the three Qwen-VL have in common is here too."""

    name, hf_class, processor_class = "qwen2_vl", "Qwen2VLForConditionalGeneration", "Qwen2VLProcessor"
    token_fields: ClassVar[dict[str, str]] = {
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    renames: ClassVar[Sequence[tuple[str, str]]] = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
    visual_prefix, language_prefix = "visual.", "model."
    vision_kind: EncoderKind = Qwen2VLVision()
    text_kind: LanguageKind = Qwen2VLText()
    patch_norm: ClassVar[str] = "layer_norm"
    merger: ClassVar[dict[str, str]] = {"patch_norm": "merger.ln_q", "linear_1": "merger.mlp.0", "linear_2": "merger.mlp.2"}
    """Our names of the merger's modules -> Hugging Face's."""
    video_processor = "Qwen2VLVideoProcessor"

    def encoder(self, config: Any) -> EncoderKind:
        return self.vision_kind

    def model_from_hf(self, config: Any, problems: Problems) -> ModelConfig:
        block = config.vision_config
        vision, merge = self.vision_kind.from_hf(block, problems), block.spatial_merge_size
        text = self.text_kind.from_hf(config.text_config, problems) | {"tie_embeddings": ties(config)}
        projected = self.projected_size(block)
        if projected != text["hidden_size"]:
            problems.add(f"the encoder's features are {projected} wide, the LLM {text['hidden_size']}: supported: the same")
        return ModelConfig(
            family=self.name,
            vision=VisionConfig(**vision, feature_layer=-1, final_norm=False),
            projector=ProjectorConfig(
                num_layers=2,
                hidden_size=vision["hidden_size"] * merge**2,
                activation="gelu",
                pixel_shuffle=merge,
                patch_norm=self.patch_norm,
                norm_eps=1e-6,
            ),
            language=LanguageConfig(**text),
        )

    def projected_size(self, block: Any) -> int:
        """Width of visual tokens by a vision config."""
        return int(block.hidden_size)

    def projected(self, model: ModelConfig) -> dict[str, Any]:
        """The way back of `projected_size`."""
        return {"hidden_size": model.language.hidden_size}

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        merging = {"spatial_merge_size": model.projector.pixel_shuffle, **self.projected(model)}
        text = self.text_kind.to_hf(model.language)
        return {
            "architectures": [self.hf_class],
            "model_type": self.name,
            "image_token_id": ids.image,
            **ids.more,
            "tie_word_embeddings": model.language.tie_embeddings,
            **ids.special(),
            "text_config": text | ids.special(),
            "vision_config": self.vision_kind.to_hf(model.vision) | merging,
        }

    def links(self, model: ModelConfig) -> list[Link]:
        embedding = f"{self.language_prefix}embed_tokens.weight"
        return [
            *prefixed(self.vision_kind.links(model.vision), "vision.", self.visual_prefix),
            *prefixed(self.merger_links(model), "projector.", self.visual_prefix),
            *prefixed(self.text_kind.links(model.language), "language.", self.language_prefix),
            *prefixed(self.text_kind.head(model.language, "lm_head.weight", embedding), "language.", ""),
        ]

    def merger_links(self, model: ModelConfig) -> list[Link]:
        """Relative to the projector, and to the encoder at Hugging Face."""
        return merger_links(model, "", self.merger, model.vision.hidden_size)

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": input_ids(prompt)}
        if prompt.tile_grids is None:
            return inputs
        assert prompt.pixels_X is not None
        vision, merge = model.vision, model.projector.pixel_shuffle
        pictures = split_pictures(prompt.pixels_X, prompt.tile_grids, vision.num_channels, vision.patch_size_px)
        patches = [merge_ordered_patches(normalised(vision, picture), vision, merge) for picture in pictures]
        counts = [rows * columns // merge**2 for rows, columns in prompt.tile_grids]
        return inputs | {
            "pixel_values": torch.cat(patches),
            "image_grid_thw": torch.tensor([[1, rows, columns] for rows, columns in prompt.tile_grids]),
            "mm_token_type_ids": placeholders(inputs["input_ids"][0], counts).long()[None],
        }

    def image_from_hf(self, folder: Path, model: ModelConfig) -> ImageConfig:
        block, file = processor_block(folder)
        size, factor = block.get("size") or {}, model.vision.patch_size_px * model.projector.pixel_shuffle
        for ours, own in (("patch_size", model.vision.patch_size_px), ("merge_size", model.projector.pixel_shuffle)):
            if block.get(ours, own) != own:
                raise HuggingFaceError(f"{file}: {ours} is {block[ours]}, the model's own is {own}")
        if not block:
            return ImageConfig(policy="native")
        interpolation = interpolation_of(block, file, "Qwen2VLImageProcessor")
        limits: dict[str, int] = {}
        for edge, (field, name, up) in _PIXEL_LIMITS.items():
            pixels = block.get(name) or size.get(edge) or size.get(name) or _DEFAULT_PIXELS[edge]
            if pixels % factor**2:
                raise HuggingFaceError(
                    f"{file}: {name} (size.{edge}) is {pixels}, no multiple of the {factor} x {factor} pixels of a visual token: "
                    f"write {pixels // factor**2 * factor**2 + up * factor**2}, which differs by less than one token"
                )
            limits[field] = pixels // factor**2
        return ImageConfig(policy="native", interpolation=interpolation, **limits)

    def check_pictures(self, model: ModelConfig, image: ImageConfig) -> None:
        if image.policy != "native":
            raise HuggingFaceError(
                f"the model was trained with data.image.policy={image.policy}, but Hugging Face's {self.hf_class} and its processor take "
                "pictures in their own size (policy=native): the exported model would see other pictures than it learned from"
            )

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        if tokenizer.image_token != IMAGE_PAD:
            raise HuggingFaceError(
                f"data.image_token={tokenizer.image_token!r}: the processor of {self.hf_class} puts {IMAGE_PAD!r} where features go; "
                "train with data.image_token=<|image_pad|>"
            )
        vision, factor = model.vision, model.vision.patch_size_px * model.projector.pixel_shuffle
        shared = {
            "do_resize": True,
            "resample": resample_of(image),
            "patch_size": vision.patch_size_px,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": model.projector.pixel_shuffle,
            **normalising(vision),
        }
        most = DEFAULT_MAX_TOKENS if image.max_tokens_per_image is None else image.max_tokens_per_image
        size = {"shortest_edge": image.min_tokens_per_image * factor**2, "longest_edge": most * factor**2}
        return {
            "processor_config.json": {
                "processor_class": self.processor_class,
                "image_processor": {"image_processor_type": "Qwen2VLImageProcessor", "size": size, **shared},
                "video_processor": {"video_processor_type": self.video_processor, **shared},
            }
        }


def merger_links(model: ModelConfig, ours: str, names: dict[str, str], norm_width: int) -> list[Link]:
    """A merger's norm and two linear layers; `names` maps our modules (with the prefix `ours`) to Hugging Face's."""
    merged = model.vision.hidden_size * model.projector.pixel_shuffle**2
    found = []
    for module, theirs in names.items():
        shape = {"linear_1": (merged, merged), "linear_2": (model.language.hidden_size, merged)}.get(module, (norm_width,))
        found.append(plain(f"{ours}{module}.weight", f"{theirs}.weight", shape))
        if module != "patch_norm" or model.projector.patch_norm != "rms_norm":
            found.append(plain(f"{ours}{module}.bias", f"{theirs}.bias", shape[:1]))
    return found


def merge_ordered_patches(picture_CHW: torch.Tensor, vision: VisionConfig, merge: int) -> torch.Tensor:
    """(N, values): a normalised picture's patches block by block of merge x merge, each channel, frame, row, column."""
    channels, height, width = picture_CHW.shape
    size, frames = vision.patch_size_px, vision.temporal_patch_size
    blocks = picture_CHW.reshape(channels, height // size // merge, merge, size, width // size // merge, merge, size)
    patches = blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, channels, 1, size, size)
    return patches.expand(-1, -1, frames, -1, -1).flatten(1)


def placeholders(ids_L: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """bool (L): where the placeholders of pictures with `counts` visual tokens stand; their id is the one that stands in such runs.

    Raises ValueError when no id does, or several do.
    """
    values, occurrences = ids_L.unique(return_counts=True)
    found = []
    for value in values[occurrences == sum(counts)].tolist():
        runs = torch.nonzero(ids_L == value).squeeze(1).split(counts)
        if all(int(run[-1] - run[0]) == len(run) - 1 for run in runs):
            found.append(value)
    if len(found) != 1:
        raise ValueError(f"the placeholders of pictures with {counts} visual tokens are told by their runs, but {found} stand in such runs")
    return ids_L == found[0]
