"""Everything of a Hugging Face folder that is not weights: tokenizer, chat template, processor, generation config.

`AutoProcessor` then turns a picture into one tile of our size and "<image>" into as many placeholders as the model makes
features. Source: transformers 5.23, models/llava/processing_llava.py (`replace_image_token`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.config import select_strategy
from megavlm.config.schema import ModelConfig
from megavlm.data.chat import Chat
from megavlm.data.tokenizer import IMAGE_TOKEN

_BICUBIC = 3
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
_TOKENS = "token_ids.json"


def token_ids(chat: Chat | None, texts: Path | None, model: ModelConfig) -> dict[str, Any]:
    """Arguments of `config_to_hf` that come from the tokenizer (or were kept at import).

    Raises:
        HuggingFaceError: the tokenizer has more tokens than the model has embeddings.
    """
    if chat is None:
        assert texts is not None
        kept: dict[str, Any] = json.loads((texts / _TOKENS).read_text(encoding="utf-8"))
        return kept
    tokenizer = chat.tokenizer
    if tokenizer.vocab_size > model.language.vocab_size:
        raise HuggingFaceError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.language.vocab_size is {model.language.vocab_size}: "
            "it is not the tokenizer that this model was trained with"
        )
    return {
        "image_token_id": tokenizer.image_token_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def write_texts(folder: Path, model: ModelConfig, chat: Chat) -> None:
    """Tokenizer, chat template, processor and generation config of a model trained here."""
    chat.tokenizer.save_hf(folder, chat.jinja())
    _write(folder / "processor_config.json", processor_config(model))
    generation: dict[str, Any] = {"eos_token_id": chat.stop_ids, "pad_token_id": chat.tokenizer.pad_id, "do_sample": False}
    if chat.tokenizer.bos_id is not None:
        generation["bos_token_id"] = chat.tokenizer.bos_id
    _write(folder / "generation_config.json", generation)


def processor_config(model: ModelConfig) -> dict[str, Any]:
    """`processor_config.json` of a LlavaProcessor that makes one square tile of each picture, as data.image.max_tiles=1 does."""
    vision = model.vision
    side = {"height": vision.image_size_px, "width": vision.image_size_px}
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": vision.patch_size_px,
        "vision_feature_select_strategy": select_strategy(vision),
        # LlavaProcessor counts patches + this, and one less for "default".
        "num_additional_image_tokens": int(vision.class_token),
        "image_processor": {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": side,
            "resample": _BICUBIC,
            "do_center_crop": False,
            "crop_size": side,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(vision.image_mean),
            "image_std": list(vision.image_std),
        },
    }


def keep_texts(source: Path, kept: Path) -> None:
    """Keep an imported folder's tokenizer, processor and token ids beside its checkpoint, for a lossless export."""
    from megavlm.checkpoint.hf.config import quiet_transformers

    config = quiet_transformers().LlavaConfig.from_pretrained(str(source), local_files_only=True)
    kept.mkdir(parents=True, exist_ok=True)
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fallback = {name: getattr(config.text_config, name, None) for name in ids}
    _write(kept / _TOKENS, {"image_token_id": config.image_token_index} | {n: v if v is not None else fallback[n] for n, v in ids.items()})
    copy_texts(source, kept)


def copy_texts(source: Path, folder: Path) -> None:
    """Copy the files that are there; a folder without tokenizer stays one."""
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
