"""BLIP-2 (https://arxiv.org/abs/2301.12597): a ViT, a Q-Former, OPT or another decoder. Source: transformers 5.23, models/blip_2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.encoders import encoder, encoder_of
from megavlm.checkpoint.hf.encoders.base import EncoderKind
from megavlm.checkpoint.hf.families.base import Family, TokenIds, input_ids, normalised
from megavlm.checkpoint.hf.families.paligemma import stretching
from megavlm.checkpoint.hf.language import language, language_of
from megavlm.checkpoint.hf.links import Link, plain, prefixed
from megavlm.checkpoint.hf.processors import image_fit, interpolation_of, processor_block
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.projector import QFormerConfig
from megavlm.config.schema import ImageConfig, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megavlm.data.prompt import Prompt
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.tokenizer import Tokenizer

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


class Blip2(Family):
    """One stretched square a picture, and a fixed number of visual tokens. Dropout is left out, as in every family."""

    name, hf_class, processor_class = "blip-2", "Blip2ForConditionalGeneration", "Blip2Processor"
    image_token_field = "image_token_index"
    chat_template = "blip-2"
    encoders: tuple[str, ...] = ("blip_2_vision_model",)
    qformer_type = "blip_2_qformer"
    embeddings = "qformer."
    """Where the Q-Former's first norm stands."""

    def encoder(self, config: Any) -> EncoderKind:
        return encoder(config.vision_config.model_type, self.encoders)

    def model_from_hf(self, config: Any, problems: Problems) -> ModelConfig:
        if not config.use_decoder_only_language_model:
            problems.add(
                f"text_config.model_type is {config.text_config.model_type!r}, an encoder-decoder: the language models here are "
                "decoders, which read pictures and write text in one sequence; use a checkpoint with OPT"
            )
            problems.check("this model")
        vision = self.encoder(config).from_hf(config.vision_config, problems)
        text = language(config.text_config.model_type).from_hf(config.text_config, problems)
        return ModelConfig(
            family=self.name,
            vision=VisionConfig(**vision | {"feature_layer": -1, "final_norm": True, "keep_class_token": True}),
            projector=ProjectorConfig(kind="qformer", num_layers=1, qformer=QFormerConfig(**self.qformer_from_hf(config, problems))),
            language=LanguageConfig(**text),
        )

    def qformer_from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        """Fields of QFormerConfig."""
        qformer = config.qformer_config
        problems.only(qformer, "use_qformer_text_input", False, default=False, block="qformer_config")
        return {
            "num_queries": config.num_query_tokens,
            "num_layers": qformer.num_hidden_layers,
            "hidden_size": qformer.hidden_size,
            "num_attention_heads": qformer.num_attention_heads,
            "ffn_hidden_size": qformer.intermediate_size,
            "cross_attention_frequency": qformer.cross_attention_frequency,
            "activation": problems.choice(qformer, "hidden_act", ACTIVATIONS, block="qformer_config"),
            "norm_eps": qformer.layer_norm_eps,
        }

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        return {
            "architectures": [self.hf_class],
            "model_type": self.name,
            "image_token_index": ids.image,
            "num_query_tokens": qformer_of(model).num_queries,
            "qformer_config": self.qformer_to_hf(model),
            "text_config": language_of(model.language).to_hf(model.language) | ids.special(),
            "vision_config": encoder_of(model.vision, self.encoders).to_hf(model.vision),
        }

    def qformer_to_hf(self, model: ModelConfig) -> dict[str, Any]:
        """The block of the Q-Former."""
        qformer = qformer_of(model)
        return {
            "model_type": self.qformer_type,
            "hidden_size": qformer.hidden_size,
            "num_hidden_layers": qformer.num_layers,
            "num_attention_heads": qformer.num_attention_heads,
            "intermediate_size": qformer.ffn_hidden_size,
            "cross_attention_frequency": qformer.cross_attention_frequency,
            "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[qformer.activation],
            "layer_norm_eps": qformer.norm_eps,
            "encoder_hidden_size": model.feature_size,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "use_qformer_text_input": False,
        }

    def links(self, model: ModelConfig) -> list[Link]:
        text = language_of(model.language)
        theirs = "language_model.model."
        return [
            *prefixed(encoder_of(model.vision, self.encoders).links(model.vision), "vision.", "vision_model."),
            *prefixed(self.projector_links(model), "projector.", ""),
            *prefixed(text.links(model.language), "language.", theirs),
            *prefixed(text.head(model.language, "language_model.lm_head.weight", f"{theirs}embed_tokens.weight"), "language.", ""),
        ]

    def projector_links(self, model: ModelConfig) -> list[Link]:
        """Our keys relative to the projector, Hugging Face's names whole."""
        qformer, inputs, out = qformer_of(model), model.feature_size, model.language.hidden_size
        width, inner = qformer.hidden_size, qformer.ffn_hidden_size
        links = [
            plain("query_tokens", "query_tokens", (qformer.num_queries, width), theirs=(1, qformer.num_queries, width)),
            *_both("norm.", f"{self.embeddings}layernorm.", width),
        ]
        if (words := qformer.instruction) is not None:
            theirs = f"{self.embeddings}word_embeddings.weight"
            links.append(plain("instruction_embedding.weight", theirs, (words.vocab_size, width)))
            theirs = f"{self.embeddings}position_embeddings.weight"
            links.append(plain("position_embedding", theirs, (words.max_positions, width)))
        for layer in range(qformer.num_layers):
            ours, theirs = f"layers.{layer}.", f"qformer.encoder.layer.{layer}."
            links += _attention(f"{ours}attention.", f"{theirs}attention.", width, width)
            if layer % qformer.cross_attention_frequency == 0:
                links += _attention(f"{ours}reading.", f"{theirs}crossattention.", width, inputs)
            for own, suffix in (("mlp", "_query"), ("words", "")):
                if own == "mlp" or qformer.instruction is not None:
                    links += _both(f"{ours}{own}.up.", f"{theirs}intermediate{suffix}.dense.", inner, width)
                    links += _both(f"{ours}{own}.down.", f"{theirs}output{suffix}.dense.", width, inner)
                    links += _both(f"{ours}{own}.norm.", f"{theirs}output{suffix}.LayerNorm.", width)
        return [*links, *_both("linear.", "language_projection.", out, width)]

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        side = model.vision.image_size_px
        tiles = prompt.tiles_TCHW
        if tiles is None:
            # The class looks at a picture even where the text has no place for one.
            tiles = torch.full((1, model.vision.num_channels, side, side), 127, dtype=torch.uint8)
        return {"input_ids": input_ids(prompt), "pixel_values": normalised(model.vision, tiles)}

    def image_from_hf(self, folder: Path, model: ModelConfig) -> ImageConfig:
        block, file = processor_block(folder)
        interpolation = interpolation_of(block, file, "BlipImageProcessor")
        return ImageConfig(fit=image_fit(block, file) if "size" in block else "stretch", interpolation=interpolation)

    def check_pictures(self, model: ModelConfig, image: ImageConfig) -> None:
        if image.policy != "fixed" or image.fit != "stretch":
            raise HuggingFaceError(
                f"the model was trained with data.image.policy={image.policy}, fit={image.fit}, but {self.processor_class} stretches every "
                "picture to one square (policy=fixed, fit=stretch): the exported model would see other pictures than it learned from"
            )

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        if tokenizer.image_token != IMAGE_TOKEN:
            raise HuggingFaceError(f"data.image_token={tokenizer.image_token!r}: {self.processor_class} knows {IMAGE_TOKEN!r} only")
        return {
            "processor_config.json": {
                "processor_class": self.processor_class,
                "num_query_tokens": qformer_of(model).num_queries,
                "image_processor": stretching(model, image, "BlipImageProcessor"),
            }
        }


def qformer_of(model: ModelConfig) -> QFormerConfig:
    if model.projector.qformer is None:
        raise HuggingFaceError(f"the class has a Q-Former: model.projector.kind={model.projector.kind} does not fit")
    return model.projector.qformer


def _attention(ours: str, theirs: str, width: int, inputs: int) -> Iterator[Link]:
    for name, columns in (("query", width), ("key", inputs), ("value", inputs)):
        yield from _both(f"{ours}{name}.", f"{theirs}attention.{name}.", width, columns)
    yield from _both(f"{ours}output.", f"{theirs}output.dense.", width, width)
    yield from _both(f"{ours}norm.", f"{theirs}output.LayerNorm.", width)


def _both(ours: str, theirs: str, *shape: int) -> Iterator[Link]:
    """Weight and bias of a linear layer or a norm."""
    yield plain(f"{ours}weight", f"{theirs}weight", shape)
    yield plain(f"{ours}bias", f"{theirs}bias", shape[:1])
