"""What a family is: a whole Hugging Face model class, as one object.

Shape legend: L tokens of a prompt.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from megavlm.checkpoint.hf.encoders.base import EncoderKind
from megavlm.checkpoint.hf.language import language_of
from megavlm.checkpoint.hf.links import Link
from megavlm.checkpoint.hf.reading import Problems, quiet_transformers
from megavlm.config.schema import ImageConfig, ModelConfig, PictureMarks, VisionConfig
from megavlm.data.prompt import Prompt
from megavlm.data.tokenizer import Tokenizer

_BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq|rotary_emb\.original_inv_freq)$")
"""Constants that old transformers releases stored among the weights."""


@dataclass(frozen=True)
class TokenIds:
    """Ids that a config names."""

    image: int | None = None
    bos: int | None = None
    eos: int | list[int] | None = None
    pad: int | None = None
    more: Mapping[str, int] = field(default_factory=dict)
    """Ids of a family's other special tokens, by the name of the config's field."""

    def special(self) -> dict[str, Any]:
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


class Family(ABC):
    """A Hugging Face model class, and how its folders map to a ModelConfig and its weights.

    To add one: subclass in a file of its own, put an object of it into `registry.FAMILIES`, and its tiny models into
    `megavlm.testing.families`; every proof then runs over it. docs/families.md shows the result.
    """

    name: ClassVar[str]
    """`model.family`; the `model_type` of the class's config where there is one."""
    hf_class: ClassVar[str]
    """Class that an export loads as."""
    becomes: ClassVar[str | None] = None
    """A layout that is read and never written: the family that its folders are read as; None: the family is its own."""
    processor_class: ClassVar[str | None] = None
    image_token_field: ClassVar[str] = "image_token_id"
    """Field of the config with the placeholder's id."""
    token_fields: ClassVar[Mapping[str, str]] = {}
    """Further fields of the config that hold token ids -> text of the token."""
    tokenizer_fields: ClassVar[Mapping[str, str]] = {}
    """Attributes that the processor looks up in the tokenizer -> text of the token (InternVL); they go to tokenizer_config.json."""
    chat_template: ClassVar[str | None] = None
    """data.chat_template for folders that bring none."""
    renames: ClassVar[Sequence[tuple[str, str]]] = ()
    """(regular expression, replacement) from names of live modules and of older folders to those that transformers 5 writes to disk."""

    def handles(self, config: Mapping[str, Any]) -> bool:
        """Is this `config.json` one of the family's?"""
        return config.get("model_type") == self.name

    @abstractmethod
    def model_from_hf(self, config: Any, problems: Problems) -> ModelConfig:
        """The model block of a config, pixel statistics apart; settings that we do not have go to `problems`."""

    @abstractmethod
    def config_to_hf(self, model: ModelConfig, ids: TokenIds) -> dict[str, Any]:
        """`config.json`. It need not refuse anything: an export is compared with what reading it back gives."""

    @abstractmethod
    def links(self, model: ModelConfig) -> list[Link]:
        """Every weight of the model, in the order of the forward pass, with its names on the disk."""

    @abstractmethod
    def hf_inputs(self, model: ModelConfig, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Arguments of the Hugging Face model's forward for one prompt: what its processor makes of the same pictures."""

    def picture_config(self, model: ModelConfig, image: ImageConfig) -> dict[str, Any]:
        """Fields of `config.json` that say how pictures are cut, where the class itself has such (LLaVA-NeXT's grids)."""
        del model, image
        return {}

    def image_from_hf(self, folder: Path, model: ModelConfig) -> ImageConfig:
        """The data.image block that makes of a picture what the folder's processor makes of it."""
        del folder, model
        return ImageConfig()

    def image_of_proofs(self, folder: Path, model: ModelConfig) -> ImageConfig:
        """The data.image block of pictures that both classes are compared on."""
        return self.image_from_hf(folder, model)

    def marks(self, image: ImageConfig) -> PictureMarks:
        """What the family's processor writes round and between the visual tokens of a picture that is cut as `image` says."""
        del image
        return PictureMarks()

    def check_pictures(self, model: ModelConfig, image: ImageConfig) -> None:  # noqa: B027
        """Raise HuggingFaceError when the family's processor cannot make of a picture what training made of it."""

    def processor_files(self, model: ModelConfig, image: ImageConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        """File name -> content, for a model that was not imported with a processor."""
        del model, image, tokenizer
        return {}

    def statistics(self, config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of pixels when a folder has no processor."""
        encoder = self.encoder(config)
        return (encoder.mean, encoder.std) if encoder is not None else (EncoderKind.mean, EncoderKind.std)

    def encoder(self, config: Any) -> EncoderKind | None:
        """The encoder of a config; None: a text-only family."""
        del config
        return None

    def disk_name(self, name: str) -> str | None:
        """The name that transformers 5 gives a tensor on disk; None for constants that are no weights."""
        if _BUFFERS.search(name):
            return None
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def disk_tensors(self, model: ModelConfig, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A live module's tensor (or its gradient) by the names, and in the pieces, that transformers 5 writes to disk."""
        pieces = {name: tensor} if model.language.moe is None else language_of(model.language).disk_tensors(name, tensor)
        return {on_disk: piece for live, piece in pieces.items() if (on_disk := self.disk_name(live)) is not None}

    def hf_model(self, folder: str | Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """The Hugging Face model of a folder, for evaluation."""
        cls = getattr(quiet_transformers(), self.hf_class)
        return cls.from_pretrained(str(folder), dtype=dtype, use_safetensors=True, **options).eval()


def ties(config: Any) -> bool:
    """Is a vision-language class's head its embedding? The whole config says so, the class's defaults filled in; not the LLM's block, but
    for the classes whose configs look there themselves (transformers 5.23, modeling_utils.get_expanded_tied_weights_keys)."""
    return bool(config.tie_word_embeddings)


def normalised(vision: VisionConfig, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pictures (..., C, H, W) as the model's processor hands them over: rescaled and normalised, fp32."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (vision.image_mean, vision.image_std))
    return (pixels.float() / 255 - mean) / std


def input_ids(prompt: Prompt) -> torch.Tensor:
    """(1, L)."""
    return torch.as_tensor(list(prompt.ids), dtype=torch.int64)[None]


Fit = Literal["stretch", "crop", "pad"]
