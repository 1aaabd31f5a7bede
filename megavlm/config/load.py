"""Reads a recipe: YAML files, then overrides, then interpolation, then the typed schema; and writes one back.

`${run.dir}` in a value refers to another field and `${oc.env:NAME}` or `${oc.env:NAME,default}` to the environment. Both are resolved
here, once: the recipe that a run saves holds the values that were used and needs neither.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

import megavlm
from megavlm.config.compose import Composition, read_composition
from megavlm.config.errors import Mistake, RecipeError
from megavlm.config.fields import Path, dotted, unwrap
from megavlm.config.messages import find_origin, mistakes_of
from megavlm.config.overrides import apply_overrides
from megavlm.config.schema import Block, Recipe

Completion = Callable[[dict[str, Any]], dict[str, Any]]
"""Plain values of a recipe -> the same with more of them, before they are checked."""


def load_recipe(path: str | FilePath, overrides: Sequence[str] = (), complete: Completion | None = None) -> Recipe:
    """The recipe in a YAML file (see `megavlm.config.compose` for `base:`) with dotted overrides applied.

    `complete` adds what the recipe leaves to be found elsewhere: the model block of a Hugging Face folder (init.from_hf), which needs
    transformers to read. A recipe that a run has saved is complete.

    Raises RecipeError (a ValueError) naming the file, each field's path, what was given, what is allowed, and where it was set.
    """
    composition = read_composition(path)
    apply_overrides(composition, list(overrides), Recipe, str(path))
    return _validate(composition, str(path), complete)


def parse_recipe(values: dict[str, Any], overrides: Sequence[str] = (), source: str = "recipe") -> Recipe:
    """The recipe in plain values (as YAML would hold them). Raises RecipeError as `load_recipe` does."""
    composition = Composition(values=cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(values), resolve=False)))
    apply_overrides(composition, list(overrides), Recipe, source)
    return _validate(composition, source)


def load_blocks(path: str | FilePath) -> dict[str, Any]:
    """The checked blocks of a file that is a part of a recipe, such as configs/models/*.yaml, by name. Raises RecipeError."""
    composition = read_composition(path)
    values = _resolve(composition, str(path))
    blocks: dict[str, Any] = {}
    mistakes: list[Mistake] = []
    for name, value in values.items():
        field = Recipe.model_fields.get(name)
        if field is None:
            only: dict[str, Any] = {name: value}
            mistakes += [m for m in _mistakes(Recipe, only, composition.origins) if m.path == name]
            continue
        try:
            blocks[name] = TypeAdapter(unwrap(field.annotation)).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            mistakes += mistakes_of(error, Recipe, composition.origins, (name,))
    if mistakes:
        raise RecipeError(str(path), mistakes)
    return blocks


def recipe_yaml(recipe: Recipe) -> str:
    """Every field of a recipe as YAML, defaults included, so that a later version with other defaults reads the same run."""
    return yaml.safe_dump(_escape(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True, width=140)


def dump_recipe(recipe: Recipe, path: str | FilePath) -> None:
    """Writes `recipe_yaml` to a file that `megavlm train` takes to repeat the run.

    The file appears whole or not at all, because other processes may read it while it is replaced.
    """
    path = FilePath(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    header = f"# Resolved by megavlm {megavlm.__version__}: `megavlm train` with this file repeats the run.\n"
    scratch.write_text(header + recipe_yaml(recipe), encoding="utf-8")
    os.replace(scratch, path)


def _escape(value: Any) -> Any:
    """Values with a literal ${ protected from being read as an interpolation."""
    if isinstance(value, dict):
        return {k: _escape(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_escape(v) for v in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _validate(composition: Composition, source: str, complete: Completion | None = None) -> Recipe:
    values = _resolve(composition, source)
    if complete is not None:
        values = complete(values)
    try:
        # Through JSON, because pydantic's strict mode takes a list for a tuple only there; strict, because "2" or true for a number
        # is a slip of the author's.
        return Recipe.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise RecipeError(source, mistakes_of(error, Recipe, composition.origins)) from None


def _mistakes(root: type[Block], values: dict[str, Any], origins: dict[Path, str]) -> list[Mistake]:
    try:
        root.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        return mistakes_of(error, root, origins)
    return []


def _resolve(composition: Composition, source: str) -> dict[str, Any]:
    config = OmegaConf.create(composition.values)
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "")
        path: Path = tuple(int(p) if p.isdigit() else p for p in key.replace("[", ".").replace("]", "").split(".") if p)
        problem = str(error).splitlines()[0]
        if "Environment variable" in problem:
            problem = f"{problem.partition('interpolation: ')[2].strip(chr(34))}; set it, or give a default: ${{oc.env:NAME,default}}"
        elif "Missing mandatory value" in problem:
            problem = "is ??? in the recipe: give it a value"
        raise RecipeError(source, Mistake(dotted(path), problem, find_origin(composition.origins, path))) from None
    infinite = [
        Mistake(dotted(p), f"must be a finite number, got {v}", find_origin(composition.origins, p)) for p, v in _non_finite(values)
    ]
    if infinite:
        raise RecipeError(source, infinite)
    return cast(dict[str, Any], values)


def _non_finite(value: Any, at: Path = ()) -> Iterator[tuple[Path, float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _non_finite(item, (*at, str(key)))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _non_finite(item, (*at, i))
    elif isinstance(value, float) and not math.isfinite(value):
        yield at, value
