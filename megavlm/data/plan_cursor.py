"""The state of a stage's data: a few KB of JSON that name what the plan depends on and where it stands.

What waits in the packer is not stored but drawn again: the cursor holds the counters from just before the oldest waiting sample
came, and one bit for each sample drawn since: whether it still waits. What the plan depends on of each source is compressed, so that
the state of hundreds of sources stays a few KB and a refused resume can still name what changed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megavlm.config.data import MixtureEntry
from megavlm.config.schema import DataConfig, ModelConfig, StageConfig
from megavlm.data.mixture import Draw, Mixture
from megavlm.data.plan_columns import Columns

CURSOR_VERSION = 3
"""Raised whenever the same cursor would lead to other packs: order, mixture rule, packing."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


class CursorError(ValueError):
    """A cursor that belongs to other data or another plan."""


def identity(columns: Mapping[str, Columns], stage: StageConfig, data: DataConfig, model: ModelConfig, seed: int) -> dict[str, object]:
    """Everything that the global packs and what is in them depend on, besides the position in the stream."""
    classification = stage.objective == "vision_classification"
    budgets: dict[str, object] = {
        "objective": stage.objective,
        "packs_per_step": stage.packs_per_step,
        "pack_window_samples": data.pack_window_samples,
        "max_patches_per_pack": data.max_patches_per_pack,
        "patch_budget": data.patch_budget,
        "packing": data.packing,
    }
    budgets |= {"images_per_pack": stage.images_per_pack} if classification else {"seq_len_tokens": data.seq_len_tokens}
    return {
        "version": CURSOR_VERSION,
        "seed": seed,
        "budgets": budgets,
        "settings": _settings(stage, data, model),
        "mixture": {name: _describe(entry) for name, entry in sorted(stage.mixture_entries.items())},
        "fingerprints": {name: columns[name].fingerprint for name in sorted(columns)},
    }


_PER_SOURCE = ("mixture", "fingerprints")


def written(identity: Mapping[str, object]) -> dict[str, object]:
    """`identity` as the cursor holds it: `mixture` and `fingerprints` together in `sources`, as JSON, deflated, in base 85."""
    text = json.dumps([identity[key] for key in _PER_SOURCE], separators=(",", ":"))
    plain = {key: value for key, value in identity.items() if key not in _PER_SOURCE}
    return {**plain, "sources": base64.b85encode(zlib.compress(text.encode(), 9)).decode()}


def _read(cursor: Mapping[str, object]) -> dict[str, object]:
    """A cursor with `mixture` and `fingerprints` again."""
    try:
        found = json.loads(zlib.decompress(base64.b85decode(str(cursor["sources"]))))
        return {**cursor, **dict(zip(_PER_SOURCE, found, strict=True))}
    except (zlib.error, binascii.Error, ValueError, TypeError) as error:
        raise CursorError(f"this data cursor is damaged: its sources cannot be read ({error})") from None


def _settings(stage: StageConfig, data: DataConfig, model: ModelConfig) -> dict[str, object]:
    """What turns samples into tokens and tiles. The tokenizer goes by its content, so that it may move."""
    settings: dict[str, object] = {}
    if stage.objective != "vision_classification":
        settings["tokenizer"] = _content(data.tokenizer)
        settings["chat_template"] = _content(data.chat_template) if data.chat_template.endswith(".jinja") else data.chat_template
        settings["over_long"] = ", ".join(data.over_long)
    if stage.objective == "multimodal":
        settings["image_token"] = data.image_token
        settings |= {f"image.{name}": str(value) for name, value in data.image.model_dump(exclude={"decoder"}).items()}
        settings["tokens_per_tile"] = model.visual_tokens_per_tile if model.language.cross_attention is None else "one a picture"
    if stage.objective != "text":
        settings["image_size_px"], settings["patch_size_px"] = model.vision.image_size_px, model.vision.patch_size_px
    return settings


def _content(path: str) -> str:
    """Hash of a file, or of a tokenizer folder's files."""
    place = Path(path)
    files = [place / name for name in _TOKENIZER_FILES] if place.is_dir() else [place]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(f"{file.name if place.is_dir() else ''}|{file.stat().st_size}|".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _describe(entry: MixtureEntry) -> float | str:
    """An entry as a number where it is one, else as text (JSON would turn steps into texts)."""
    parts = []
    if entry.repeats is not None:
        parts.append(f"repeats {entry.repeats}")
    elif isinstance(entry.weight, dict):
        parts.append(f"weight {dict(sorted(entry.weight.items()))} {entry.change}")
    elif entry.max_epochs is None:
        return float(entry.weight or 0)
    else:
        parts.append(f"weight {entry.weight}")
    if entry.max_epochs is not None:
        parts.append(f"max_epochs {entry.max_epochs}")
    return ", ".join(parts)


class Stream:
    """The draws of a stage, and what of them the cursor has to tell."""

    def __init__(
        self, names: Sequence[str], open_mixture: Callable[[Mapping[str, int]], Mixture], cursor: Mapping[str, Any] | None = None
    ) -> None:
        """`names`: the sources, sorted. `open_mixture` starts the mixture at given counters.

        Raises:
            CursorError: the cursor's counters do not lead where it says.
        """
        nothing = [0] * len(names)
        counts: list[int] = cursor["counters"] if cursor else nothing
        behind: list[int] = cursor["waiting"]["behind"] if cursor else nothing
        if not len(counts) == len(behind) == len(names):
            raise CursorError(f"this data cursor is damaged: it has {len(counts)} and {len(behind)} counters for {len(names)} sources")
        counters = dict(zip(names, counts, strict=True))
        before = {name: count - less for (name, count), less in zip(counters.items(), behind, strict=True)}
        self.mixture = open_mixture(before)
        target = self.mixture.target.at(sum(before.values()))
        if any(count < 0 or abs(count - target[name]) >= 1 for name, count in before.items()):
            raise CursorError(f"this data cursor is damaged: no draws of its mixture lead to {before}")
        self._since: deque[str] = deque()
        again = [self.draw() for _ in range(sum(behind))]
        if cursor and self.mixture.counters != counters:
            raise CursorError(f"this data cursor is damaged: it says {counters}, and its mixture leads to {self.mixture.counters}")
        held = int(cursor["waiting"]["held"], 16) if cursor else 0
        self.held: list[Draw] = [draw for i, draw in enumerate(again) if held >> i & 1]
        """Draws that waited when the cursor was made."""

    def draw(self) -> Draw:
        """The next sample. Raises MixtureEnd."""
        drawn = self.mixture.draw()
        self._since.append(drawn.source)
        return drawn

    def position(self, waiting: Iterable[int]) -> dict[str, object]:
        """Where the stream stands: `counters` (samples drawn from each source, by name) and `waiting`; given the ordinals that wait.

        waiting.behind: draws of each source, by name, since just before the oldest waiting sample came. waiting.held: those draws in
        order, as the bits of a hexadecimal number from the lowest on; set where the sample still waits.
        """
        ordinals = list(waiting)
        oldest = min(ordinals, default=self.mixture.num_draws)
        while len(self._since) > self.mixture.num_draws - oldest:
            self._since.popleft()
        behind = Counter(self._since)
        held = sum(1 << (ordinal - oldest) for ordinal in ordinals)
        waits = {"behind": [behind[name] for name in self.mixture.sources], "held": f"{held:x}"}
        return {"counters": list(self.mixture.counters.values()), "waiting": waits}


def check_cursor(cursor: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Refuse a cursor that would lead to other packs than it promises, naming every difference.

    Raises:
        CursorError: it is none, or made with other data, settings, budgets, mixture, seed or by another version of the plan.
    """
    if "version" in cursor and cursor["version"] != CURSOR_VERSION:
        raise CursorError(
            f"version: this data cursor was written for plan version {cursor['version']}, and this megavlm plans by version "
            f"{CURSOR_VERSION}: finish the stage with the megavlm that began it, or start a new stage from its checkpoint"
        )
    if absent := [key for key in (*written(now), "step", "counters", "waiting") if key not in cursor]:
        raise CursorError(f"this is no data cursor: it lacks {', '.join(absent)}")
    cursor = _read(cursor)
    changes = []
    for key, value in now.items():
        then = cursor[key]
        if not isinstance(value, Mapping) or not isinstance(then, Mapping):
            if then != value:
                changes.append(f"{key}: {then!r} then, {value!r} now")
            continue
        for name in sorted(set(value) | set(then)):
            if then.get(name, "absent") != value.get(name, "absent"):
                changes.append(f"{key}.{name}: {then.get(name, 'absent')!r} then, {value.get(name, 'absent')!r} now")
    if changes:
        raise CursorError(
            "cannot resume the data stream, because what it depends on has changed:\n  "
            + "\n  ".join(changes)
            + "\nset these back, or start the changed data as a new stage"
        )
