"""Recipes as commands read them: completed from the Hugging Face folders that they start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.config import Recipe, load_recipe


def load(path: Path, overrides: Sequence[str] | None = None) -> Recipe:
    """The recipe of a YAML file, with the model, tokenizer and pictures of its `init` folders where it says nothing of them.

    Raises:
        RecipeError: the recipe is wrong.
        HuggingFaceError: a folder is missing, or the recipe contradicts it.
    """
    return load_recipe(path, overrides or [], complete=_complete)


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    init = values.get("init")
    if not isinstance(init, dict) or not any(init.values()):
        return values
    from megavlm.checkpoint.hf.starting import complete

    return complete(values)
