"""The recipe's `model` block: encoder x projector x LLM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megavlm.config.blocks import Block, PositiveFloat, PositiveInt


class VisionConfig(Block):
    """A pre-LayerNorm vision transformer (CLIP and SigLIP styles)."""

    image_size_px: PositiveInt = 336
    """Side of the square tile that the encoder sees."""
    patch_size_px: PositiveInt = 14
    num_channels: PositiveInt = 3
    num_layers: PositiveInt = 24
    """Transformer layers that the weights have (including any above `feature_layer`)."""
    hidden_size: PositiveInt = 1024
    num_attention_heads: PositiveInt = 16
    ffn_hidden_size: PositiveInt = 4096
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    norm_eps: PositiveFloat = 1e-5
    class_token: bool = True
    """CLIP has one, SigLIP has none."""
    pre_norm: bool = True
    """A LayerNorm between embeddings and the first layer (CLIP)."""
    patch_bias: bool = False
    """Bias of the patch embedding (SigLIP)."""
    feature_layer: int = -2
    """Which hidden state feeds the projector, counted as Hugging Face does: -1 is the last layer's output, -2 the one before."""
    final_norm: bool = False
    """Apply the encoder's final LayerNorm to the features. LLaVA takes raw hidden states: False."""
    keep_class_token: bool = False
    """Feed the class token to the LLM as well (Hugging Face's vision_feature_select_strategy="full")."""
    pooling_head: bool = False
    """The imported weights hold an attention-pooling head (SigLIP); carried along untouched for a lossless export."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def num_patches(self) -> int:
        """Patches of one tile."""
        return (self.image_size_px // self.patch_size_px) ** 2

    @property
    def num_used_layers(self) -> int:
        """Layers that the forward pass executes."""
        return self.feature_layer + 1 + self.num_layers if self.feature_layer < 0 else self.feature_layer

    @property
    def num_features(self) -> int:
        """Feature vectors that one tile hands to the projector."""
        return self.num_patches + (1 if self.class_token and self.keep_class_token else 0)

    @model_validator(mode="after")
    def _check(self) -> VisionConfig:
        if self.image_size_px % self.patch_size_px:
            raise ValueError(f"image_size_px={self.image_size_px} is not a multiple of patch_size_px={self.patch_size_px}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}")
        if not 1 <= self.num_used_layers <= self.num_layers:
            raise ValueError(f"feature_layer={self.feature_layer} does not name the output of one of {self.num_layers} layers")
        if self.final_norm and self.num_used_layers != self.num_layers:
            raise ValueError("final_norm needs feature_layer=-1: the final norm belongs to the last layer's output")
        return self


class ProjectorConfig(Block):
    """What maps visual features to the LLM's width."""

    num_layers: Literal[1, 2] = 2
    """1: one linear layer; 2: linear, GELU, linear (LLaVA-1.5)."""
    hidden_size: PositiveInt | None = None
    """Width between the two layers; None: the LLM's hidden size."""
    bias: bool = True
    pixel_shuffle: PositiveInt = 1
    """Merge pixel_shuffle x pixel_shuffle neighbouring patches into one token before the projection (InternVL uses 2)."""
    image_newline: bool = False
    """A learned token at the end of each row of patches, for data.image.policy=anyres (LLaVA-NeXT)."""
    input_norm: bool = False
    """A LayerNorm on the (shuffled) features before the first linear layer (InternVL)."""


class LanguageConfig(Block):
    """A decoder-only language model: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    vocab_size: PositiveInt = 32064
    """Rows of the embedding as the tokenizer and Hugging Face know it; padded internally for tensor parallelism."""
    num_layers: PositiveInt = 32
    hidden_size: PositiveInt = 4096
    num_attention_heads: PositiveInt = 32
    num_query_groups: PositiveInt | None = None
    """Key/value heads (grouped-query attention); None: as many as attention heads."""
    head_dim: PositiveInt | None = None
    """Width of a head; None: hidden_size / num_attention_heads."""
    ffn_hidden_size: PositiveInt = 11008
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10000.0
    qkv_bias: bool = False
    """Bias on query, key and value (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on each head's query and key (Qwen3)."""
    tie_embeddings: bool = False
    """Output head shares the embedding's weight."""
    max_positions: PositiveInt = 4096

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _check(self) -> LanguageConfig:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}")
        if self.head_width % 2:
            raise ValueError(f"heads are {self.head_width} wide, and rotary positions need an even width: change head_dim or hidden_size")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} is not a multiple of num_query_groups={self.kv_heads}")
        return self


class ModelConfig(Block):
    """Encoder x projector x LLM."""

    family: Literal["llava"] = "llava"
    """Which Hugging Face class the export becomes."""
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
        if self.projector.pixel_shuffle == 1:
            return self.vision.num_features
        return self.vision.num_patches // self.projector.pixel_shuffle**2

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        shuffle, side = self.projector.pixel_shuffle, self.vision.image_size_px // self.vision.patch_size_px
        if side % shuffle:
            raise ValueError(f"projector.pixel_shuffle={shuffle} does not divide the {side} patches on a tile's side")
        if shuffle > 1 and self.vision.class_token and self.vision.keep_class_token:
            raise ValueError("projector.pixel_shuffle needs a square of patches: set vision.keep_class_token=false")
        return self
