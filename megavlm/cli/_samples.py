"""One sample in words, for `megavlm data show`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megavlm.config import Recipe
    from megavlm.data.index import SampleIndex
    from megavlm.data.resizing import PictureGrid
    from megavlm.data.sample import ImageEntry, Sample
    from megavlm.data.tokenizer import Tokenizer

TARGET_OPEN, TARGET_CLOSE = "\u27e6", "\u27e7"


def describe(index: SampleIndex, row: int, recipe: Recipe, tokenizer: Tokenizer) -> str:
    """Address, sizes, pictures and the conversation; targets stand between double brackets, runs of placeholders are counted."""
    sample = index.sample(row)
    lines = [f"row {row}: {index.where(row)}, task {sample.task!r}, split {sample.split!r}"]
    lines.append(
        f"  {index.length_tokens[row]} tokens, {index.num_targets[row]} targets, {index.num_tiles[row]} tiles, weight {sample.weight:g}"
    )
    is_native = recipe.data.image.policy == "native" and index.objective != "vision_classification"
    pictures = zip(sample.images, index.grids(row), strict=True)
    lines += [f"  picture {i}: {_picture(image, grid, is_native)}" for i, (image, grid) in enumerate(pictures)]
    if index.objective == "vision_classification":
        lines += [f"  object {o.label} in picture {o.image} at {', '.join(f'{v:g}' for v in o.box_px)}" for o in sample.objects or []]
    else:
        lines += [f"  | {line}" for line in _conversation(sample, index.grids(row), recipe, tokenizer).split("\n")]
    return "\n".join(lines)


def _picture(image: ImageEntry, grid: PictureGrid, is_native: bool) -> str:
    """A picture's size and what becomes of it."""
    time = f" at {image.time_s:g} s" if image.time_s is not None else ""
    whole = " and the whole picture" if grid.thumbnail else ""
    unit = "patches" if is_native else "tiles"
    cut = "1 tile" if grid.work.tiles == 1 and not is_native else f"{grid.cols} x {grid.rows} {unit}{whole}"
    return f"{image.file}{time}, {image.width} x {image.height} px: {cut}, {grid.tokens} visual tokens"


def save_pictures(index: SampleIndex, row: int, folder: Path) -> list[Path]:
    """Writes a sample's pictures, bytes as they are in the shard, and returns where."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, image in enumerate(index.sample(row).images):
        path = folder / Path(image.file).name
        path.write_bytes(index.image(row, number))
        paths.append(path)
    return paths


def _conversation(sample: Sample, grids: list[PictureGrid], recipe: Recipe, tokenizer: Tokenizer) -> str:
    from megavlm.data.chat import Chat
    from megavlm.data.resizing import make_resizing

    chat, resizing = (
        Chat(recipe.data.chat_template, tokenizer, recipe.data.image.marks),
        make_resizing(recipe.data.image, recipe.model, tokenizer),
    )
    encoded = chat.encode_conversation([m.model_dump() for m in sample.messages], [resizing.sequence(grid) for grid in grids])
    image_id = tokenizer.image_token_id if grids else -1
    text = ""
    rows = zip(encoded.ids_L.tolist(), encoded.supervised_L.tolist(), strict=True)
    for (is_image, is_target), run in groupby(rows, key=lambda r: (r[0] == image_id, r[1])):
        ids = [token for token, _ in run]
        if is_image:
            text += f"{tokenizer.decode(ids[:1])} x {len(ids)}"
        else:
            part = tokenizer.decode(ids)
            text += f"{TARGET_OPEN}{part}{TARGET_CLOSE}" if is_target else part
    return text
