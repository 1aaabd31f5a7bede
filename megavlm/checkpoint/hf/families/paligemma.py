"""PaliGemma (https://arxiv.org/abs/2407.07726) and PaliGemma 2 (https://arxiv.org/abs/2412.03555): SigLIP, one linear layer, Gemma.

Image and question see each other both ways; the answer is written in order. Source: transformers 5.23, models/paligemma.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.encoders import encoder_of
from megavlm.checkpoint.hf.families.base import TokenIds, ties
from megavlm.checkpoint.hf.families.llava import HEAD, LANGUAGE, PROJECTOR, VISION, Llava
from megavlm.checkpoint.hf.language import language, language_of
from megavlm.checkpoint.hf.language.base import LanguageKind
from megavlm.checkpoint.hf.links import Link, plain, prefixed
from megavlm.checkpoint.hf.processors import normalising, resample_of
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import ImageConfig, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megavlm.data.prompt import Prompt
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.tokenizer import Tokenizer


class SiglipGemma(Llava):
    """What PaliGemma and Gemma 3 have in common: SigLIP's last hidden state after its final norm, one stretched square a picture."""

    encoders = ("siglip_vision_model",)
    image_processor = "SiglipImageProcessor"
    languages: ClassVar[tuple[str, ...]]
    bidirectional: ClassVar[Literal["prefix", "pictures"]]

    def model_from_hf(self, config: Any, problems: Problems) -> ModelConfig:
        text_config = self.text_config(config)
        text = language(text_config.model_type, self.languages).from_hf(text_config, problems)
        text |= {"bidirectional": self.bidirectional, "tie_embeddings": ties(config)}
        if config.image_token_index >= text["vocab_size"]:
            problems.add(
                f"image_token_index is {config.image_token_index}, beyond text_config.vocab_size={text['vocab_size']}: "
                "add the token to the vocabulary and to the embedding"
            )
        vision = self.encoder(config).from_hf(config.vision_config, problems)
        return ModelConfig(
            family=self.name,
            vision=VisionConfig(**vision | {"feature_layer": -1, "final_norm": True}),
            projector=ProjectorConfig(**self.projector_from_hf(config, problems)),
            language=LanguageConfig(**text),
        )

    def text_config(self, config: Any) -> Any:
        """The LLM's config, without what the family itself answers for."""
        return config.text_config

    def text(self, model: ModelConfig) -> tuple[LanguageKind, LanguageConfig]:
        """The LLM's class and its block, as they are without pictures."""
        alone = model.language.model_copy(update={"bidirectional": "none"})
        return language_of(alone, self.languages), alone

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        kind, alone = self.text(model)
        return {
            "architectures": [self.hf_class],
            "model_type": self.name,
            "image_token_index": ids.image,
            "tie_word_embeddings": model.language.tie_embeddings,
            **ids.special(),
            "text_config": kind.to_hf(alone) | ids.special(),
            "vision_config": encoder_of(model.vision, self.encoders).to_hf(model.vision),
        }

    def links(self, model: ModelConfig) -> list[Link]:
        kind, alone = self.text(model)
        return [
            *prefixed(encoder_of(model.vision, self.encoders).links(model.vision), "vision.", VISION),
            *prefixed(self.projector_links(model), "projector.", PROJECTOR),
            *prefixed(kind.links(alone), "language.", LANGUAGE),
            *prefixed(kind.head(alone, HEAD, f"{LANGUAGE}embed_tokens.weight"), "language.", ""),
        ]

    def check_pictures(self, model: ModelConfig, image: ImageConfig) -> None:
        super().check_pictures(model, image)
        if image.policy == "fixed" and image.fit != "stretch":
            raise HuggingFaceError(
                f"the model was trained with data.image.fit={image.fit}, but {self.processor_class} stretches every picture"
            )


class PaliGemma(SiglipGemma):
    """Gemma 1 or 2 behind the pictures.

    Its processor writes the pictures of a prompt first, then <bos>, the question and a line's end: a data.chat_template that does the
    same makes what training sees equal to what the processor makes.
    """

    name, hf_class, processor_class = "paligemma", "PaliGemmaForConditionalGeneration", "PaliGemmaProcessor"
    chat_template = "paligemma"
    languages, bidirectional = ("gemma", "gemma2"), "prefix"

    def text_config(self, config: Any) -> Any:
        text = copy.copy(config.text_config)
        text.use_bidirectional_attention = False  # the class sets it, for the prefix, and reads it nowhere when that is told
        return text

    def projector_from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        problems.only(config, "projection_dim", config.text_config.hidden_size)
        return {"num_layers": 1}

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        values, width = super().config_to_hf(model, ids), model.language.hidden_size
        values["text_config"] |= {"use_bidirectional_attention": True, "num_image_tokens": model.visual_tokens_per_tile}
        values["vision_config"]["projection_dim"] = width
        return values | {"projection_dim": width, "hidden_size": width, "vocab_size": model.language.vocab_size}

    def projector_links(self, model: ModelConfig) -> list[Link]:
        width, inputs = model.language.hidden_size, model.feature_size
        return [
            plain("linear_1.weight", "linear.weight", (width, inputs)),
            *([plain("linear_1.bias", "linear.bias", (width,))] if model.projector.bias else ()),
        ]

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        inputs = super().hf_inputs(model, prompt)
        return inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}  # all of it is prefix

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        if tokenizer.image_token != IMAGE_TOKEN:
            raise HuggingFaceError(f"data.image_token={tokenizer.image_token!r}: {self.processor_class} knows {IMAGE_TOKEN!r} only")
        processor = stretching(model, image, "SiglipImageProcessor") | {"image_seq_length": model.visual_tokens_per_tile}
        return {"processor_config.json": {"processor_class": self.processor_class, "image_processor": processor}}


def stretching(model: ModelConfig, image: ImageConfig, processor: str) -> dict[str, Any]:
    """Settings of an image processor that stretches every picture to the encoder's square."""
    side = model.vision.image_size_px
    return {
        "image_processor_type": processor,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": resample_of(image),
        **normalising(model.vision),
    }
