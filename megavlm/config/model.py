"""The recipe's `model` block: encoder x projector x LLM."""

from __future__ import annotations

from collections.abc import Sequence

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
    """There is no encoder and no projector: a language model alone. Stages have objective=text."""
    vision: VisionConfig = Field(default_factory=VisionConfig)
    vision_beside: list[VisionConfig] = Field(default_factory=list)
    """Further encoders that see the same pixels, each with its own statistics; features are joined by channel, patch by patch
    (Prismatic: SigLIP and DINOv2, https://arxiv.org/abs/2402.07865). Their image_size_px is that of their position table alone."""
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)
    language: LanguageConfig = Field(default_factory=LanguageConfig)
    init_std: PositiveFloat = 0.02
    """Standard deviation of random initialisation (linear layers, embeddings)."""

    @property
    def encoders(self) -> tuple[VisionConfig, ...]:
        """All that look at a picture."""
        return (self.vision, *self.vision_beside)

    @property
    def feature_size(self) -> int:
        """Width of a feature vector as the projector gets it."""
        return sum(encoder.feature_size for encoder in self.encoders)

    @property
    def projector_input_size(self) -> int:
        """Width of what the projector's first linear map takes: neighbours side by side, unless they are averaged."""
        return self.feature_size * (1 if self.projector.kind == "average_pool" else self.projector.pixel_shuffle**2)

    @property
    def visual_tokens_per_tile(self) -> int:
        """Placeholders that one tile expands to."""
        if self.projector.tokens_per_picture is not None:
            return self.projector.tokens_per_picture
        if self.projector.pixel_shuffle == 1:
            return self.vision.num_features
        return self.vision.num_patches // self.projector.pixel_shuffle**2

    def visual_grids(self, tile_grids: Sequence[tuple[int, int]] | None, num_tiles: int) -> list[tuple[int, int]]:
        """(rows, columns) of visual tokens of each picture, or where `tile_grids` is None of each of `num_tiles` tiles."""
        factor, side = self.projector.pixel_shuffle, self.vision.grid_side
        grids = tile_grids if tile_grids is not None else [(side, side)] * num_tiles
        return [(rows // factor, columns // factor) for rows, columns in grids]

    def visual_tokens(self, rows: int, columns: int) -> int:
        """Placeholders that a picture of so many patches expands to (native resolution: no class token)."""
        return self.projector.tokens_per_picture or rows * columns // self.projector.pixel_shuffle**2

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        shuffle, side = self.projector.pixel_shuffle, self.vision.grid_side
        if side % shuffle:
            raise ValueError(f"projector.pixel_shuffle={shuffle} does not divide the {side} patches on a tile's side")
        if self.language.cross_attention is not None and self.text_only:
            raise ValueError("language.cross_attention reads pictures, and with text_only=true there are none")
        if self.vision.canvas is not None and self.vision_beside:
            raise ValueError("vision.canvas takes whole pictures, and vision_beside the same tiles one by one: use one of them")
        if self.language.cross_attention is not None and self.projector.image_newline:
            raise ValueError("projector.image_newline is for pictures among the tokens, and language.cross_attention reads them elsewhere")
        if self.language.cross_attention is not None and self.vision.deepstack_layers:
            raise ValueError("vision.deepstack_layers add to visual tokens, and with language.cross_attention a picture has none")
        if shuffle > 1 and self.vision.class_token and self.vision.keep_class_token:
            raise ValueError("projector.pixel_shuffle needs a square of patches: set vision.keep_class_token=false")
        if not self.text_only:
            self._check_beside()
            self._check_plane()
            return self
        for name in ("vision", "vision_beside", "projector"):
            if getattr(self, name) != ModelConfig.model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"text_only=true is a model without encoder and projector: leave {name} out")
        if self.language.cross_attention is not None:
            raise ValueError("text_only=true: language.cross_attention reads pictures, and there are none")
        return self

    def _check_beside(self) -> None:
        """Encoders side by side must make the same features of a picture."""
        for i, other in enumerate(self.vision_beside):
            for name in ("patch_size_px", "num_channels", "pooled"):
                theirs, first = getattr(other, name), getattr(self.vision, name)
                if theirs != first:
                    raise ValueError(f"vision_beside[{i}].{name}={theirs}, but encoders side by side need that of model.vision: {first}")
        if self.vision_beside and any(encoder.class_token and encoder.keep_class_token for encoder in self.encoders):
            raise ValueError("vision_beside joins features patch by patch: set keep_class_token=false in every encoder")
        if self.vision_beside and any(encoder.canvas is not None for encoder in self.encoders):
            raise ValueError("vision_beside joins features of single tiles: it does not go with canvas")
        if any(encoder.deepstack_layers for encoder in self.vision_beside):
            raise ValueError("vision_beside: set deepstack_layers=[] there; only model.vision hands features to the LLM's layers")

    def _check_plane(self) -> None:
        """Fields that need one visual token for each block of patches."""
        deep, window = self.vision.deepstack_layers, self.vision.attention_window_px
        projector, mrope = self.projector, self.language.mrope_sections is not None
        others = projector.kind != "mlp" or projector.image_newline or self.vision.pooled or self.vision.keep_class_token
        for name, is_set in (("language.mrope_sections", mrope), ("vision.deepstack_layers", bool(deep))):
            if is_set and (others or self.vision.canvas is not None):
                raise ValueError(
                    f"{name} needs one visual token for each block of patches: set projector.kind=mlp, projector.image_newline=false, "
                    "vision.pooled=false, vision.keep_class_token=false, and no vision.canvas"
                )
        if mrope and self.language.cross_attention is not None:
            raise ValueError("language.mrope_sections are for pictures among the tokens, and language.cross_attention reads them elsewhere")
        if len(deep) > self.language.num_layers:
            raise ValueError(f"vision.deepstack_layers={deep} names more layers than the LLM's {self.language.num_layers}")
        block_px = self.vision.patch_size_px * self.projector.pixel_shuffle
        if window is not None and window % block_px:
            raise ValueError(f"vision.attention_window_px={window} is not a multiple of the {block_px} px of a block of patches")
