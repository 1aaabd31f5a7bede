"""A page of held-out pictures with the model's answers, to look at: numbers alone hide what goes wrong."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megavlm.data.decode import make_decoder
from megavlm.evaluation.boxes import GRID, Box, parse_box
from megavlm.evaluation.questions import Question
from megavlm.evaluation.results import RIGHT, Answer

GREEN, RED, INK, PAPER = (22, 128, 60), (200, 30, 30), (40, 40, 40), (255, 255, 255)
PICTURE_PX, MARGIN_PX, LINE_PX, FONT_PX = 180, 12, 16, 12
COLUMNS = 6
SAMPLES_FOLDER, SAMPLES_FILE = "samples", "samples.json"
SAMPLE_PX = 512
_TEXT_LINES = 6
_CHARACTERS = PICTURE_PX // 7


def write_picture_page(questions: Sequence[Question], answers: Sequence[Answer], path: str | Path, per_task: int = COLUMNS) -> Path | None:
    """PNG with up to `per_task` answers of each task under the right picture, wrong ones first (at most half of them, while there
    are right ones). Reference boxes are drawn green, predicted ones red. None when no question has a picture."""
    tiles = [
        _tile(questions[a.number].pictures(), a.question, a.reference, a.prediction, a.right, questions[a.number].box)
        for a in _chosen(questions, answers, per_task)
    ]
    if not tiles:
        return None
    width, height = tiles[0].size
    rows = -(-len(tiles) // COLUMNS)
    page = Image.new("RGB", (min(len(tiles), COLUMNS) * width, rows * height), PAPER)
    for i, tile in enumerate(tiles):
        page.paste(tile, (i % COLUMNS * width, i // COLUMNS * height))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    return path


def write_samples(questions: Sequence[Question], answers: Sequence[Answer], folder: str | Path, per_task: int = COLUMNS) -> Path | None:
    """The samples of `write_picture_page` one by one: <folder>/samples/000.png, ... (a question's first picture, at most SAMPLE_PX wide and
    high) and samples.json, a list of {picture, task, question, reference, prediction, right}. None when no question has a picture."""
    chosen = _chosen(questions, answers, per_task)
    if not chosen:
        return None
    folder = Path(folder)
    pictures = folder / SAMPLES_FOLDER
    if pictures.exists():
        shutil.rmtree(pictures)  # of an earlier evaluation, which may have had more
    pictures.mkdir(parents=True)
    rows = []
    for number, answer in enumerate(chosen):
        name = f"{number:03d}.png"
        picture = Image.fromarray(make_decoder("pillow").decode(questions[answer.number].pictures()[0]))
        picture.thumbnail((SAMPLE_PX, SAMPLE_PX))
        picture.save(pictures / name)
        texts = {key: getattr(answer, key) for key in ("task", "question", "reference", "prediction", "right")}
        rows.append({"picture": name, **texts})
    (folder / SAMPLES_FILE).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder / SAMPLES_FILE


def write_comparison(pictures: Sequence[bytes], question: str, lines: Sequence[str], path: str | Path) -> Path:
    """PNG of one question's pictures with `lines` of text beneath."""
    tile = _frame(pictures, [(question, INK), *((line, INK) for line in lines)], INK, boxes=[])
    tile.save(path)
    return Path(path)


def _chosen(questions: Sequence[Question], answers: Sequence[Answer], per_task: int) -> list[Answer]:
    chosen: list[Answer] = []
    shown = [a for a in answers if a.condition == RIGHT and questions[a.number].num_pictures]
    for task in sorted({a.task for a in shown}):
        wrong = [a for a in shown if a.task == task and not a.right]
        right = [a for a in shown if a.task == task and a.right]
        num_wrong = min(len(wrong), max(per_task // 2, per_task - len(right)))
        chosen += [*wrong[:num_wrong], *right[: per_task - num_wrong]]
    return chosen


def _tile(pictures: Sequence[bytes], question: str, reference: str, prediction: str, right: bool, box: Box | None) -> Image.Image:
    colour = GREEN if right else RED
    texts = [(question, INK), (f"right: {reference}", INK), (f"model: {prediction}", colour)]
    boxes: list[tuple[Box, tuple[int, int, int]]] = []
    if box is not None:
        predicted = parse_box(prediction)
        boxes = [(box, GREEN), *([(predicted, RED)] if predicted is not None else [])]
    return _frame(pictures, texts, colour, boxes)


def _frame(
    pictures: Sequence[bytes],
    texts: Sequence[tuple[str, tuple[int, int, int]]],
    colour: tuple[int, int, int],
    boxes: Sequence[tuple[Box, tuple[int, int, int]]],
) -> Image.Image:
    tile = Image.new("RGB", (PICTURE_PX + 2 * MARGIN_PX, PICTURE_PX + 2 * MARGIN_PX + _TEXT_LINES * LINE_PX), PAPER)
    draw = ImageDraw.Draw(tile)
    per_row = math.ceil(math.sqrt(len(pictures)))
    side = PICTURE_PX // max(1, per_row)
    for i, data in enumerate(pictures):
        picture = _scaled(data, side)
        left, top = MARGIN_PX + i % per_row * side, MARGIN_PX + i // per_row * side
        tile.paste(picture, (left, top))
        for (x0, y0, x1, y1), box_colour in boxes if i == 0 else ():
            across, down = picture.width / GRID, picture.height / GRID
            draw.rectangle((left + x0 * across, top + y0 * down, left + x1 * across, top + y1 * down), outline=box_colour, width=2)
    border = MARGIN_PX - 4
    draw.rectangle((border, border, tile.width - border - 1, MARGIN_PX + PICTURE_PX + 3), outline=colour, width=2)
    font = ImageFont.load_default(size=FONT_PX)
    wrapped = [(line, c) for text, c in texts for line in textwrap.wrap(text, _CHARACTERS) or [""]]
    if len(wrapped) > _TEXT_LINES:
        wrapped = [*wrapped[: _TEXT_LINES - 1], ("...", INK)]
    for i, (line, line_colour) in enumerate(wrapped):
        draw.text((MARGIN_PX, PICTURE_PX + 2 * MARGIN_PX - 4 + i * LINE_PX), line, fill=line_colour, font=font)
    return tile


def _scaled(data: bytes, side_px: int) -> Image.Image:
    """The whole picture in a square of side_px; pixels of small ones stay visible as pixels."""
    picture = Image.fromarray(make_decoder("pillow").decode(data))
    scale = side_px / max(picture.size)
    size = tuple(max(1, round(v * scale)) for v in picture.size)
    return picture.resize((size[0], size[1]), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
