"""What a language model of transformers is to us: one object a model class, used alone and by every family that contains it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from megavlm.checkpoint.hf.links import Link, plain
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import LanguageConfig


class LanguageKind(ABC):
    """A Hugging Face causal language model class."""

    model_type: ClassVar[str]
    """`model_type` of its config."""
    causal_class: ClassVar[str]
    """Name of the class with a head."""

    @abstractmethod
    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        """Fields of LanguageConfig."""

    @abstractmethod
    def to_hf(self, language: LanguageConfig) -> dict[str, Any]:
        """The model's config block. It need not refuse anything: an export is compared with what reading it back gives."""

    @abstractmethod
    def links(self, language: LanguageConfig) -> list[Link]:
        """Embedding, layers and final norm: our keys relative to `language.`, Hugging Face's names relative to the model without head."""

    def head(self, language: LanguageConfig, name: str, embedding: str) -> list[Link]:
        """The output head, `name` being its weight at Hugging Face and `embedding` that of the embedding; tied ones are one tensor."""
        del embedding
        if language.tie_embeddings:
            return []
        return [plain("output_layer.weight", name, (language.vocab_size, language.hidden_size))]

    def disk_tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A live module's tensor in the pieces that transformers 5 writes to disk, by live names; most classes have one piece."""
        return {name: tensor}
