"""Dotted overrides from the command line: parallel.tensor=2, stages.align.optimizer.lr=1e-3, run.max_steps=null."""

from __future__ import annotations

from typing import Any, get_origin

import yaml
from omegaconf import OmegaConf

from megavlm.config.compose import Composition, merge
from megavlm.config.errors import Mistake, RecipeError
from megavlm.config.fields import Path, child_type, did_you_mean, dotted, is_block, item_type, leaf_paths, unknown_field
from megavlm.config.schema import Block, MixtureEntry


class _Refused(Exception):
    """What is wrong with one override; becomes a Mistake."""


def apply_overrides(composition: Composition, overrides: list[str], root: type[Block], source: str) -> None:
    """Sets each `path=value` in place; a later one wins. The value is YAML: numbers, true, null, [lists], {mappings}.

    An element of a list of blocks is named by its `name` or its index. Raises RecipeError with every override that is wrong.
    """
    wrong = []
    for override in overrides:
        key, equals, text = override.partition("=")
        try:
            if not equals or not key.strip():
                raise _Refused("an override is written path=value, such as parallel.tensor=2")
            parts = key.strip().replace("[", ".").replace("]", "").split(".")
            path = _set(composition.values, root, parts, _value(text))
        except _Refused as refused:
            wrong.append(Mistake(key.strip() or override, str(refused), f"override {override!r}"))
        else:
            composition.origins = {p: o for p, o in composition.origins.items() if p[: len(path)] != path or p == path}
            composition.origins[path] = f"override {override!r}"
    if wrong:
        raise RecipeError(source, wrong)


def _value(text: str) -> Any:
    if not text.strip():
        raise _Refused("has no value: write null to clear a field, '' for an empty text")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise _Refused(f"{text!r} is not a YAML value ({first}); quote it to make it text") from None


def _set(values: dict[str, Any], root: type[Block], parts: list[str], value: Any) -> Path:
    node: Any = values
    kind: Any = root
    path: Path = ()
    for depth, part in enumerate(parts):
        key = _locate(root, kind, node, part, path)
        kind = child_type(kind, key)
        path = (*path, key)
        if depth + 1 < len(parts):
            node = _descend(node, key, kind, path)
    slot: Any = path[-1]
    old = _get(node, slot)
    node[slot] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return path


def _locate(root: type[Block], kind: Any, node: Any, part: str, path: Path) -> str | int:
    """The key or index in `node` that `part` means, given what the schema says `node` is."""
    if not part:
        raise _Refused("two dots, or a dot at an end, leave a name empty")
    if is_block(kind):
        if part not in kind.model_fields:
            raise _Refused(_unknown(root, kind, path, part))
        return part
    if isinstance(node, list):
        return _index(node, part, path)
    return part


def _get(node: Any, key: Any) -> Any:
    return node[key] if isinstance(node, list) else node.get(key)


def _unknown(root: type[Block], kind: type[Block], path: Path, part: str) -> str:
    message = unknown_field(root, kind, dotted(path), part)
    if not path and "did you mean" not in message:
        return message + did_you_mean(part, list(leaf_paths(root)))
    return message


def _index(node: list[Any], part: str, path: Path) -> int:
    names = [e.get("name") if isinstance(e, dict) else None for e in node]
    if part in names:
        return names.index(part)
    if part.lstrip("-").isdigit() and -len(node) <= int(part) < len(node):
        return int(part) % len(node)
    known = [str(n) for n in names if n is not None]
    listed = f": {', '.join(known)}" if known else ""
    raise _Refused(f"{dotted(path)} has no {part!r}{did_you_mean(part, known)} ({len(node)} there{listed})")


def _descend(node: Any, key: str | int, kind: Any, path: Path) -> Any:
    """The container at `key`, made when the recipe does not mention that block."""
    if not is_block(kind) and item_type(kind) is None:
        raise _Refused(f"{dotted(path)} is a single value, nothing lies below it")
    child = _get(node, key)
    if child is None and get_origin(kind) is list:
        raise _Refused(f"{dotted(path)} is empty in the recipe: there is no element to name")
    if child is None:
        child = node[key] = {}
    if kind is MixtureEntry and isinstance(child, int | float):
        child = node[key] = {"weight": child}
    if not isinstance(child, (dict, list)):
        raise _Refused(f"{dotted(path)} is {child!r} in the recipe, not a block: nothing below it can be set")
    return child
