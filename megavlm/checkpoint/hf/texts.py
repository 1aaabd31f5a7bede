"""What a Hugging Face folder holds besides weights: tokenizer, chat template, processor, generation config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.families.base import TokenIds
from megavlm.checkpoint.hf.reading import CONFIG, hf_config, read_json
from megavlm.checkpoint.hf.registry import family, family_of_folder
from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.chat import Chat

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
_TOKENS = "token_ids.json"


def token_ids(chat: Chat | None, texts: Path | None, model: ModelConfig) -> TokenIds:
    """Ids that the config names: from the tokenizer, or as they were kept at import.

    Raises:
        HuggingFaceError: the tokenizer has more tokens than the model has embeddings, or lacks one that the family's config names.
    """
    if chat is None:
        assert texts is not None
        return TokenIds(**read_json(texts / _TOKENS))
    tokenizer, kind = chat.tokenizer, family(model.family)
    if tokenizer.vocab_size > model.language.vocab_size:
        raise HuggingFaceError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.language.vocab_size is {model.language.vocab_size}: "
            "it is not the tokenizer that this model was trained with"
        )
    lacking = [text for text in kind.token_fields.values() if text not in tokenizer.special_ids]
    if lacking:
        raise HuggingFaceError(f"{kind.hf_class} needs the special tokens {', '.join(lacking)}, which the tokenizer lacks")
    return TokenIds(
        image=None if model.text_only else tokenizer.image_token_id,
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        pad=tokenizer.pad_id,
        more={field: tokenizer.special_ids[text] for field, text in kind.token_fields.items()},
    )


def write_texts(folder: Path, model: ModelConfig, chat: Chat, image: ImageConfig) -> None:
    """Tokenizer, chat template, processor and generation config of a model trained here."""
    chat.tokenizer.save_hf(folder, chat.jinja())
    for name, content in family(model.family).processor_files(model, image, chat.tokenizer).items():
        _write(folder / name, content)
    generation: dict[str, Any] = {"eos_token_id": chat.stop_ids, "pad_token_id": chat.tokenizer.pad_id, "do_sample": False}
    if chat.tokenizer.bos_id is not None:
        generation["bos_token_id"] = chat.tokenizer.bos_id
    _write(folder / "generation_config.json", generation)


def check_pictures(model: ModelConfig, image: ImageConfig) -> None:
    """Can the family's processor make of a picture what training made of it? Raises HuggingFaceError when it cannot."""
    if not model.text_only:
        family(model.family).check_pictures(model, image)


def keep_texts(source: Path, kept: Path) -> None:
    """Keep an imported folder's tokenizer, processor and token ids beside its checkpoint, for a lossless export."""
    config, kind = hf_config(read_json(source / CONFIG)), family_of_folder(source)
    text = getattr(config, "text_config", config)

    def named(field: str) -> Any:
        value = getattr(config, field, None)
        return value if value is not None else getattr(text, field, None)

    kept.mkdir(parents=True, exist_ok=True)
    ids = {"image": getattr(config, kind.image_token_field, None), "bos": named("bos_token_id"), "eos": named("eos_token_id")}
    _write(kept / _TOKENS, ids | {"pad": named("pad_token_id"), "more": {field: named(field) for field in kind.token_fields}})
    copy_texts(source, kept)


def copy_texts(source: Path, folder: Path) -> None:
    """Copy the files that are there; a folder without tokenizer stays one."""
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
