"""Everything of a Hugging Face folder that is not weights: tokenizer, chat template, processor, generation config.

`AutoProcessor` then turns a picture into one tile of our size and "<image>" into as many placeholders as the model makes
features. Source: transformers 5.23, models/llava/processing_llava.py (`replace_image_token`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.config import select_strategy
from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.chat import Chat
from megavlm.data.sample import IMAGE_TOKEN

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
        HuggingFaceError: the tokenizer has more tokens than the model has embeddings, or another image token than "<image>".
    """
    if chat is None:
        assert texts is not None
        kept: dict[str, Any] = json.loads((texts / _TOKENS).read_text(encoding="utf-8"))
        return kept
    tokenizer = chat.tokenizer
    if tokenizer.image_token != IMAGE_TOKEN:
        raise HuggingFaceError(
            f"data.image_token={tokenizer.image_token!r}: LlavaForConditionalGeneration is written with {IMAGE_TOKEN!r} only, "
            "because its processor looks for one text both in the messages and in the tokenizer"
        )
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


def write_texts(folder: Path, model: ModelConfig, chat: Chat, image: ImageConfig) -> None:
    """Tokenizer, chat template, processor and generation config of a model trained here."""
    chat.tokenizer.save_hf(folder, chat.jinja())
    _write(folder / "processor_config.json", processor_config(model, image))
    generation: dict[str, Any] = {"eos_token_id": chat.stop_ids, "pad_token_id": chat.tokenizer.pad_id, "do_sample": False}
    if chat.tokenizer.bos_id is not None:
        generation["bos_token_id"] = chat.tokenizer.bos_id
    _write(folder / "generation_config.json", generation)


def check_pictures(image: ImageConfig) -> None:
    """Can LLaVA's processor make of a picture what training made of it?

    Raises:
        HuggingFaceError: a policy of data.image that makes more than one square tile, or none.
    """
    if image.policy == "fixed" or (image.policy == "tiles" and image.max_tiles == 1):
        return
    raise HuggingFaceError(
        f"the model was trained with data.image.policy={image.policy}"
        + (f", max_tiles={image.max_tiles}" if image.policy == "tiles" else "")
        + ", but Hugging Face's LlavaForConditionalGeneration and its processor know one square tile a picture (policy=fixed): "
        "the exported model would see other pictures than it learned from"
    )


def processor_config(model: ModelConfig, image: ImageConfig) -> dict[str, Any]:
    """`processor_config.json` of a LlavaProcessor that makes one square tile of each picture, as data.image.fit says."""
    vision = model.vision
    side = {"height": vision.image_size_px, "width": vision.image_size_px}
    crops, pads = image.fit == "crop", image.fit == "pad"
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": vision.patch_size_px,
        "vision_feature_select_strategy": select_strategy(vision),
        # LlavaProcessor counts patches + this, and one less for "default".
        "num_additional_image_tokens": int(vision.class_token),
        "image_processor": {
            "image_processor_type": "LlavaImageProcessor" if pads else "CLIPImageProcessor",
            "do_convert_rgb": True,
            **({"do_pad": True} if pads else {}),
            "do_resize": True,
            "size": {"shortest_edge": vision.image_size_px} if crops else side,
            "resample": _BICUBIC,
            "do_center_crop": crops,
            "crop_size": side,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(vision.image_mean),
            "image_std": list(vision.image_std),
        },
    }


def image_config_from_hf(folder: str | Path) -> ImageConfig:
    """What the folder's image processor does to a picture, as a data.image block; stretched where it has none.

    Raises:
        HuggingFaceError: a size that is neither a square nor a shortest edge cut to one.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (Path(folder) / name).is_file():
            block = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
            block = block.get("image_processor", block)
            if "size" in block:
                return ImageConfig(fit=_fit(block, Path(folder) / name))
    return ImageConfig()


def _fit(block: dict[str, Any], file: Path) -> Literal["stretch", "crop", "pad"]:
    size = block["size"] if isinstance(block["size"], dict) else {"shortest_edge": block["size"]}
    crops = block.get("do_center_crop", False)
    crop_size = block.get("crop_size", size)
    sides = set(crop_size.values()) if isinstance(crop_size, dict) else {crop_size}
    is_square = {"height", "width"} <= size.keys() and size["height"] == size["width"]
    if block.get("do_pad", False) and is_square:
        return "pad"
    if is_square and (not crops or sides == {size["height"]}):
        return "stretch"
    if crops and sides == {size.get("shortest_edge")}:
        return "crop"
    raise HuggingFaceError(f"{file}: size {size}, do_center_crop={crops}, crop_size {crop_size}: none of data.image.fit=stretch, crop, pad")


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
