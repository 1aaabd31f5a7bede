"""Hugging Face `config.json` <-> ModelConfig, refusing by name what the model here would compute differently.

Source: transformers 5.23, models/llava, clip, siglip, llama, qwen2, qwen3.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.config.schema import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_VISION_TYPES = ("clip_vision_model", "siglip_vision_model")
_TEXT_TYPES = ("llama", "qwen2", "qwen3")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_HALF = (0.5, 0.5, 0.5)


def config_from_hf(folder: str | Path) -> ModelConfig:
    """The model block of a recipe for this folder; pixel mean and std come from its processor when it has one.

    Raises:
        HuggingFaceError: no LLaVA folder, or a setting that the model here does not have, named with its value.
    """
    config = _read(Path(folder))
    vision_hf, text_hf = config.vision_config, config.text_config
    _check_supported(config, folder)
    mean, std = _pixel_statistics(Path(folder), is_siglip=vision_hf.model_type == "siglip_vision_model")
    is_clip = vision_hf.model_type == "clip_vision_model"
    try:
        return ModelConfig(
            vision=VisionConfig(
                image_size_px=vision_hf.image_size,
                patch_size_px=vision_hf.patch_size,
                num_channels=vision_hf.num_channels,
                num_layers=vision_hf.num_hidden_layers,
                hidden_size=vision_hf.hidden_size,
                num_attention_heads=vision_hf.num_attention_heads,
                ffn_hidden_size=vision_hf.intermediate_size,
                activation=_ACTIVATIONS[vision_hf.hidden_act],
                norm_eps=vision_hf.layer_norm_eps,
                class_token=is_clip,
                pre_norm=is_clip,
                patch_bias=not is_clip,
                feature_layer=config.vision_feature_layer,
                keep_class_token=is_clip and config.vision_feature_select_strategy == "full",
                pooling_head=not is_clip and getattr(vision_hf, "vision_use_head", True),
                image_mean=mean,
                image_std=std,
            ),
            projector=ProjectorConfig(num_layers=2, bias=config.multimodal_projector_bias),
            language=_language_from_hf(text_hf, tie=bool(config.tie_word_embeddings or text_hf.tie_word_embeddings)),
        )
    except ValueError as error:
        raise HuggingFaceError(f"{folder}/config.json: {error}") from error


def _language_from_hf(text: Any, *, tie: bool) -> LanguageConfig:
    head_dim = getattr(text, "head_dim", None)
    if head_dim is not None and head_dim * text.num_attention_heads == text.hidden_size:
        head_dim = None
    return LanguageConfig(
        vocab_size=text.vocab_size,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        head_dim=head_dim,
        ffn_hidden_size=text.intermediate_size,
        norm_eps=text.rms_norm_eps,
        rope_theta=float(text.rope_parameters["rope_theta"]),
        qkv_bias=text.model_type == "qwen2",
        qk_norm=text.model_type == "qwen3",
        tie_embeddings=tie,
        max_positions=text.max_position_embeddings,
    )


def config_to_hf(
    model: ModelConfig,
    *,
    image_token_id: int,
    dtype: str = "float32",
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """`config.json` of `LlavaForConditionalGeneration`. `dtype` is torch's name of the weights' format.

    Raises:
        HuggingFaceError: the model has a part that LLaVA's Hugging Face class lacks.
    """
    _check_expressible(model)
    if not 0 <= image_token_id < model.language.vocab_size:
        raise HuggingFaceError(f"the image token's id {image_token_id} lies outside model.language.vocab_size={model.language.vocab_size}")
    text = _text_to_hf(model.language) | {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "image_seq_length": model.visual_tokens_per_tile,
        "image_token_index": image_token_id,
        "multimodal_projector_bias": model.projector.bias,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": model.vision.feature_layer,
        # Hugging Face's "default" drops the first feature whatever it is; an encoder without class token needs "full".
        "vision_feature_select_strategy": select_strategy(model.vision),
        "tie_word_embeddings": model.language.tie_embeddings,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "text_config": text,
        "vision_config": _vision_to_hf(model.vision),
    }


def select_strategy(vision: VisionConfig) -> str:
    """Hugging Face's vision_feature_select_strategy."""
    return "default" if vision.class_token and not vision.keep_class_token else "full"


def _vision_to_hf(vision: VisionConfig) -> dict[str, Any]:
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    block = {
        "model_type": "clip_vision_model" if vision.class_token else "siglip_vision_model",
        "image_size": vision.image_size_px,
        "patch_size": vision.patch_size_px,
        "num_channels": vision.num_channels,
        "num_hidden_layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "num_attention_heads": vision.num_attention_heads,
        "intermediate_size": vision.ffn_hidden_size,
        "hidden_act": activations[vision.activation],
        "layer_norm_eps": vision.norm_eps,
        "attention_dropout": 0.0,
    }
    return block if vision.class_token else block | {"vision_use_head": vision.pooling_head}


def _text_to_hf(language: LanguageConfig) -> dict[str, Any]:
    block: dict[str, Any] = {
        "model_type": "qwen2" if language.qkv_bias else "qwen3" if language.qk_norm else "llama",
        "vocab_size": language.vocab_size,
        "num_hidden_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.kv_heads,
        "intermediate_size": language.ffn_hidden_size,
        "hidden_act": "silu",
        "rms_norm_eps": language.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
        "max_position_embeddings": language.max_positions,
        "attention_dropout": 0.0,
        "tie_word_embeddings": language.tie_embeddings,
        "use_cache": True,
    }
    if block["model_type"] == "llama":
        block |= {"attention_bias": False, "mlp_bias": False}
    if block["model_type"] == "qwen3":
        block |= {"attention_bias": False}
    # Qwen2's class has no head_dim of its own; `_check_expressible` refuses where it would matter.
    return block if block["model_type"] == "qwen2" else block | {"head_dim": language.head_width}


def _read(folder: Path) -> Any:
    file = folder / "config.json"
    if not file.is_file():
        raise HuggingFaceError(f"{folder} has no config.json: give a folder written by save_pretrained of LlavaForConditionalGeneration")
    try:
        kind = json.loads(file.read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HuggingFaceError(f"{file} is not JSON: {error}") from error
    if kind != "llava":
        raise HuggingFaceError(f"{file}: model_type is {kind!r}; only 'llava' can be imported")
    return quiet_transformers().LlavaConfig.from_pretrained(str(folder), local_files_only=True)


def quiet_transformers() -> Any:
    """transformers, without the notices of its import (one per image processor when torchvision is absent)."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import transformers
    finally:
        logger.setLevel(level)
    return transformers


def _check_supported(config: Any, folder: str | Path) -> None:
    """Every setting that changes the computation must be one the model here computes."""
    vision, text = config.vision_config, config.text_config
    rope = getattr(text, "rope_parameters", None) or {}
    vision_act, text_act = getattr(vision, "hidden_act", None), getattr(text, "hidden_act", None)
    partial = rope.get("partial_rotary_factor", 1.0)
    drops_patch = vision.model_type == "siglip_vision_model" and config.vision_feature_select_strategy == "default"
    wrong = [
        (vision.model_type not in _VISION_TYPES, "vision_config.model_type", vision.model_type, " or ".join(_VISION_TYPES)),
        (text.model_type not in _TEXT_TYPES, "text_config.model_type", text.model_type, ", ".join(_TEXT_TYPES)),
        (not isinstance(config.vision_feature_layer, int), "vision_feature_layer", config.vision_feature_layer, "one layer"),
        (config.projector_hidden_act != "gelu", "projector_hidden_act", config.projector_hidden_act, "gelu"),
        (vision_act not in _ACTIVATIONS, "vision_config.hidden_act", vision_act, ", ".join(_ACTIVATIONS)),
        (text_act != "silu", "text_config.hidden_act", text_act, "silu"),
        (rope.get("rope_type", "default") != "default", "text_config.rope_parameters.rope_type", rope.get("rope_type"), "default"),
        (partial != 1.0, "text_config.rope_parameters.partial_rotary_factor", partial, "1.0"),
        (bool(getattr(text, "attention_bias", False)), "text_config.attention_bias", True, "false"),
        (bool(getattr(text, "mlp_bias", False)), "text_config.mlp_bias", True, "false"),
        (bool(getattr(text, "use_sliding_window", False)), "text_config.use_sliding_window", True, "false"),
        (drops_patch, "vision_feature_select_strategy", "default with a SigLIP encoder, which drops its first patch", "full"),
    ]
    problems = [f"{field} is {value!r}, supported: {allowed}" for is_wrong, field, value, allowed in wrong if is_wrong]
    if problems:
        raise HuggingFaceError(f"{folder}/config.json cannot be imported: " + "; ".join(problems))


def _check_expressible(model: ModelConfig) -> None:
    vision, projector, language = model.vision, model.projector, model.language
    style = (vision.class_token, vision.pre_norm, vision.patch_bias, vision.pooling_head)
    styles = ((True, True, False, False), (False, False, True, True), (False, False, True, False))
    width = language.hidden_size
    wrong = [
        (projector.num_layers != 2, f"model.projector.num_layers={projector.num_layers}", "2"),
        (projector.pixel_shuffle != 1, f"model.projector.pixel_shuffle={projector.pixel_shuffle}", "1"),
        (projector.input_norm, "model.projector.input_norm=true", "false"),
        (projector.image_newline, "model.projector.image_newline=true", "false"),
        (projector.hidden_size not in (None, width), f"model.projector.hidden_size={projector.hidden_size}", f"{width}, as the LLM"),
        (vision.final_norm, "model.vision.final_norm=true", "false"),
        (
            style not in styles,
            "model.vision with (class_token, pre_norm, patch_bias, pooling_head) = " + str(style).lower(),
            "CLIP: true, true, false, false; SigLIP: false, false, true and either",
        ),
        (language.qkv_bias and language.qk_norm, "model.language with qkv_bias and qk_norm", "one of the two"),
        (
            language.qkv_bias and language.head_width * language.num_attention_heads != width,
            f"model.language.head_dim={language.head_dim} with qkv_bias",
            "hidden_size / num_attention_heads",
        ),
    ]
    problems = [f"{what} (it has: {allowed})" for is_wrong, what, allowed in wrong if is_wrong]
    if problems:
        raise HuggingFaceError("Hugging Face's LlavaForConditionalGeneration cannot hold " + "; ".join(problems))


def _pixel_statistics(folder: Path, *, is_siglip: bool) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of the folder's image processor; the encoder's usual ones when there is none."""
    for name in _PROCESSOR_FILES:
        if not (folder / name).is_file():
            continue
        block = json.loads((folder / name).read_text())
        block = block.get("image_processor", block)
        if "image_mean" not in block or "image_std" not in block:
            continue
        if (
            not block.get("do_normalize", True)
            or not block.get("do_rescale", True)
            or abs(block.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6
        ):
            raise HuggingFaceError(
                f"{folder / name}: pixels must be rescaled by 1/255 and normalised (do_rescale, rescale_factor, do_normalize)"
            )
        return tuple(map(float, block["image_mean"])), tuple(map(float, block["image_std"]))  # type: ignore[return-value]
    return (_HALF, _HALF) if is_siglip else (VisionConfig().image_mean, VisionConfig().image_std)
