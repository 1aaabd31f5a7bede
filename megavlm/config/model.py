"""The recipe's `model` block: encoder x projector x LLM."""

from __future__ import annotations

from pydantic import Field, model_validator

from megavlm.config.blocks import Block, PositiveFloat
from megavlm.config.language import LanguageConfig
from megavlm.config.projector import ProjectorConfig
from megavlm.config.vision import VisionConfig


class ModelConfig(Block):
    """Encoder x projector x LLM."""

    family: str = "llava"
    """Which Hugging Face class the export becomes: a name in docs/families.md."""
    text_only: bool = False
    """There is no encoder and no projector: a language model alone."""
    vision: VisionConfig = Field(default_factory=VisionConfig)
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)
    language: LanguageConfig = Field(default_factory=LanguageConfig)
    init_from: str | None = None
    """Hugging Face folder whose weights the run starts from; None: random initialisation."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of random initialisation (linear layers, embeddings)."""

    @property
    def visual_tokens_per_tile(self) -> int:
        """Placeholders that one tile expands to."""
        if self.projector.tokens_per_picture is not None:
            return self.projector.tokens_per_picture
        if self.projector.pixel_shuffle == 1:
            return self.vision.num_features
        return self.vision.num_patches // self.projector.pixel_shuffle**2

    def visual_tokens(self, rows: int, columns: int) -> int:
        """Placeholders that a picture of so many patches expands to (native resolution: no class token)."""
        return self.projector.tokens_per_picture or rows * columns // self.projector.pixel_shuffle**2

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        shuffle, side = self.projector.pixel_shuffle, self.vision.grid_side
        if side % shuffle:
            raise ValueError(f"projector.pixel_shuffle={shuffle} does not divide the {side} patches on a tile's side")
        if shuffle > 1 and self.vision.class_token and self.vision.keep_class_token:
            raise ValueError("projector.pixel_shuffle needs a square of patches: set vision.keep_class_token=false")
        return self
