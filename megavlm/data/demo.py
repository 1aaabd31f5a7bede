"""The demonstration data: pictures of real scanned digits and conversations about them, in the project's shard format.

folder/pages    one page, one question: caption, reading, counting, grounding; splits train and heldout
folder/multi    several questions about one page, or several pages in one conversation; train and heldout
folder/text     text only, in the same language; train and heldout
folder/patches  crowded pages with labelled boxes, to pretrain the encoder by patch classification; train and heldout
folder/tokenizer.model, folder/manifest.json
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megavlm.data.chat import TEMPLATES
from megavlm.data.demo_samples import SOURCES, SPLITS, SampleName, make_sample, plan_samples
from megavlm.data.demo_talk import CHANCE
from megavlm.data.shards import Sample, ShardReader, ShardWriter, parse_sample, scan_shard, shard_paths
from megavlm.data.tokenizer import train_sentencepiece

FORMAT_VERSION = 2
"""Raise with every change of what is written: folders made by an older version are then made anew."""
TOKENIZER = "tokenizer.model"
MANIFEST = "manifest.json"
SHARD_SAMPLES = 2000
TOKENIZER_SAMPLES = 3000
VOCAB_SIZE = 512
_MAKING = ".making"
_PARALLEL_FROM = 2000
"""Samples from which starting processes pays."""


class DemoError(ValueError):
    """The demonstration data cannot be made there, or not of that size."""


@dataclass(frozen=True)
class DemoManifest:
    """What a demonstration folder holds."""

    settings: dict[str, int]
    """Arguments of `make_demo` and the format version."""
    settings_hash: str
    num_samples: dict[str, dict[str, int]]
    """[source][split]."""
    vocab_size: int
    """Ids of the tokenizer."""
    chance: dict[str, float]
    """Task -> probability that a page's answer is also right for another page."""


def make_demo(
    folder: str | Path, *, seed: int = 0, num_train: int = 10_000, num_held_out: int = 600, page_px: int = 48, num_workers: int = 2
) -> DemoManifest:
    """Make the demonstration data in `folder`, or leave it as it is when it was made with the same settings.

    Each sample has a random generator of its own: the same settings give the same bytes with any number of workers.

    Args:
        folder: created when missing. Sources that an earlier call made with other settings are replaced.
        seed: of everything but the division of the scans into train and held-out ones, which is fixed.
        num_train: training samples of `pages`; `patches` has as many, the others half.
        num_held_out: held-out samples of `pages`; likewise.
        page_px: side of a page in pixels, a multiple of 8.
        num_workers: processes that draw pages.

    Returns:
        What is in the folder.

    Raises:
        DemoError: sizes that make no sense; a folder that holds sources of another origin.
    """
    settings = {"version": FORMAT_VERSION, "seed": seed, "num_train": num_train, "num_held_out": num_held_out, "page_px": page_px}
    _check(settings)
    folder = Path(folder)
    settings_hash = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    present = read_manifest(folder)
    if present is not None and present.settings_hash == settings_hash:
        return present
    ours = present is not None
    foreign = [name for name in (*SOURCES, TOKENIZER) if (folder / name).exists() and not ours]
    if foreign:
        raise DemoError(f"{folder} holds {', '.join(foreign)} but no {MANIFEST}: not made by this command; choose another folder")
    making = folder / _MAKING
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    plan = plan_samples(num_train, num_held_out)
    num_samples = {
        source: {split: sum((name.source, name.split) == (source, split) for name in plan) for split in SPLITS} for source in SOURCES
    }
    texts = _write_sources(making, plan, seed, page_px, num_workers)
    tokenizer = train_sentencepiece(texts, making / TOKENIZER, VOCAB_SIZE, TEMPLATES["megavlm"].special_tokens)
    manifest = DemoManifest(settings, settings_hash, num_samples, tokenizer.vocab_size, CHANCE)
    _publish(making, folder, manifest)
    return manifest


def read_manifest(folder: str | Path) -> DemoManifest | None:
    """Manifest of a demonstration folder; None where there is none.

    Raises:
        DemoError: a manifest.json that `make_demo` did not write.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        return None
    try:
        return DemoManifest(**json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise DemoError(f"{file} is not a manifest of the demonstration data ({error}): choose another folder or delete it") from error


def _check(settings: dict[str, int]) -> None:
    for name in ("num_train", "num_held_out"):
        if settings[name] < 8:
            raise DemoError(f"{name}={settings[name]}: at least 8, so that every task has samples")
    if settings["seed"] < 0:
        raise DemoError(f"seed={settings['seed']} is negative")
    page_px = settings["page_px"]
    if page_px % 8 or page_px < 40:
        raise DemoError(f"page_px={page_px}: a multiple of 8, at least 40 (three digits must fit beside each other)")


# ------------------------------------------------------------------------------------------------------------ writing


def _write_sources(making: Path, plan: list[SampleName], seed: int, page_px: int, num_workers: int) -> Iterable[str]:
    """Write every source; return texts of the training split to train the tokenizer on."""
    texts: dict[str, list[str]] = {source: [] for source in SOURCES}
    make = partial(make_sample, seed=seed, page_px=page_px)
    with tqdm(total=len(plan), desc="demonstration data", unit=" samples", disable=None) as bar:
        made = _in_order(make, plan, num_workers)
        for source in SOURCES:
            names = [name for name in plan if name.source == source]
            with ShardWriter(making / source, SHARD_SAMPLES) as writer:
                for name, (sample, pictures) in zip(names, made, strict=False):
                    writer.write(f"{name.split}-{name.number:06d}", sample, pictures, ["png"] * len(pictures))
                    if name.split == "train" and len(texts[source]) < TOKENIZER_SAMPLES:
                        texts[source].append("\n".join(m["content"] for m in sample["messages"]))
                    bar.update()
    return chain.from_iterable(texts.values())


def _in_order(make: Any, plan: list[SampleName], num_workers: int) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """Samples in the plan's order, made by several processes when there is enough to share out."""
    if num_workers < 2 or len(plan) < _PARALLEL_FROM:
        yield from map(make, plan)
        return
    # spawn: a fork of a process in which threads run (torch, MLflow) may deadlock.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(make, plan, chunksize=100)


def _publish(making: Path, folder: Path, manifest: DemoManifest) -> None:
    """Move the finished sources into place; the manifest comes last, so that a folder with one is complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in SOURCES:
        shutil.rmtree(folder / name, ignore_errors=True)
        (making / name).rename(folder / name)
    (making / TOKENIZER).replace(folder / TOKENIZER)
    making.rmdir()
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------ contact sheet


def demo_contact_sheet(folder: str | Path, png: str | Path, *, split: str = "heldout", per_source: int = 8, zoom: int = 4) -> None:
    """Draw the first samples of each source with pictures: page, labelled boxes, and what is said below it.

    Raises:
        DemoError: the folder has no demonstration data, or none of that split.
    """
    from PIL import Image, ImageDraw

    if read_manifest(folder) is None:
        raise DemoError(f"{folder} holds no demonstration data ({MANIFEST} is missing): make it with make_demo")
    rows = [_first_samples(Path(folder) / source, split, per_source) for source in ("pages", "multi", "patches")]
    side = max(picture.width for row in rows for _, pictures in row for picture in pictures) * zoom
    cell_x, cell_y = side * 3 // 2, side + 84
    sheet = Image.new("RGB", (cell_x * per_source, cell_y * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (sample, pictures) in enumerate(row):
            # Several pages of one sample share the cell's width.
            shown = min(side, (cell_x - 8) // len(pictures))
            for i, picture in enumerate(pictures):
                left, top, scale = x * cell_x + i * shown, y * cell_y, shown / picture.width
                sheet.paste(picture.resize((shown, shown), Image.Resampling.NEAREST), (left, top))
                for thing in sample.objects or []:
                    if thing.image == i:
                        x0, y0, x1, y1 = (v * scale for v in thing.box_px)
                        draw.rectangle((left + x0, top + y0, left + x1 - 1, top + y1 - 1), outline=(220, 30, 30))
            lines = [m.content.replace("<image>", "").strip() for m in sample.messages]
            draw.multiline_text((x * cell_x + 2, y * cell_y + side + 2), "\n".join([sample.task, *lines]), fill="black", spacing=1)
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(png)


def _first_samples(folder: Path, split: str, count: int) -> list[tuple[Sample, list[Any]]]:
    """The first `count` samples of a split with their pictures, tasks in turn as they were written."""
    from PIL import Image

    found: list[tuple[Sample, list[Any]]] = []
    paths = shard_paths(folder)
    reader = ShardReader(folder, [path.name for path in paths])
    for shard, path in enumerate(paths):
        for raw in scan_shard(path):
            sample = parse_sample(reader.read(shard, raw.json.offset, raw.json.size_bytes), f"{path}: {raw.key}")
            if sample.split != split:
                continue
            files = [raw.files[image.file] for image in sample.images]
            pictures = [Image.open(BytesIO(reader.read(shard, file.offset, file.size_bytes))).convert("RGB") for file in files]
            found.append((sample, pictures))
            if len(found) == count:
                reader.close()
                return found
    raise DemoError(f"{folder} has {len(found)} samples of split {split!r}, and the sheet shows {count}")
