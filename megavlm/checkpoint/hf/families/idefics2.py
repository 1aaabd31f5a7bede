"""Idefics2 (https://arxiv.org/abs/2405.02246): pictures in their own size, a perceiver resampler, Mistral.

Source: transformers 5.23, models/idefics2.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.encoders import encoder, encoder_of
from megavlm.checkpoint.hf.encoders.base import EncoderKind
from megavlm.checkpoint.hf.families.base import Family, TokenIds, input_ids, ties
from megavlm.checkpoint.hf.families.native import check_native, edges_of, padded_pictures
from megavlm.checkpoint.hf.language import language, language_of
from megavlm.checkpoint.hf.links import Link, plain, prefixed
from megavlm.checkpoint.hf.processors import interpolation_of, normalising, processor_block, resample_of
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import ImageConfig, LanguageConfig, ModelConfig, PictureMarks, ProjectorConfig, VisionConfig
from megavlm.data.prompt import Prompt
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.tokenizer import Tokenizer

FAKE = "<fake_token_around_image>"
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class Idefics(Family):
    """What Idefics2, Idefics3 and SmolVLM have in common: names of modules, the encoder's normed last layer, any LLM."""

    encoders: ClassVar[tuple[str, ...]]

    def encoder(self, config: Any) -> EncoderKind:
        # The class builds its own encoder whatever the block's model_type says: published folders write idefics3 there.
        return encoder(self.encoders[0], self.encoders)

    def model_from_hf(self, config: Any, problems: Problems) -> ModelConfig:
        vision = self.encoder(config).from_hf(config.vision_config, problems)
        text = language(config.text_config.model_type).from_hf(config.text_config, problems)
        text["tie_embeddings"] = ties(config)
        return ModelConfig(
            family=self.name,
            vision=VisionConfig(**(vision | {"feature_layer": -1, "final_norm": True})),
            projector=ProjectorConfig(**self.projector_from_hf(config, problems)),
            language=LanguageConfig(**text),
        )

    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        special = ids.special()
        if ids.pad is not None and ids.pad >= model.language.vocab_size:
            # Idefics3Config has a pad_token_id beside the LLM's, 128002 whatever the vocabulary, and an import finds that one.
            del special["pad_token_id"]
        return {
            "architectures": [self.hf_class],
            "model_type": self.name,
            "image_token_id": ids.image,
            "tie_word_embeddings": model.language.tie_embeddings,
            "text_config": language_of(model.language).to_hf(model.language) | special,
            "vision_config": encoder_of(model.vision, self.encoders).to_hf(model.vision),
            **self.projector_to_hf(model),
        }

    def links(self, model: ModelConfig) -> list[Link]:
        text = language_of(model.language)
        return [
            *prefixed(encoder_of(model.vision, self.encoders).links(model.vision), "vision.", "model.vision_model."),
            *prefixed(self.projector_links(model), "projector.", "model.connector."),
            *prefixed(text.links(model.language), "language.", "model.text_model."),
            *prefixed(text.head(model.language, "lm_head.weight", "model.text_model.embed_tokens.weight"), "language.", ""),
        ]

    @staticmethod
    def check_image_token(hf_class: str, tokenizer: Tokenizer) -> None:
        """Raise HuggingFaceError when the processor would not find the tokenizer's placeholder."""
        if tokenizer.image_token != IMAGE_TOKEN:
            raise HuggingFaceError(
                f"data.image_token={tokenizer.image_token!r}: the processor of {hf_class} looks for {IMAGE_TOKEN!r}: train with that token"
            )

    @abstractmethod
    def projector_from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        """Fields of ProjectorConfig."""

    @abstractmethod
    def projector_to_hf(self, model: ModelConfig) -> dict[str, Any]:
        """Its fields in config.json."""

    @abstractmethod
    def projector_links(self, model: ModelConfig) -> list[Link]:
        """Relative to the projector and to `model.connector.`."""


class Idefics2(Idefics):
    """A fixed number of visual tokens a picture."""

    name, hf_class, processor_class = "idefics2", "Idefics2ForConditionalGeneration", "Idefics2Processor"
    encoders = ("idefics2_vision",)

    def projector_from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        resampler, text = config.perceiver_config, config.text_config
        problems.only(resampler, "hidden_size", text.hidden_size, block="perceiver_config")
        activations = {"activation": problems.choice(resampler, "hidden_act", ACTIVATIONS, block="perceiver_config")}
        return {
            "kind": "perceiver",
            "bias": False,
            "hidden_size": text.intermediate_size,
            "activation": problems.choice(text, "hidden_act", ACTIVATIONS, block="text_config"),
            "resampler": {
                "num_latents": resampler.resampler_n_latents,
                "num_layers": resampler.resampler_depth,
                "num_attention_heads": resampler.resampler_n_heads,
                "num_query_groups": resampler.num_key_value_heads,
                "head_dim": resampler.resampler_head_dim,
                "norm_eps": resampler.rms_norm_eps,
                **activations,
            },
        }

    def projector_to_hf(self, model: ModelConfig) -> dict[str, Any]:
        resampler = model.projector.resampler
        if resampler is None:
            raise HuggingFaceError(f"{self.hf_class} has a perceiver resampler: model.projector.kind={model.projector.kind} does not fit")
        theirs = {ours: name for name, ours in ACTIVATIONS.items()}
        return {
            "perceiver_config": {
                "model_type": "idefics2_perceiver",
                "hidden_act": theirs[resampler.activation],
                "hidden_size": model.language.hidden_size,
                "rms_norm_eps": resampler.norm_eps,
                "resampler_n_latents": resampler.num_latents,
                "resampler_depth": resampler.num_layers,
                "resampler_n_heads": resampler.num_attention_heads,
                "resampler_head_dim": resampler.head_dim,
                "num_key_value_heads": resampler.num_query_groups,
            }
        }

    def projector_links(self, model: ModelConfig) -> list[Link]:
        resampler, width = model.projector.resampler, model.language.hidden_size
        assert resampler is not None
        query, key = (n * resampler.head_dim for n in (resampler.num_attention_heads, resampler.num_query_groups))
        links = [
            *_mlp_links("mlp.", "modality_projection.", model.vision.feature_size, model.projector.hidden_size or width, width),
            plain("latents", "perceiver_resampler.latents", (resampler.num_latents, width)),
        ]
        for layer in range(resampler.num_layers):
            ours, theirs = f"layers.{layer}.", f"perceiver_resampler.layers.{layer}."
            norms = {"latents_norm": "input_latents_norm", "context_norm": "input_context_norm", "mlp_norm": "post_attention_layernorm"}
            links += [plain(f"{ours}{own}.weight", f"{theirs}{name}.weight", (width,)) for own, name in norms.items()]
            shapes = {
                "query": ("q", (query, width)),
                "key": ("k", (key, width)),
                "value": ("v", (key, width)),
                "output": ("o", (width, query)),
            }
            links += [plain(f"{ours}{own}.weight", f"{theirs}self_attn.{x}_proj.weight", shape) for own, (x, shape) in shapes.items()]
            links += _mlp_links(f"{ours}mlp.", f"{theirs}mlp.", width, resampler.ffn_hidden_size or 4 * width, width)
        return [*links, plain("final_norm.weight", "perceiver_resampler.norm.weight", (width,))]

    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": input_ids(prompt)}
        if prompt.pixels_X is not None:
            pixels, sizes = padded_pictures(model.vision, prompt)
            mask = torch.zeros(len(sizes), *pixels.shape[2:], dtype=torch.int64)
            for i, (height, width) in enumerate(sizes):
                mask[i, :height, :width] = 1
            inputs |= {"pixel_values": pixels[None], "pixel_attention_mask": mask[None]}
        return inputs

    def marks(self, image: ImageConfig) -> PictureMarks:
        return PictureMarks(before=FAKE, after=FAKE, merge=True, word_space=True)

    def image_from_hf(self, folder: Path, model: ModelConfig) -> ImageConfig:
        block, file = processor_block(folder)
        if block.get("do_image_splitting", False):
            whole = self.image_of_proofs(folder, model)
            given = whole.model_copy(update={"marks": self.marks(whole)}).model_dump(mode="json", exclude_defaults=True)
            raise HuggingFaceError(
                f"{file}: do_image_splitting=true (each picture and its four quarters) is no policy of data.image; supported: false, "
                f"which the same weights take. Write do_image_splitting=false into that file, or train with data.image={json.dumps(given)}"
            )
        return self.image_of_proofs(folder, model)

    def image_of_proofs(self, folder: Path, model: ModelConfig) -> ImageConfig:
        """Whole pictures, where the processor would cut them too."""
        block, file = processor_block(folder)
        edges = edges_of(folder) or {"longest_edge": 980, "shortest_edge": 378}
        return ImageConfig(
            policy="native",
            whole_patches="cut",
            min_tokens_per_image=1,
            longest_edge_px=edges["longest_edge"],
            shortest_edge_px=edges["shortest_edge"],
            interpolation=interpolation_of(block, file, "Idefics2ImageProcessor"),
        )

    def check_pictures(self, model: ModelConfig, image: ImageConfig) -> None:
        least = max(1, (image.shortest_edge_px or 1) // model.vision.patch_size_px) ** 2
        check_native(self.hf_class, image, "cut", least)

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        self.check_image_token(self.hf_class, tokenizer)
        processor = {
            "image_processor_type": "Idefics2ImageProcessor",
            "do_image_splitting": False,
            "do_pad": True,
            "do_resize": True,
            "size": {"longest_edge": image.longest_edge_px, "shortest_edge": image.shortest_edge_px or 1},
            "resample": resample_of(image),
            **normalising(model.vision),
        }
        own = {"processor_class": self.processor_class, "image_seq_len": model.visual_tokens_per_tile, "image_processor": processor}
        return {"processor_config.json": own}


def _mlp_links(ours: str, theirs: str, inputs: int, inner: int, outputs: int) -> list[Link]:
    shapes = {"gate": (inner, inputs), "up": (inner, inputs), "down": (outputs, inner)}
    return [plain(f"{ours}{name}.weight", f"{theirs}{name}_proj.weight", shape) for name, shape in shapes.items()]
