"""The files of a Hugging Face tokenizer's folder, each read with one clear error when it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megavlm.data.sentencepiece_export import TokenizerError


def read_text(file: Path) -> str:
    """Raises TokenizerError for what is no text."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is damaged: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises TokenizerError for anything else."""
    try:
        value = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{file} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} holds a {type(value).__name__}, not an object")
    return value


def read_tokenizer(folder: Path, taken: str) -> Any:
    """The `tokenizers.Tokenizer` of a folder; `taken` begins the words that say what the recipe's field takes.

    Raises TokenizerError: there is no tokenizer.json, or a damaged one.
    """
    import tokenizers

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(f"{folder} has no tokenizer.json: {taken} a folder with a fast tokenizer")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise TokenizerError(f"{file} is damaged, or of a newer version of tokenizers: {error}") from error
