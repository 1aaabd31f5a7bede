"""From YAML files that build on one another to one tree of plain values that remembers where each value came from.

A file may name others under `base:` (one path or a list, relative to the file). They are read first, in order, and the file
itself last: a mapping is merged key by key, anything else (a list too) is replaced by the later one.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from megavlm.config.errors import Mistake, RecipeError
from megavlm.config.fields import Path, did_you_mean

BASE_KEY = "base"


@dataclass
class Composition:
    """Merged values, interpolations still unresolved, and where each was set."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, str] = field(default_factory=dict)


def read_composition(path: str | FilePath) -> Composition:
    """Reads a file and everything it builds on. Raises RecipeError: unreadable, not YAML, not a mapping, a circle of bases."""
    return _read(FilePath(path), ())


def _read(path: FilePath, above: tuple[FilePath, ...]) -> Composition:
    if path.resolve() in [p.resolve() for p in above]:
        raise RecipeError(str(above[0]), f"base files form a circle: {' -> '.join(str(p) for p in (*above, path))}")
    text = _read_text(path, above)
    values = _parse(path, text)
    merged = Composition()
    for base in _bases(path, values.pop(BASE_KEY, None)):
        part = _read(base, (*above, path))
        merged.values = merge(merged.values, part.values)
        merged.origins |= part.origins
    merged.values = merge(merged.values, values)
    merged.origins |= _line_numbers(path, text)
    return merged


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`high` over `low`: mappings are merged, everything else is replaced."""
    together = OmegaConf.merge(OmegaConf.create(low), OmegaConf.create(high))
    return cast(dict[str, Any], OmegaConf.to_container(together, resolve=False))


def _read_text(path: FilePath, above: tuple[FilePath, ...]) -> str:
    named_by = f", named as a base by {above[-1]}" if above else ""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        problem = f"no such file{named_by}{did_you_mean(path.name, siblings)}"
    except UnicodeDecodeError as error:
        problem = f"is not text in UTF-8 (byte {error.start}){named_by}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}{named_by}"
    raise RecipeError(str(path), problem)


def _parse(path: FilePath, text: str) -> dict[str, Any]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(str(path), "is empty" if root is None else "must be a mapping of blocks (run:, model:, ...)")
        # OmegaConf's loader, because plain PyYAML reads 1e-3 as text and lets the second of two equal keys win in silence.
        loaded = OmegaConf.load(io.StringIO(text))
        values = OmegaConf.to_container(loaded, resolve=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(str(path), f"not valid YAML, {place}{error.problem or error.context}") from None
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise RecipeError(str(path), f"not valid YAML: {error}") from None
    return cast(dict[str, Any], values)


def _bases(path: FilePath, given: Any) -> list[FilePath]:
    names = given if isinstance(given, list) else [] if given is None else [given]
    for name in names:
        if not isinstance(name, str) or not name:
            raise RecipeError(str(path), Mistake(BASE_KEY, f"must be a path or a list of paths, got {name!r}"))
    return [path.parent / name for name in names]


def _line_numbers(path: FilePath, text: str) -> dict[Path, str]:
    origins: dict[Path, str] = {}

    def walk(node: yaml.Node | None, at: Path) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                origins[(*at, key.value)] = f"{path}:{key.start_mark.line + 1}"
                walk(value, (*at, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                origins[(*at, i)] = f"{path}:{value.start_mark.line + 1}"
                walk(value, (*at, i))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return origins
