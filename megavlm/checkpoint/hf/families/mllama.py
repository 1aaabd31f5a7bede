"""Mllama, Llama 3.2 Vision (https://arxiv.org/abs/2407.21783, section 7): tiles on a canvas, cross-attention. Source: transformers 5.23,
models/mllama.

Shape legend: I pictures, J tiles of a canvas, L tokens of a prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.encoders.base import EncoderKind
from megavlm.checkpoint.hf.encoders.mllama import MllamaVision
from megavlm.checkpoint.hf.families.base import Family, TokenIds, input_ids, normalised
from megavlm.checkpoint.hf.language.mllama import MllamaText
from megavlm.checkpoint.hf.links import Link, plain, prefixed
from megavlm.checkpoint.hf.processors import interpolation_of, normalising, processor_block, resample_of
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import ImageConfig, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megavlm.data.prompt import Prompt
from megavlm.data.tokenizer import Tokenizer

VISION, PROJECTOR, LANGUAGE, HEAD = "vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.weight"
IMAGE_TOKEN = "<|image|>"


class Mllama(Family):
    """Pictures are read by layers of their own; each is one token of the text."""

    name, hf_class, processor_class = "mllama", "MllamaForConditionalGeneration", "MllamaProcessor"
    image_token_field = "image_token_index"
    renames = (
        (r"^lm_head\.weight$", HEAD),
        (r"^model\.vision_model\.", VISION),
        (r"^model\.multi_modal_projector\.", PROJECTOR),
        (r"^model\.language_model\.", LANGUAGE),
    )
    vision_kind, text_kind = MllamaVision(), MllamaText()

    def encoder(self, config: Any) -> EncoderKind:
        return self.vision_kind

    def model_from_hf(self, config: Any, problems: Problems) -> ModelConfig:
        return ModelConfig(
            family=self.name,
            vision=VisionConfig(**self.vision_kind.from_hf(config.vision_config, problems)),
            projector=ProjectorConfig(num_layers=1),
            language=LanguageConfig(**self.text_kind.from_hf(config.text_config, problems)),
        )

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        return {
            "architectures": [self.hf_class],
            "model_type": self.name,
            "image_token_index": ids.image,
            **ids.special(),
            "text_config": self.text_kind.to_hf(model.language) | ids.special(),
            "vision_config": self.vision_kind.to_hf(model.vision),
        }

    def links(self, model: ModelConfig) -> list[Link]:
        if model.vision.canvas is None or model.language.cross_attention is None:
            raise HuggingFaceError(
                f"{self.hf_class} has an encoder with a canvas and cross-attention: set model.vision.canvas and "
                "model.language.cross_attention, or another model.family"
            )
        width, inputs = model.language.hidden_size, model.vision.feature_size
        return [
            *prefixed(self.vision_kind.links(model.vision), "vision.", VISION),
            plain("projector.linear_1.weight", f"{PROJECTOR}weight", (width, inputs)),
            plain("projector.linear_1.bias", f"{PROJECTOR}bias", (width,)),
            *prefixed(self.text_kind.links(model.language), "language.", LANGUAGE),
            *prefixed(self.text_kind.head(model.language, HEAD, f"{LANGUAGE}embed_tokens.weight"), "language.", ""),
        ]

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": input_ids(prompt)}
        if prompt.tiles_TCHW is None:
            return inputs
        assert model.vision.canvas is not None
        canvas, side = model.vision.canvas, model.vision.image_size_px
        count, length = len(prompt.cuts), len(prompt.ids)
        pixels = torch.zeros(1, count, canvas.max_tiles, model.vision.num_channels, side, side)
        ids = torch.zeros(1, count, dtype=torch.int64)
        tiles_IJ = torch.zeros(1, count, canvas.max_tiles, dtype=torch.int64)
        cross = torch.zeros(1, length, count, canvas.max_tiles, dtype=torch.int64)
        tiles = normalised(model.vision, prompt.tiles_TCHW).split([cut.tiles for cut in prompt.cuts])
        for i, (cut, own, (start, end)) in enumerate(zip(prompt.cuts, tiles, self._seen(model, prompt), strict=True)):
            pixels[0, i, : cut.tiles] = own
            ids[0, i] = canvas.grids.index((cut.rows, cut.columns)) + 1
            tiles_IJ[0, i, : cut.tiles] = 1
            cross[0, start:end, i, : cut.tiles] = 1
        return inputs | {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": tiles_IJ, "cross_attention_mask": cross}

    @staticmethod
    def _seen(model: ModelConfig, prompt: Prompt) -> list[tuple[int, int]]:
        """Tokens that see each picture, by transformers' own processor."""
        from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

        ids = list(prompt.ids)
        # The placeholder is the one id behind the vocabulary that occurs.
        token = next((i for i in ids if i >= model.language.vocab_size), None)
        if token is None:
            raise HuggingFaceError(
                f"image_token_index lies inside the vocabulary of {model.language.vocab_size} tokens, not behind it as published: "
                "logits cannot be compared, only tensors (--tensors-only)"
            )
        return [(start, len(ids) if end == -1 else end) for start, end in get_cross_attention_token_mask(ids, token)]

    def image_from_hf(self, folder: Path, model: ModelConfig) -> ImageConfig:
        block, file = processor_block(folder)
        assert model.vision.canvas is not None
        wanted = {"max_image_tiles": model.vision.canvas.max_tiles, "do_pad": True, "do_resize": True}
        wrong = [f"{name}={block[name]!r} (supported: {value})" for name, value in wanted.items() if block.get(name, value) != value]
        side = {"height": model.vision.image_size_px, "width": model.vision.image_size_px}
        if block.get("size", side) != side:
            wrong.append(f"size={block['size']} (supported: the encoder's {side})")
        if wrong:
            raise HuggingFaceError(f"{file}: {', '.join(wrong)}")
        return ImageConfig(policy="canvas", interpolation=interpolation_of(block, file, "MllamaImageProcessor"))

    def check_pictures(self, model: ModelConfig, image: ImageConfig) -> None:
        if image.policy != "canvas":
            raise HuggingFaceError(
                f"the model was trained with data.image.policy={image.policy}, but Hugging Face's {self.hf_class} and its processor "
                "know tiles on a canvas (policy=canvas): the exported model would see other pictures than it learned from"
            )

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        assert model.vision.canvas is not None
        if tokenizer.image_token != IMAGE_TOKEN:
            raise HuggingFaceError(
                f"data.image_token={tokenizer.image_token!r}: the processor of {self.hf_class} looks for {IMAGE_TOKEN!r}; "
                f"train with data.image_token={IMAGE_TOKEN}"
            )
        processor = {
            "image_processor_type": "MllamaImageProcessor",
            "do_resize": True,
            "do_pad": True,
            "size": {"height": model.vision.image_size_px, "width": model.vision.image_size_px},
            "max_image_tiles": model.vision.canvas.max_tiles,
            "resample": resample_of(image),
            **normalising(model.vision),
        }
        return {"processor_config.json": {"processor_class": self.processor_class, "image_processor": processor}}
