"""The recipe's `model.vision` block."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megavlm.config.blocks import Block, PositiveFloat, PositiveInt

ROTARY_POSITIONS = ("rotary", "learned_rotary")


class CanvasConfig(Block):
    """A picture is cut into tiles that see each other, with learned vectors for where a tile lies, and more layers behind the final norm
    (Llama 3.2 Vision; transformers 5.23, models/mllama). Features are the last of these layers' output, then, channel by channel, the
    hidden states that `feature_layer` names."""

    max_tiles: PositiveInt = 4
    """Every picture is filled up to so many tiles: the model was trained to see the empty ones too."""
    num_global_layers: PositiveInt = 8
    """Layers behind the final norm; what each adds passes a gate tanh(g)."""

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of tiles that a picture may have, in the order in which the tables of tile positions know them."""
        sides = range(1, self.max_tiles + 1)
        return [(rows, columns) for rows in sides for columns in sides if rows * columns <= self.max_tiles]


class VisionConfig(Block):
    """A pre-norm vision transformer: CLIP, SigLIP, DINOv2, InternViT, Pixtral, Qwen-VL and what is built alike."""

    image_size_px: PositiveInt = 336
    """Side of the square tile that the encoder sees; with positions=learned also the size of the position table. What is left beside
    whole patches goes unseen, as by a convolution (SigLIP so400m: 384 with patches of 14)."""
    patch_size_px: PositiveInt = 14
    temporal_patch_size: PositiveInt = 1
    """Frames that one patch spans; a picture is seen as that many equal frames (Qwen-VL: 2)."""
    num_channels: PositiveInt = 3
    num_layers: PositiveInt = 24
    """Transformer layers that the weights have (including any above `feature_layer`)."""
    hidden_size: PositiveInt = 1024
    num_attention_heads: PositiveInt = 16
    ffn_hidden_size: PositiveInt = 4096
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "quick_gelu"
    gated_mlp: bool = False
    """activation(gate) x up instead of activation(up) (SwiGLU with silu: Pixtral, Qwen2.5-VL, DINOv2 giant)."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: PositiveFloat = 1e-5
    qkv_bias: bool = True
    linear_bias: bool = True
    """Biases of the attention's output and of the MLP."""
    attention_output_bias: bool = True
    """False: the attention's output has none although `linear_bias` is set (Mllama)."""
    qk_norm: bool = False
    """RMSNorm over the whole width of query and key, all heads together (InternViT 6B)."""
    layer_scale: bool = False
    """A learned factor for each channel of what a layer adds to the residual (DINOv2, InternViT)."""
    positions: Literal["learned", "bucketed", "factorised", "rotary", "learned_rotary"] = "learned"
    """learned: one vector a patch, interpolated to other grids; bucketed: by where the patch lies in the picture, as a fraction
    (Idefics2); factorised: one vector a row plus one a column, up to image_size_px (NaViT); rotary: two-dimensional rotary embeddings
    (Pixtral, Qwen-VL); learned_rotary: both (Qwen3-VL)."""
    position_interpolation: Literal["bicubic", "bicubic_antialiased", "bilinear_antialiased", "bilinear_corners"] = "bicubic"
    """How learned positions reach another grid. bicubic: CLIP, SigLIP, DINOv2; bicubic_antialiased: DINOv2 with registers;
    bilinear_antialiased: SigLIP2 NaFlex; bilinear_corners: the outermost points of both grids coincide (Qwen3-VL)."""
    rope_theta: PositiveFloat = 10000.0
    """Base of two-dimensional rotary positions."""
    rotary_layout: Literal["shared", "alternating"] = "shared"
    """Two-dimensional rotary positions. shared: rows and columns turn at the same frequencies (Qwen-VL); alternating: they take every
    other one of a single series (Pixtral)."""
    class_token: bool = True
    """CLIP has one, SigLIP has none."""
    num_register_tokens: int = Field(default=0, ge=0)
    """Learned tokens between class token and patches (DINOv2 with registers); never features."""
    mask_token: bool = False
    """The weights hold the token of masked pretraining (DINOv2); kept for a lossless export, frozen."""
    pre_norm: bool = True
    """A norm between embeddings and the first layer (CLIP)."""
    patch_channels_last: bool = False
    """The patch embedding takes a patch's values pixel by pixel, not channel by channel (SigLIP2 NaFlex)."""
    patch_bias: bool = False
    """Bias of the patch embedding (SigLIP)."""
    attention_window_px: PositiveInt | None = None
    """Side of the square windows that attention stays in, except in `full_attention_layers` (Qwen2.5-VL); None: the whole picture."""
    full_attention_layers: list[int] = Field(default_factory=list)
    """Layers, counted from 0, that see the whole picture although `attention_window_px` is set."""
    deepstack_layers: list[int] = Field(default_factory=list)
    """Layers, counted from 0 and ascending, whose output goes past the projector: each through a merger of its own into the hidden states
    of visual tokens, the first after the LLM's first layer and so on (DeepStack, https://arxiv.org/abs/2406.04334; Qwen3-VL)."""
    feature_layer: int | list[int] = -2
    """Which hidden state feeds the projector, counted as Hugging Face does: -1 is the last layer's output, -2 the one before.
    Several are joined by channel, in the order given."""
    final_norm: bool = False
    """Apply the encoder's final norm to the features. LLaVA takes raw hidden states: False."""
    has_final_norm: bool = True
    """The encoder's weights have a final norm, whether or not features pass it (Pixtral and Qwen2-VL have none)."""
    keep_class_token: bool = False
    """Feed the class token to the LLM as well (Hugging Face's vision_feature_select_strategy="full")."""
    pooling_head: bool = False
    """The weights hold an attention-pooling head (SigLIP); kept for a lossless export."""
    pooled: bool = False
    """One feature a tile, from the pooling head, instead of one a patch."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    canvas: CanvasConfig | None = None
    """A picture's tiles see each other (Mllama); None: every tile is a picture of its own."""

    @property
    def grid_side(self) -> int:
        """Patches on a side of one tile."""
        return self.image_size_px // self.patch_size_px

    @property
    def num_patches(self) -> int:
        """Patches of one tile."""
        return self.grid_side**2

    @property
    def window_patches(self) -> int | None:
        """Patches of one window of attention; None: there are no windows."""
        return None if self.attention_window_px is None else (self.attention_window_px // self.patch_size_px) ** 2

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Hidden states that feed the projector, as numbers of layers executed (0: the embeddings)."""
        wanted = self.feature_layer if isinstance(self.feature_layer, list) else [self.feature_layer]
        return tuple(layer + 1 + self.num_layers if layer < 0 else layer for layer in wanted)

    @property
    def num_used_layers(self) -> int:
        """Layers that the forward pass executes."""
        return self.num_layers if self.canvas is not None else max(self.feature_layers)

    @property
    def num_run_layers(self) -> int:
        """Layers that the forward pass executes, those behind a canvas's norm too."""
        return self.num_used_layers + (0 if self.canvas is None else self.canvas.num_global_layers)

    @property
    def num_features(self) -> int:
        """Feature vectors that one tile hands to the projector."""
        if self.pooled:
            return 1
        return self.num_patches + (1 if self.class_token and self.keep_class_token else 0)

    @property
    def feature_size(self) -> int:
        """Width of a feature vector."""
        return self.hidden_size * (len(self.feature_layers) + int(self.canvas is not None))

    @property
    def canvas_tiles(self) -> int | None:
        """Tiles that every picture is filled up to; None: none is."""
        return None if self.canvas is None else self.canvas.max_tiles

    @property
    def num_position_rows(self) -> int:
        """Vectors in the table of learned positions of patches; 0: there is none."""
        return {"factorised": 2 * self.grid_side, "rotary": 0}.get(self.positions, self.num_patches)

    def _check_plane(self) -> None:
        """What is arranged by rows and columns of patches has no place for other tokens; layers that are named must run."""
        plane = {
            f"positions={self.positions}": self.positions in ROTARY_POSITIONS,
            "attention_window_px": self.attention_window_px is not None,
            "deepstack_layers": bool(self.deepstack_layers),
        }
        for name, is_set in plane.items():
            if is_set and (self.class_token or self.num_register_tokens):
                raise ValueError(f"{name} is about patches in a plane: set class_token=false and num_register_tokens=0")
        for name, layers in (("full_attention_layers", self.full_attention_layers), ("deepstack_layers", self.deepstack_layers)):
            if any(not 0 <= layer < self.num_layers for layer in layers) or sorted(set(layers)) != layers:
                raise ValueError(f"{name}={layers} must be ascending numbers of layers, from 0 to {self.num_layers - 1}")
        if self.deepstack_layers and self.deepstack_layers[-1] >= self.num_used_layers:
            raise ValueError(
                f"deepstack_layers={self.deepstack_layers} names a layer above feature_layer={self.feature_layer}, which does not run"
            )

    @model_validator(mode="after")
    def _check(self) -> VisionConfig:
        if self.image_size_px < self.patch_size_px:
            raise ValueError(f"image_size_px={self.image_size_px} holds no patch of patch_size_px={self.patch_size_px}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}")
        if self.feature_layer == []:
            raise ValueError("feature_layer=[] names no layer")
        for layer in self.feature_layers:
            if not 0 <= layer <= self.num_layers:
                raise ValueError(f"feature_layer={self.feature_layer} does not name the output of one of {self.num_layers} layers")
        if self.num_used_layers < 1:
            raise ValueError(f"feature_layer={self.feature_layer} uses none of the {self.num_layers} layers")
        if self.final_norm and (self.feature_layers != (self.num_layers,) or not self.has_final_norm):
            raise ValueError("final_norm needs feature_layer=-1 and has_final_norm: the final norm belongs to the last layer's output")
        if self.pooled and not (self.pooling_head and self.final_norm):
            raise ValueError("pooled needs pooling_head=true, final_norm=true and feature_layer=-1: the head reads normed features")
        if self.positions in ROTARY_POSITIONS and (self.hidden_size // self.num_attention_heads) % 4:
            raise ValueError(f"positions={self.positions} turns rows and columns apart: heads must be a multiple of 4 wide")
        if self.attention_window_px is None and self.full_attention_layers:
            raise ValueError("full_attention_layers needs attention_window_px: without windows every layer sees the whole picture")
        if self.attention_window_px is not None and self.attention_window_px % self.patch_size_px:
            raise ValueError(f"attention_window_px={self.attention_window_px} is not a multiple of patch_size_px={self.patch_size_px}")
        self._check_plane()
        self._check_canvas()
        return self

    def _check_canvas(self) -> None:
        """The one shape of encoder that has a canvas."""
        if self.canvas is None:
            return
        wanted: dict[str, object] = dict.fromkeys(("class_token", "keep_class_token", "pre_norm", "has_final_norm"), True)
        wanted |= dict.fromkeys(("final_norm", "qk_norm", "pooling_head", "layer_scale"), False)
        wanted |= {"positions": "learned", "num_register_tokens": 0, "deepstack_layers": []}
        wrong = [f"{name}={value}" for name, value in wanted.items() if getattr(self, name) != value]
        if wrong:
            raise ValueError(f"canvas needs {', '.join(wrong)}")
