"""pydantic's findings in plain words: what was given, what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from megavlm.config.errors import Mistake
from megavlm.config.fields import Path, dotted, is_block, type_at, unknown_field
from megavlm.config.schema import Block

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a block (name: value lines)",
    "model_attributes_type": "a block (name: value lines)",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "one of {expected}",
    "finite_number": "a finite number",
    "too_short": "a list of at least {min_length} (it has {actual_length})",
    "too_long": "a list of at most {max_length} (it has {actual_length})",
}
_MAX_SHOWN = 80


def show(value: Any) -> str:
    """A value as the recipe's author would recognise it, with its kind where that is what is wrong."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {_shorten(repr(value))}"
    if isinstance(value, (dict, BaseModel)):
        return f"a block with {len(dict(value))} entries"
    if isinstance(value, list):
        return f"the list {_shorten(repr(value))}"
    return str(value)


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _problem(root: type[Block], kind: str, loc: Path, given: Any, context: Mapping[str, Any], fallback: str) -> str:
    if kind == "extra_forbidden":
        block = type_at(root, loc[:-1])
        return unknown_field(root, block if is_block(block) else root, dotted(loc[:-1]), str(loc[-1]))
    if kind == "missing":
        return "is missing, and has no default: give it a value"
    if kind == "value_error":
        return str(context.get("error", fallback))
    if kind in _WANTED:
        wanted = _WANTED[kind].format_map(dict(context))
        hint = f"; write {int(given)}" if kind.startswith("int_") and isinstance(given, float) and given.is_integer() else ""
        return f"must be {wanted}, got {show(given)}{hint}"
    return f"{fallback[:1].lower()}{fallback[1:]}, got {show(given)}"


def find_origin(origins: Mapping[Path, str], path: Path) -> str:
    """Where a path was set: the override that touched it or something in it last, else its own line, else that of a block around it."""
    inside = [origin for at, origin in origins.items() if path and at[: len(path)] == path]
    if inside and inside[-1].startswith("override"):
        return inside[-1]
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return ""


def mistakes_of(error: ValidationError, root: type[Block], origins: Mapping[Path, str], prefix: Path = ()) -> list[Mistake]:
    """All findings of pydantic as mistakes, in the recipe's order. `prefix` is where the checked block stands in the recipe."""
    found = []
    for item in error.errors(include_url=False):
        # "<weight>": which alternative of a field was meant, which is no part of the path.
        loc: Path = prefix + tuple(part for part in item["loc"] if not str(part).startswith("<"))
        problem = _problem(root, item["type"], loc, item["input"], item.get("ctx", {}), item["msg"])
        found.append(Mistake(dotted(loc), problem, find_origin(origins, loc)))
    return found
