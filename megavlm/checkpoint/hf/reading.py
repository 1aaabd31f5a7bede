"""Reading Hugging Face folders and configs: transformers imported quietly, and settings checked by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.checkpoint.errors import HuggingFaceError

CONFIG = "config.json"
SAME_CONFIG = {"internlm2": "llama"}
"""model_type of classes that are code in their folders, which is never run -> the class of transformers whose config says the same."""


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


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises HuggingFaceError when the file is missing, damaged or holds something else."""
    if not file.is_file():
        raise HuggingFaceError(f"{file.parent} is no Hugging Face folder: it has no {file.name}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HuggingFaceError(f"{file} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise HuggingFaceError(f"{file} holds a {type(value).__name__}, not an object")
    return value


def hf_config(values: Mapping[str, Any]) -> Any:
    """transformers' config object of a `config.json`'s values, defaults filled in."""
    from huggingface_hub.errors import StrictDataclassError

    values = dict(values)
    model_type = values.pop("model_type", None)
    model_type = SAME_CONFIG.get(model_type, model_type)
    try:
        return quiet_transformers().AutoConfig.for_model(model_type, **values)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise HuggingFaceError(f"transformers cannot read a config of model_type={model_type!r}: {error}") from error


class Problems:
    """Settings that the model here does not have, collected so that all of them are told at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def only(self, config: Any, field: str, *allowed: Any, default: Any = None, block: str = "") -> Any:
        """The value of a config's field; a problem is noted when it is none of `allowed`."""
        value = getattr(config, field, default)
        if value is None and default is not None:
            value = default
        if value not in allowed:
            name = f"{block}.{field}" if block else field
            self.found.append(f"{name} is {value!r}, supported: {', '.join(map(str, allowed))}")
        return value

    def choice(self, config: Any, field: str, names: Mapping[Any, Any], *, block: str = "") -> Any:
        """Our name of a field's value; a problem is noted, and some name returned, when there is none."""
        value = self.only(config, field, *names, block=block)
        return names.get(value, next(iter(names.values())))

    def add(self, problem: str) -> None:
        self.found.append(problem)

    def check(self, where: str | Path) -> None:
        """Raise HuggingFaceError when there are any."""
        if self.found:
            raise HuggingFaceError(f"{where} cannot be imported: " + "; ".join(self.found))
