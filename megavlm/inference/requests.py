"""Questions from a file: JSON lines of {"prompt": text, "images": [files]}, answered in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.inference.sampling import GenerationError


@dataclass(frozen=True)
class Request:
    """One line of the file."""

    prompt: str
    images: tuple[Path, ...]
    """Relative ones are taken from the file's folder."""
    line: dict[str, Any]
    """The whole record; the answer is written beside its other keys."""


def read_requests(file: Path) -> list[Request]:
    """All lines. Raises GenerationError naming the line that is no such record, or the picture that is not there."""
    if not file.is_file():
        raise GenerationError(f"{file}: there is no such file")
    return list(_requests(file))


def _requests(file: Path) -> Iterator[Request]:
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise GenerationError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise GenerationError(f'{where}: each line is {{"prompt": "...", "images": ["a.jpg"]}}, images being optional')
        images = record.get("images", [])
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise GenerationError(f"{where}: images is {images!r}, and must be a list of file names")
        paths = tuple(file.parent / image for image in images)
        for path in paths:
            if not path.is_file():
                raise GenerationError(f"{where}: there is no picture {path}")
        yield Request(record["prompt"], paths, record)
