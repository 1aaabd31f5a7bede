"""LLaVA-1.5 (https://arxiv.org/abs/2310.03744): CLIP or SigLIP, a two-layer MLP, Llama or Qwen. Source: transformers 5.23, models/llava."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.encoders import encoder, encoder_of
from megavlm.checkpoint.hf.encoders.base import EncoderKind
from megavlm.checkpoint.hf.families.base import Family, TokenIds, input_ids, normalised, ties
from megavlm.checkpoint.hf.language import language, language_of
from megavlm.checkpoint.hf.links import Link, plain, prefixed
from megavlm.checkpoint.hf.processors import crop_or_stretch_processor, image_fit, interpolation_of, processor_block
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import ImageConfig, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megavlm.data.prompt import Prompt
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.tokenizer import Tokenizer

VISION, PROJECTOR, LANGUAGE, HEAD = "vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.weight"
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}


class Llava(Family):
    """Square tiles, one a picture."""

    name, hf_class, processor_class = "llava", "LlavaForConditionalGeneration", "LlavaProcessor"
    image_token_field = "image_token_index"
    renames: ClassVar[Sequence[tuple[str, str]]] = (
        (r"^lm_head\.weight$", HEAD),
        (r"^(model\.)?vision_tower\.(vision_model\.)?", VISION),
        (r"^model\.multi_modal_projector\.", PROJECTOR),
        (r"^model\.language_model\.", LANGUAGE),
    )
    encoders: tuple[str, ...] = ("clip_vision_model", "siglip_vision_model")
    """Those that the class's forward treats as we do."""
    image_processor = "CLIPImageProcessor"

    def encoder(self, config: Any) -> EncoderKind:
        return encoder(config.vision_config.model_type, self.encoders)

    def model_from_hf(self, config: Any, problems: Problems) -> ModelConfig:
        vision = self.encoder(config).from_hf(config.vision_config, problems)
        text = language(config.text_config.model_type).from_hf(config.text_config, problems)
        text["tie_embeddings"] = ties(config)
        return ModelConfig(
            family=self.name,
            vision=VisionConfig(**(vision | self.features(config, vision, problems))),
            projector=ProjectorConfig(**self.projector_from_hf(config, problems)),
            language=LanguageConfig(**text),
        )

    def features(self, config: Any, vision: dict[str, Any], problems: Problems) -> dict[str, Any]:
        """Which features feed the projector."""
        strategy = problems.only(config, "vision_feature_select_strategy", "default", "full")
        if strategy == "default" and not vision["class_token"]:
            problems.add(
                "vision_feature_select_strategy is default, which drops the first patch of an encoder without class token; supported: full"
            )
        layer = config.vision_feature_layer
        return {
            "feature_layer": list(layer) if isinstance(layer, list | tuple) else layer,
            "keep_class_token": bool(vision["class_token"]) and strategy == "full",
        }

    def projector_from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        """Fields of ProjectorConfig."""
        return {
            "num_layers": 2,
            "bias": bool(config.multimodal_projector_bias),
            "activation": problems.choice(config, "projector_hidden_act", ACTIVATIONS),
        }

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        vision, activations = model.vision, {ours: theirs for theirs, ours in ACTIVATIONS.items()}
        return {
            "architectures": [self.hf_class],
            "model_type": self.name,
            "image_seq_length": model.visual_tokens_per_tile,
            "image_token_index": ids.image,
            "multimodal_projector_bias": model.projector.bias,
            "projector_hidden_act": activations[model.projector.activation],
            "vision_feature_layer": vision.feature_layer,
            "vision_feature_select_strategy": select_strategy(vision),
            "tie_word_embeddings": model.language.tie_embeddings,
            **ids.special(),
            "text_config": language_of(model.language).to_hf(model.language) | ids.special(),
            "vision_config": encoder_of(vision, self.encoders).to_hf(vision),
        }

    def links(self, model: ModelConfig) -> list[Link]:
        text = language_of(model.language)
        return [
            *prefixed(encoder_of(model.vision, self.encoders).links(model.vision), "vision.", VISION),
            *prefixed(self.projector_links(model), "projector.", PROJECTOR),
            *prefixed(text.links(model.language), "language.", LANGUAGE),
            *prefixed(text.head(model.language, HEAD, f"{LANGUAGE}embed_tokens.weight"), "language.", ""),
        ]

    def projector_links(self, model: ModelConfig) -> list[Link]:
        """Relative to the projector."""
        width, inputs = model.language.hidden_size, model.vision.feature_size
        sizes = {"linear_1": (width, inputs), "linear_2": (width, width)}
        parts = ("weight", "bias") if model.projector.bias else ("weight",)
        return [
            plain(f"{name}.{part}", f"{name}.{part}", shape if part == "weight" else shape[:1])
            for name, shape in sizes.items()
            for part in parts
        ]

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": input_ids(prompt)}
        if prompt.tiles_TCHW is not None:
            inputs["pixel_values"] = normalised(model.vision, prompt.tiles_TCHW)
        return inputs

    def image_from_hf(self, folder: Path, model: ModelConfig) -> ImageConfig:
        block, file = processor_block(folder)
        interpolation = interpolation_of(block, file, self.image_processor)
        return ImageConfig(fit=image_fit(block, file) if "size" in block else "stretch", interpolation=interpolation)

    def check_pictures(self, model: ModelConfig, image: ImageConfig) -> None:
        if image.policy == "fixed" or (image.policy == "tiles" and image.max_tiles == 1):
            return
        raise HuggingFaceError(
            f"the model was trained with data.image.policy={image.policy}"
            + (f", max_tiles={image.max_tiles}" if image.policy == "tiles" else "")
            + f", but Hugging Face's {self.hf_class} and its processor know one square tile a picture (policy=fixed): "
            "the exported model would see other pictures than it learned from"
        )

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        # The processor looks for one text both in the messages and in the tokenizer.
        if tokenizer.image_token != IMAGE_TOKEN:
            raise HuggingFaceError(
                f"data.image_token={tokenizer.image_token!r}: {self.hf_class} is written with {IMAGE_TOKEN!r} only, "
                "because its processor looks for one text both in the messages and in the tokenizer"
            )
        vision = model.vision
        return {
            "processor_config.json": {
                "processor_class": self.processor_class,
                "image_token": IMAGE_TOKEN,
                "patch_size": vision.patch_size_px,
                "vision_feature_select_strategy": select_strategy(vision),
                # LlavaProcessor counts patches + this, and one less for "default".
                "num_additional_image_tokens": int(vision.class_token),
                "image_processor": crop_or_stretch_processor(vision, image),
            }
        }


def select_strategy(vision: VisionConfig) -> str:
    """Hugging Face's "default" drops the first feature whatever it is; an encoder without class token needs "full"."""
    return "default" if vision.class_token and not vision.keep_class_token else "full"
