"""Tiny vision encoders alone: the oracles of tests/families/test_encoders.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.hf.encoders.folder import encoder_folder
from megavlm.checkpoint.hf.folder import WeightFolder
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.checkpoint.hf.tensors import to_ours
from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, VisionConfig
from megavlm.models.vision import VisionEncoder
from megavlm.models.weights import assign
from megavlm.parallel.context import ParallelContext, enter_grid
from megavlm.testing.families.case import randomise

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}


@dataclass(frozen=True)
class EncoderCase:
    """One flavour of an encoder."""

    name: str
    hf_class: str
    config: Callable[[Any], Any]
    """transformers module -> config object."""
    features: Mapping[str, Any] = field(default_factory=dict)
    """Fields of model.vision: which features are taken."""
    grids: bool = True
    """The class takes pictures of any size (`interpolate_pos_encoding`, or always)."""


def make_encoder(case: EncoderCase, folder: Path) -> Any:
    """Write the case's encoder with large random weights to `folder`, and return it."""
    tf = quiet_transformers()
    tf.utils.logging.disable_progress_bar()
    torch.manual_seed(5)
    encoder = getattr(tf, case.hf_class)(case.config(tf)).eval()
    randomise(encoder, 0.2)
    encoder.save_pretrained(str(folder))
    return encoder


def vision_config(case: EncoderCase, folder: Path) -> VisionConfig:
    """The model.vision block of a case's folder."""
    return VisionConfig(**(encoder_folder(folder).fields | dict(case.features)))


def loaded_encoder(case: EncoderCase, folder: Path, layout: dict[str, Any]) -> tuple[VisionEncoder, ParallelContext]:
    """Our encoder with the folder's weights, on this rank of a layout."""
    parallel = ParallelConfig(**layout)
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    source = encoder_folder(folder)
    encoder = VisionEncoder(vision_config(case, folder), PrecisionConfig(dtype="fp32"), parallel, ctx.device)
    table = {link.key: link for link in source.links}
    with WeightFolder(folder, source.disk_name) as weights:
        assert {name for link in source.links for name in link.names} == set(weights.names)
        assign([encoder], lambda key, shape, where: to_ours(table[key], weights.rows, where), ctx)
    return encoder, ctx


def hf_features(case: EncoderCase, hf: Any, model: ModelConfig, pixels: torch.Tensor) -> torch.Tensor:
    """What the Hugging Face encoder says of one normalised picture (1, C, H, W), by the fields of model.vision."""
    vision = model.vision
    if case.hf_class == "Siglip2VisionModel":
        size = vision.patch_size_px
        patches = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 4, 5, 1)
        rows, columns = patches.shape[1:3]
        inputs = {
            "pixel_values": patches.flatten(3).flatten(1, 2),
            "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[rows, columns]]),
        }
    else:
        inputs = {"pixel_values": pixels}
        if case.hf_class in ("CLIPVisionModel", "SiglipVisionModel"):
            inputs["interpolate_pos_encoding"] = True  # type: ignore[assignment]
    out = hf(**inputs, output_hidden_states=True)
    if vision.pooled:
        pooled: torch.Tensor = out.pooler_output
        return pooled
    states = [out.last_hidden_state] if vision.final_norm else [out.hidden_states[layer] for layer in vision.feature_layers]
    x = torch.cat(states, dim=-1)[0]
    extra = int(vision.class_token) + vision.num_register_tokens
    kept = x[: int(vision.class_token and vision.keep_class_token)]
    return torch.cat([kept, x[extra:]])


def _clip(**changes: Any) -> Callable[[Any], Any]:
    return lambda tf: tf.CLIPVisionConfig(**(SMALL | {"intermediate_size": 64} | changes))


def _siglip(**changes: Any) -> Callable[[Any], Any]:
    return lambda tf: tf.SiglipVisionConfig(**(SMALL | {"intermediate_size": 64} | changes))


def _dinov2(cls: str = "Dinov2Config", **changes: Any) -> Callable[[Any], Any]:
    return lambda tf: getattr(tf, cls)(**(SMALL | {"mlp_ratio": 2} | changes))


def _internvit(**changes: Any) -> Callable[[Any], Any]:
    return lambda tf: tf.InternVLVisionConfig(**(SMALL | {"intermediate_size": 64} | changes))


def _naflex(tf: Any) -> Any:
    small = {name: value for name, value in SMALL.items() if name != "image_size"}
    return tf.Siglip2VisionConfig(**small, intermediate_size=64, num_patches=16)


def _idefics3(tf: Any) -> Any:
    return tf.Idefics3VisionConfig(**(SMALL | {"intermediate_size": 64, "image_size": 20}))


def _pixtral(tf: Any) -> Any:
    return tf.PixtralVisionConfig(**(SMALL | {"intermediate_size": 64}))


_LAST = {"feature_layer": -1, "final_norm": True}
_SIX_B = {"norm_type": "rms_norm", "use_qk_norm": True}

ENCODER_CASES = [
    EncoderCase("CLIP", "CLIPVisionModel", _clip()),
    EncoderCase(
        "CLIP, three layers and the class token", "CLIPVisionModel", _clip(), {"feature_layer": [1, -1, 0], "keep_class_token": True}
    ),
    EncoderCase("SigLIP", "SiglipVisionModel", _siglip(), _LAST),
    EncoderCase("SigLIP, pixels beside whole patches", "SiglipVisionModel", _siglip(image_size=18), {"feature_layer": -1}),
    EncoderCase("SigLIP, pooled", "SiglipVisionModel", _siglip(), _LAST | {"pooled": True}),
    EncoderCase("SigLIP2 NaFlex", "Siglip2VisionModel", _naflex, _LAST),
    EncoderCase("SigLIP2 NaFlex, pooled", "Siglip2VisionModel", _naflex, _LAST | {"pooled": True}),
    EncoderCase("DINOv2", "Dinov2Model", _dinov2(), _LAST),
    EncoderCase("DINOv2, SwiGLU", "Dinov2Model", _dinov2(use_swiglu_ffn=True, qkv_bias=False, use_mask_token=False), {"feature_layer": -2}),
    EncoderCase(
        "DINOv2 with registers", "Dinov2WithRegistersModel", _dinov2("Dinov2WithRegistersConfig"), _LAST | {"keep_class_token": True}
    ),
    EncoderCase("InternViT 300M", "InternVLVisionModel", _internvit(attention_bias=True), {"feature_layer": -1}, grids=True),
    EncoderCase("InternViT 300M, final norm", "InternVLVisionModel", _internvit(use_mean_pooling=False, use_mask_token=True), _LAST),
    EncoderCase("InternViT 6B", "InternVLVisionModel", _internvit(**_SIX_B), {"feature_layer": -1}),
    EncoderCase("InternViT 6B, two layers", "InternVLVisionModel", _internvit(**_SIX_B), {"feature_layer": [-2, -1]}),
    EncoderCase("Idefics3", "Idefics3VisionTransformer", _idefics3, _LAST),
    EncoderCase("Pixtral", "PixtralVisionModel", _pixtral, {"feature_layer": [-1, 1]}),
]
