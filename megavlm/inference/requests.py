"""Questions from a file: JSON lines of {"prompt": text, "images": [files]}, answered in batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.checkpoint.errors import some
from megavlm.inference.sampling import GenerationError

_SHOWN = 5
"""Broken lines that a message names."""


@dataclass(frozen=True)
class Request:
    """One line of the file."""

    prompt: str
    images: tuple[Path, ...]
    """Relative ones are taken from the file's folder."""
    line: dict[str, Any]
    """The whole record; the answer is written beside its other keys."""


def read_requests(file: Path) -> list[Request]:
    """All lines. Raises GenerationError naming the lines that are no such record, or whose pictures are not there."""
    if not file.is_file():
        raise GenerationError(f"{file}: there is no such file")
    requests, broken = [], []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            requests.append(_request(file.parent, text))
        except GenerationError as error:
            broken.append(f"line {number}: {error}")
    if broken:
        more = [f"and {len(broken) - _SHOWN} more lines"] if len(broken) > _SHOWN else []
        raise GenerationError(f"{file}, " + "; ".join(broken[:_SHOWN] + more))
    return requests


def _request(folder: Path, text: str) -> Request:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise GenerationError(f"not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise GenerationError('each line is {"prompt": "...", "images": ["a.jpg"]}, images being optional')
    images = record.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise GenerationError(f"images is {images!r}, and must be a list of file names")
    paths = tuple(folder / image for image in images)
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise GenerationError(f"there is no picture {some(missing)}")
    return Request(record["prompt"], paths, record)
