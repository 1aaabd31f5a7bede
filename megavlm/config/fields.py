"""Questions about the schema itself: which fields a block has, what a dotted path leads to, what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from megavlm.config.schema import Block

Path = tuple[str | int, ...]


def dotted(path: Sequence[str | int]) -> str:
    """("stages", 1, "name") as stages[1].name."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def unwrap(annotation: Any) -> Any:
    """The type under Annotated[...] and Optional[...]; of "a value or a block", the block."""
    while True:
        arguments = [a for a in get_args(annotation) if a is not NoneType]
        if get_origin(annotation) in (Union, UnionType) and (blocks := [a for a in arguments if is_block(unwrap(a))]):
            annotation = blocks[0]
        elif get_origin(annotation) is Annotated or (get_origin(annotation) in (Union, UnionType) and len(arguments) == 1):
            annotation = arguments[0]
        else:
            return annotation


def is_block(annotation: Any) -> bool:
    """Whether the type is one of the schema's blocks."""
    return isinstance(annotation, type) and issubclass(annotation, Block)


def item_type(annotation: Any) -> Any:
    """Type of the values of a dict or the elements of a list; None for anything else."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict:
        return unwrap(arguments[1])
    return unwrap(arguments[0]) if origin is list else None


def child_type(annotation: Any, part: str | int) -> Any:
    """Type of what `part` names inside a value of type `annotation`; None when there is no such thing."""
    if is_block(annotation):
        field = annotation.model_fields.get(part)
        return None if field is None else unwrap(field.annotation)
    return item_type(annotation)


def type_at(root: Any, path: Sequence[str | int]) -> Any:
    """Type that a path leads to; None when it leads nowhere."""
    for part in path:
        root = child_type(root, part)
    return root


def leaf_paths(block: type[Block], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all fields, with <name> for free keys and list elements."""
    for name, field in block.model_fields.items():
        path, annotation = f"{prefix}{name}", unwrap(field.annotation)
        item = item_type(annotation)
        if is_block(annotation):
            yield from leaf_paths(annotation, f"{path}.")
        elif is_block(item):
            yield from leaf_paths(item, f"{path}.<name>.")
        else:
            yield path


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """'; did you mean X?' for the nearest known word, or ''."""
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


RENAMED = {"model.init_from": "init.from_hf"}
"""Fields of earlier releases -> where they are now."""


def unknown_field(root: type[Block], block: type[Block], parent: str, given: str) -> str:
    """Message for a key that its block does not have: the nearest sibling, else the same name elsewhere, else the list."""
    known = list(block.model_fields)
    now = RENAMED.get(f"{parent}.{given}")
    if now is not None:
        return f"unknown field: it is {now} now"
    hint = did_you_mean(given, known)
    if not hint:
        elsewhere = [p for p in leaf_paths(root) if p.rpartition(".")[2] == given][:3]
        hint = f"; did you mean {' or '.join(repr(p) for p in elsewhere)}?" if elsewhere else ""
    place = f"{parent!r} has" if parent else "the top level has"
    return f"unknown field{hint} ({place}: {', '.join(known)})"
