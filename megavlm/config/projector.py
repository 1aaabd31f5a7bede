"""The recipe's `model.projector` block."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from megavlm.config.blocks import Block, PositiveFloat, PositiveInt


class ResamplerConfig(Block):
    """Learned queries that read a picture's features, so that every picture becomes as many visual tokens (Perceiver, Idefics2)."""

    num_latents: PositiveInt = 64
    """Visual tokens of a picture, whatever its size."""
    num_layers: PositiveInt = 3
    num_attention_heads: PositiveInt = 16
    num_query_groups: PositiveInt = 4
    """Key/value heads."""
    head_dim: PositiveInt = 96
    ffn_hidden_size: PositiveInt | None = None
    """None: four times the LLM's width."""
    activation: Literal["gelu", "gelu_tanh", "silu"] = "silu"
    norm_eps: PositiveFloat = 1e-6

    @model_validator(mode="after")
    def _check(self) -> ResamplerConfig:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_query_groups={self.num_query_groups}"
            )
        return self


class InstructionConfig(Block):
    """The text that a Q-Former reads beside its queries, in a vocabulary of its own: data.instruction_tokenizer."""

    vocab_size: PositiveInt = 30523
    max_positions: PositiveInt = 512
    """Longer instructions are cut."""


class QFormerConfig(Block):
    """Learned queries that read a picture's features through BERT-like layers with norms after them (BLIP-2)."""

    num_queries: PositiveInt = 32
    """Visual tokens of a picture, whatever its size."""
    num_layers: PositiveInt = 12
    hidden_size: PositiveInt = 768
    num_attention_heads: PositiveInt = 12
    ffn_hidden_size: PositiveInt = 3072
    cross_attention_frequency: PositiveInt = 2
    """The first of so many layers reads the picture's features; in the others queries see each other alone."""
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    norm_eps: PositiveFloat = 1e-12
    instruction: InstructionConfig | None = None
    """Queries also see the text of the message that the picture stands in (InstructBLIP); None: the picture alone (BLIP-2)."""

    @model_validator(mode="after")
    def _check(self) -> QFormerConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}")
        return self


class ProjectorConfig(Block):
    """What maps visual features to the LLM's width."""

    kind: Literal["mlp", "perceiver", "average_pool", "qformer"] = "mlp"
    """mlp: linear layers on each feature. perceiver: a gated MLP (activation(gate) x up) on each feature, then `resampler` (Idefics2).
    average_pool: the mean of `pixel_shuffle` squared patches, an RMSNorm (zero-centred where the LLM's are), one linear map (Gemma 3).
    qformer: `qformer`, then one linear map (BLIP-2)."""
    num_layers: Literal[1, 2, 3] = 2
    """Linear layers, with the activation between them (1: linear; 2: LLaVA-1.5)."""
    hidden_size: PositiveInt | None = None
    """Width between the layers; None: the LLM's hidden size."""
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    bias: bool = True
    pixel_shuffle: PositiveInt = 1
    """Merge pixel_shuffle x pixel_shuffle neighbouring patches into one token before the projection (InternVL and Qwen-VL use 2): their
    features side by side, or with kind=average_pool their mean (Gemma 3: 4)."""
    merged_order: Literal["patches", "channels"] = "patches"
    """Values of merged patches. patches: all of one patch, then those of the next; channels: one channel of all patches, then the next
    (Mistral 3)."""
    merge_linear: bool = False
    """A linear layer without bias from merged patches back to the width of one, before the others (Mistral 3)."""
    image_newline: bool = False
    """A learned token at the end of each row of patches, for data.image.policy=anyres (LLaVA-NeXT)."""
    input_norm: bool = False
    """A LayerNorm on the (shuffled) features before the first linear layer (InternVL)."""
    patch_norm: Literal["layer_norm", "rms_norm"] | None = None
    """A norm on each patch's features before neighbours are merged (layer_norm: Qwen2-VL, Qwen3-VL; rms_norm: Qwen2.5-VL)."""
    norm_eps: PositiveFloat = 1e-5
    """Of patch_norm, input_norm and the norm of kind=average_pool."""
    resampler: ResamplerConfig | None = None
    """kind=perceiver, and only there."""
    qformer: QFormerConfig | None = None
    """kind=qformer, and only there."""

    @property
    def tokens_per_picture(self) -> int | None:
        """Visual tokens of a picture or tile whatever its size; None: as many as its (merged) patches."""
        if self.qformer is not None:
            return self.qformer.num_queries
        return self.resampler.num_latents if self.resampler is not None else None

    @model_validator(mode="after")
    def _check_resampler(self) -> ProjectorConfig:
        if (self.kind == "perceiver") != (self.resampler is not None):
            raise ValueError("kind=perceiver and the block resampler go together: give both (resampler={} has defaults) or neither")
        foreign = self.image_newline or self.input_norm or self.patch_norm or self.merge_linear
        if self.resampler is not None and (self.bias or self.num_layers != 2 or foreign):
            raise ValueError(
                "kind=perceiver has a gated MLP without biases: set bias=false, and leave num_layers, image_newline, input_norm, "
                "patch_norm and merge_linear as they are"
            )
        return self

    @model_validator(mode="after")
    def _check_qformer(self) -> ProjectorConfig:
        if (self.kind == "qformer") != (self.qformer is not None):
            raise ValueError("kind=qformer and the block qformer go together: give both (qformer={} has defaults) or neither")
        foreign = self.image_newline or self.input_norm or self.patch_norm or self.merge_linear or self.pixel_shuffle > 1
        if self.qformer is not None and (not self.bias or self.num_layers != 1 or self.hidden_size is not None or foreign):
            raise ValueError(
                "kind=qformer ends in one linear map with bias, and reads each patch: set num_layers=1, and leave bias, hidden_size, "
                "pixel_shuffle, image_newline, input_norm, patch_norm and merge_linear as they are"
            )
        return self

    @model_validator(mode="after")
    def _check_average_pool(self) -> ProjectorConfig:
        if self.kind == "average_pool":
            if self.num_layers != 1 or self.bias or self.hidden_size is not None:
                raise ValueError("kind=average_pool is one linear map without bias: set num_layers=1 and bias=false, and no hidden_size")
            if self.image_newline or self.input_norm or self.patch_norm or self.merge_linear:
                raise ValueError(
                    "kind=average_pool has a norm of its own and one linear map: "
                    "leave image_newline, input_norm, patch_norm and merge_linear as they are"
                )
        return self
