"""Tiny random Hugging Face models: the oracle of the import and export tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Kind:
    """One flavour of LLaVA."""

    vision: str = "clip"
    text: str = "llama"
    tie: bool = False
    layer: int = -2
    select: str = "default"
    dtype: str = "float32"
    use_head: bool = True

    @property
    def name(self) -> str:
        return "-".join(str(v) for v in (self.vision, self.text, "tied" if self.tie else "untied", self.layer, self.select, self.dtype))


def make_hf(kind: Kind, folder: Path, **save: Any) -> Any:
    """Write a model with large random weights (so that position bugs show) to `folder`, and return it."""
    from megavlm.checkpoint.hf.config import quiet_transformers

    tf = quiet_transformers()
    tf.utils.logging.disable_progress_bar()
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    vision = tf.CLIPVisionConfig(**small) if kind.vision == "clip" else tf.SiglipVisionConfig(**small, vision_use_head=kind.use_head)
    text_class = {"llama": tf.LlamaConfig, "qwen2": tf.Qwen2Config, "qwen3": tf.Qwen3Config}[kind.text]
    text = text_class(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=101,
        max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, tie_word_embeddings=kind.tie,
        **({"head_dim": 16} if kind.text == "qwen3" else {}),
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=kind.layer,
        vision_feature_select_strategy=kind.select, tie_word_embeddings=kind.tie,
    )  # fmt: skip
    torch.manual_seed(11)
    model = tf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.25
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    model = model.to(getattr(torch, kind.dtype))
    model.save_pretrained(str(folder), **save)
    return model


def hf_logits(hf: Any, batch: Any, vision: Any) -> torch.Tensor:
    """Logits (useful tokens, vocabulary) of a pack, each of its samples run alone through the Hugging Face model."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (vision.image_mean, vision.image_std))
    out, start, tile = [], 0, 0
    for length, sample in zip(batch.segment_lengths, batch.segment_samples, strict=True):
        if sample is None:
            continue
        ids = batch.tokens_S[start : start + length]
        tiles = int((ids == 3).sum()) // hf_tokens_per_tile(hf)
        pixels = None
        if tiles:
            pixels = ((batch.tiles_TCHW[tile : tile + tiles].float() / 255 - mean) / std).to(hf.dtype)
        with torch.no_grad():
            out.append(hf(input_ids=ids[None], pixel_values=pixels).logits[0].float())
        start, tile = start + length, tile + tiles
    return torch.cat(out)


def hf_tokens_per_tile(hf: Any) -> int:
    config = hf.config
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    has_class = config.vision_config.model_type == "clip_vision_model"
    return patches + (has_class and config.vision_feature_select_strategy == "full")
