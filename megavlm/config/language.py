"""The recipe's `model.language` block."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megavlm.config.blocks import Block, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

ROPE_PARAMETERS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": ({"short_factor", "long_factor", "original_max_position_embeddings"}, {"factor", "attention_factor"}),
}
"""Kind of scaling -> its parameters: those that it needs, and others."""


class RopeScaling(Block):
    """How rotary positions reach beyond the length that the model was first trained with.

    The formulas are those of transformers 5.23, `modeling_rope_utils.py`; `parameters` are its keys (factor, low_freq_factor, ...).
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    """dynamic and longrope look at the length of each segment."""
    parameters: dict[str, float | int | bool | list[float]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        required, optional = ROPE_PARAMETERS[self.kind]
        missing, unknown = sorted(required - self.parameters.keys()), sorted(self.parameters.keys() - required - optional)
        if missing or unknown:
            wrong = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"does not know {', '.join(unknown)}"] * bool(unknown)
            raise ValueError(f"rope_scaling of kind={self.kind} {' and '.join(wrong)}")
        for name, value in self.parameters.items():
            wanted = "list" if name in ("short_factor", "long_factor") else "number"
            if isinstance(value, list) != (wanted == "list"):
                raise ValueError(f"rope_scaling.parameters.{name} must be a {wanted}, not {value!r}")
        return self


class MoeConfig(Block):
    """Experts instead of one MLP (https://arxiv.org/abs/2101.03961): a router sends each token to a few of them."""

    num_experts: PositiveInt = 8
    top_k: PositiveInt = 2
    """Experts that a token goes to."""
    ffn_hidden_size: PositiveInt = 14336
    """Inner width of one expert."""
    norm_topk_prob: bool = True
    """The weights of a token's experts add up to 1; False: they are their share of all experts' (Qwen3-MoE before its release)."""
    dense_layers: list[int] = Field(default_factory=list)
    """Layers, counted from 0, that have one MLP of language.ffn_hidden_size instead."""
    aux_loss: NonNegativeFloat = 0.0
    """Coefficient of the loss that balances experts (Switch Transformer, section 2.2), added to gradients, not to the reported loss."""

    @model_validator(mode="after")
    def _check(self) -> MoeConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
        return self


class CrossAttentionConfig(Block):
    """Layers of the stack that read pictures: queries from the text, keys and values from visual features, then an MLP; what each adds
    passes a gate tanh(g), 0 at the start.

    Pictures then stand in the text as one token each and are read as features, not as tokens. A token sees the picture before it, and
    pictures side by side as one. Mllama (Llama 3.2 Vision), and Flamingo's gated cross-attention (https://arxiv.org/abs/2204.14198).
    """

    layers: list[int]
    """Such layers, counted from 0 among all of `num_layers`. Flamingo puts one before every n-th layer: [0, n + 1, 2n + 2, ...]."""
    qk_norm: bool = False
    """RMSNorm on each head's query and key (Mllama)."""
    before_first_picture: Literal["nothing", "all"] = "nothing"
    """What tokens before a sample's first picture see: nothing (Flamingo), or all features of the sample, those of empty tiles too
    (Mllama as transformers computes it)."""
    mlp_without_picture: bool = True
    """The MLP also works on tokens that no picture stands before (Flamingo); False: these pass it unchanged (Mllama)."""

    @model_validator(mode="after")
    def _check(self) -> CrossAttentionConfig:
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"cross_attention.layers={self.layers} must name at least one layer, and each once")
        return self


class LanguageConfig(Block):
    """A decoder-only language model. The defaults are Llama's: RMSNorm, SwiGLU, rotary positions."""

    family: str | None = None
    """Hugging Face class that an export takes where several hold the same network (mistral, phi3); None: the first that does."""
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
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    """activation(gate) x up (SwiGLU with silu, GeGLU with gelu_tanh) instead of activation(up)."""
    cross_attention: CrossAttentionConfig | None = None
    """Pictures are read by layers of their own (Flamingo, Mllama); None: visual features take the places of their tokens."""
    read_only_tokens: int = Field(default=0, ge=0)
    """Rows of the embedding behind the vocabulary, for tokens that are read and never predicted (Mllama: 8)."""
    moe: MoeConfig | None = None
    """Mixture of experts (Qwen3-MoE, Mixtral); None: one MLP a layer."""
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: PositiveFloat = 1e-5
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight (Gemma)."""
    sandwich_norm: bool = False
    """A norm also on what attention and MLP add to the residual (Gemma 2 and 3)."""
    qkv_bias: bool = False
    """Bias on query, key and value (Qwen2)."""
    linear_bias: bool = False
    """Biases of the attention's output and of the MLP (OPT)."""
    qk_norm: bool = False
    """RMSNorm on each head's query and key (Qwen3, Gemma 3)."""
    positions: Literal["rotary", "learned"] = "rotary"
    """learned: one vector a position, added to the embedding (OPT)."""
    position_offset: int = Field(default=0, ge=0)
    """Rows of the table of learned positions before that of position 0 (OPT: 2)."""
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: PositiveFloat | None = None
    """Base of rotary positions, unscaled, in layers with a sliding window (Gemma 3); None: as in the others."""
    rotary_fraction: Fraction = 1.0
    """Leading part of each head that is rotated (Phi-4-mini)."""
    mrope_sections: list[PositiveInt] | None = None
    """Multimodal rotary positions: rotation pairs that follow time, row and column (Qwen2-VL); None: ordinary positions."""
    mrope_interleaved: bool = False
    """Time, row and column take turns through the pairs instead of following each other (Qwen3-VL)."""
    attention_scale: PositiveFloat | None = None
    """What query x key is multiplied by; None: 1 / sqrt(head width)."""
    attention_softcap: PositiveFloat | None = None
    """Attention scores are softcap x tanh(score / softcap) (Gemma 2)."""
    logit_softcap: PositiveFloat | None = None
    """The same for logits."""
    sliding_window_tokens: PositiveInt | None = None
    """Tokens, itself included, that a token sees in the layers `sliding_layers`; None: all before it."""
    sliding_layers: list[int] = Field(default_factory=list)
    """Layers, counted from 0, with the sliding window."""
    bidirectional: Literal["none", "prefix", "pictures"] = "none"
    """Tokens that see each other both ways: none; prefix: a sample's tokens before its first target, all of them where nothing is
    learned (PaliGemma), also beyond a sliding window; pictures: those of one picture (Gemma 3). With prefix, whatever a sample holds
    behind its first target is seen in order, further questions of a conversation too."""
    embedding_scale: PositiveFloat = 1.0
    """Token embeddings are multiplied by this, rounded to their format (Gemma: sqrt(hidden_size))."""
    tie_embeddings: bool = False
    """Output head shares the embedding's weight."""
    max_positions: PositiveInt = 4096

    @property
    def num_tokens(self) -> int:
        """Rows of the embedding: tokens that can be read."""
        return self.vocab_size + self.read_only_tokens

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """Leading elements of each head that are rotated."""
        return int(self.head_width * self.rotary_fraction)

    @model_validator(mode="after")
    def _check(self) -> LanguageConfig:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}")
        if self.positions == "rotary" and self.rotary_width % 2:
            raise ValueError(f"heads are {self.head_width} wide, and rotary positions need an even width: change head_dim or hidden_size")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} is not a multiple of num_query_groups={self.kv_heads}")
        if self.linear_bias and not self.qkv_bias:
            raise ValueError("linear_bias=true needs qkv_bias=true: layers have biases everywhere, or on query, key and value only")
        if self.position_offset and self.positions != "learned":
            raise ValueError(f"position_offset={self.position_offset} goes with positions=learned, not {self.positions}")
        if self.rope_scaling is not None and self.positions != "rotary":
            raise ValueError(f"rope_scaling goes with positions=rotary, not {self.positions}")
        for name in ("short_factor", "long_factor"):
            factors = self.rope_scaling.parameters.get(name) if self.rope_scaling is not None else None
            if isinstance(factors, list) and len(factors) != self.rotary_width // 2:
                raise ValueError(f"rope_scaling.parameters.{name} has {len(factors)} factors for {self.rotary_width // 2} rotation pairs")
        if self.sliding_layers and self.sliding_window_tokens is None:
            raise ValueError("sliding_layers needs sliding_window_tokens")
        for layer in self.sliding_layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"sliding_layers names layer {layer}, but layers go from 0 to {self.num_layers - 1}")
        for layer in self.moe.dense_layers if self.moe else ():
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"moe.dense_layers names layer {layer}, but layers go from 0 to {self.num_layers - 1}")
        for layer in self.cross_attention.layers if self.cross_attention else ():
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"cross_attention.layers names layer {layer}, but layers go from 0 to {self.num_layers - 1}")
        if self.cross_attention and (self.moe or self.sandwich_norm or self.zero_centered_norm or self.linear_bias or self.qkv_bias):
            raise ValueError("cross_attention needs moe=null; sandwich_norm, zero_centered_norm, linear_bias and qkv_bias false")
        if self.read_only_tokens and self.tie_embeddings:
            raise ValueError("read_only_tokens needs tie_embeddings=false: a tied head would predict these tokens")
        if self.moe and (self.linear_bias or self.sandwich_norm):
            raise ValueError("moe needs linear_bias=false and sandwich_norm=false: no model with experts has them")
        if self.mrope_sections is not None and 2 * sum(self.mrope_sections) != self.rotary_width:
            raise ValueError(f"mrope_sections={self.mrope_sections} must add up to half the {self.rotary_width} rotated elements of a head")
        return self
