"""Draws the pictures of the documentation.

    python docs/pictures/draw.py [route] [pack]

route  route.svg and route.png: the steps that data take, and the types between them
pack   pack.png: one packed microbatch of demonstration data, made by the code that training runs
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
from itertools import accumulate
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from megavlm.config import load_recipe
from megavlm.config.schema import Recipe
from megavlm.data.demo import make_demo
from megavlm.data.index import build_index
from megavlm.data.materialise import Materialiser
from megavlm.data.plan import StepPlanner
from megavlm.data.tokenizer import Tokenizer, load_tokenizer
from megavlm.data.types import PackedBatch
from megavlm.models.layers.packing import pack

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INK, PALE, LINE = "#1f2933", "#f5f7fa", "#52606d"
BANDS = {"metadata": "#dcecf9", "own": "#e3f5e1", "together": "#fdeedb"}
SEGMENTS = ["#4477aa", "#ee6677", "#228833", "#aa7711", "#aa3377", "#1d91b5", "#887766", "#5566cc"]
PADDING = "#c8c8c8"

# ------------------------------------------------------------------------------------------------------------------ route

# (what happens, where in the code, type that comes out); a step's input is the type before it.
METADATA = [
    ("index", "data/index.py", "SampleIndex", "a row a sample:\nlength, tiles, targets"),
    ("mix and shuffle", "data/mixture.py", "sample order", "endless, one counter\na source"),
    ("pack", "data/packing.py", "PackPlan", "samples that share\none sequence"),
    ("balance", "data/plan.py", "StepPlan", "which rank and\nmicrobatch"),
]
OWN = [
    ("materialise", "data/materialise.py", "PackedBatch", "tokens, targets,\nuint8 tiles"),
    ("forward", "models/vlm.py", "TargetLoss", "sum of losses and\nnumber of targets"),
]
TOGETHER = [
    ("reduce, update", "training/step.py", "StepLoss", "equal on every rank"),
    ("record, save", "training/loop.py", "run.dir", "metrics.jsonl,\ncheckpoints"),
]
STEP_WIDTH, TYPE_WIDTH, GAP, HEIGHT = 1.55, 1.65, 0.28, 1.0
WIDTH, LEFT, UPPER, LOWER = 17.3, 0.3, 2.95, 0.35


def draw_route() -> None:
    """Two rows: what is computed from metadata on every rank alike, then what each rank does with its own packs."""
    with mpl.rc_context({"font.family": "DejaVu Sans", "svg.hashsalt": "megavlm", "svg.fonttype": "path"}):
        figure = Figure(figsize=(WIDTH, 4.65))
        axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axis.set_xlim(0, WIDTH)
        axis.set_ylim(0, 4.65)
        axis.set_axis_off()
        same = "metadata only · the same on every rank, without communication · a pure function of (index, seed, mixture, budgets, step)"
        own = 2 * (STEP_WIDTH + TYPE_WIDTH + 2 * GAP)
        _band(axis, "metadata", 0.1, UPPER, WIDTH - 0.2, same)
        apart = LEFT + own + GAP  # where the lower row goes on in its second band
        _band(axis, "own", 0.1, LOWER, own + 0.1, "each rank, its own packs only", indent=1.35)
        _band(axis, "together", apart - 0.2, LOWER, WIDTH - apart + 0.1, "all ranks together, through megatron-core")
        _type(axis, LEFT, UPPER, "shards", "tar files:\nJSON and pictures")
        right = _row(axis, LEFT + TYPE_WIDTH + GAP, UPPER, METADATA, has_input=True)
        _arrow(axis, (_row(axis, LEFT, LOWER, OWN), LOWER + HEIGHT / 2), (apart, LOWER + HEIGHT / 2))
        end = _row(axis, apart, LOWER, TOGETHER)
        _turn(axis, right - TYPE_WIDTH / 2, LEFT + STEP_WIDTH / 2)
        axis.text(end + 0.12, LOWER + HEIGHT / 2, "megavlm convert:\n\u2192 Hugging Face", fontsize=9, color=LINE, va="center")
        for suffix in ("svg", "png"):
            figure.savefig(HERE / f"route.{suffix}", dpi=100, facecolor="white", metadata={"Date": None} if suffix == "svg" else None)


def _band(axis: Axes, name: str, x: float, y: float, width: float, title: str, indent: float = 0.15) -> None:
    box = FancyBboxPatch((x, y - 0.25), width, HEIGHT + 0.85, boxstyle="round,pad=0,rounding_size=0.12", color=BANDS[name], zorder=0)
    axis.add_patch(box)
    axis.text(x + indent, y + HEIGHT + 0.33, title, fontsize=10.5, color=LINE, va="center", style="italic")


def _row(axis: Axes, x: float, y: float, steps: list[tuple[str, str, str, str]], *, has_input: bool = False) -> float:
    """Steps from left to right, each followed by what comes out of it; returns the right edge of the last box."""
    middle = y + HEIGHT / 2
    for number, (name, where, result, what) in enumerate(steps):
        if number or has_input:
            _arrow(axis, (x - GAP, middle), (x, middle))
        _step(axis, x, y, name, where)
        _arrow(axis, (x + STEP_WIDTH, middle), (x + STEP_WIDTH + GAP, middle))
        _type(axis, x + STEP_WIDTH + GAP, y, result, what)
        x += STEP_WIDTH + TYPE_WIDTH + 2 * GAP
    return x - GAP


def _turn(axis: Axes, start: float, end: float) -> None:
    """From the last box of the upper row to the first of the lower one."""
    between = (UPPER - 0.25 + LOWER + HEIGHT + 0.6) / 2
    axis.plot([start, start, end], [UPPER, between, between], color=LINE, lw=1.4, solid_joinstyle="round")
    _arrow(axis, (end, between + 0.02), (end, LOWER + HEIGHT))


def _step(axis: Axes, x: float, y: float, name: str, where: str) -> None:
    axis.add_patch(FancyBboxPatch((x, y), STEP_WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", fc=INK, ec=INK))
    axis.text(x + STEP_WIDTH / 2, y + 0.62, name, color="white", ha="center", va="center", fontsize=11.5, weight="bold")
    axis.text(x + STEP_WIDTH / 2, y + 0.2, where, color="#cbd2d9", ha="center", va="center", fontsize=8.5, family="monospace")


def _type(axis: Axes, x: float, y: float, name: str, what: str) -> None:
    axis.add_patch(FancyBboxPatch((x, y), TYPE_WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", fc="white", ec=LINE, lw=1.2))
    axis.text(x + TYPE_WIDTH / 2, y + 0.74, name, color=INK, ha="center", va="center", fontsize=11.5, weight="bold")
    axis.text(x + TYPE_WIDTH / 2, y + 0.32, what, color=LINE, ha="center", va="center", fontsize=9, linespacing=1.15)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": LINE, "lw": 1.4, "shrinkA": 1, "shrinkB": 1})


# ------------------------------------------------------------------------------------------------------------------- pack


def draw_pack() -> None:
    """The first pack of a mixed stage that holds one page, several pages and text: its tokens, targets and attention mask."""
    with tempfile.TemporaryDirectory() as folder:
        make_demo(folder, num_train=200, num_held_out=20)
        recipe = _recipe(folder)
        tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.data.image_token)
        batch = _interesting(recipe, tokenizer)
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(15.6, 9.4))
        colours = [PADDING if s is None else SEGMENTS[i % len(SEGMENTS)] for i, s in enumerate(batch.segment_samples)]
        figure.text(0.025, 0.965, _headline(batch), fontsize=13, color=INK, weight="bold", va="center")
        _draw_strips(figure.add_axes((0.085, 0.815, 0.43, 0.115)), batch, recipe, tokenizer, colours)
        _draw_mask(figure.add_axes((0.085, 0.055, 0.43, 0.7136)), batch, colours)
        _draw_samples(figure, batch, recipe, tokenizer, colours)
        figure.savefig(HERE / "pack.png", dpi=100, facecolor="white")


def _recipe(folder: str) -> Recipe:
    paths = [f"data.sources.{name}.path={folder}/{name}" for name in ("pages", "multi", "text")]
    return load_recipe(ROOT / "configs/recipes/tiny.yaml", [*paths, f"data.tokenizer={folder}/tokenizer.model", "data.seq_len_tokens=288"])


def _interesting(recipe: Recipe, tokenizer: Tokenizer) -> PackedBatch:
    """The first pack of six samples from all sources, one of them over several pages: drawn from the plan, not composed by hand."""
    stage = recipe.stages[-1].model_copy(update={"micro_batch_packs": 1})
    sources = {name: recipe.data.sources[name] for name in stage.mixture}
    indexes = {n: build_index(s, recipe.data, recipe.model, "multimodal", tokenizer, progress=False) for n, s in sources.items()}
    steps = StepPlanner(indexes, stage, recipe.data, recipe.model, seed=recipe.run.seed, dp_size=1, num_microbatches=stage.packs_per_step)
    materialise = Materialiser(recipe, stage, indexes, tokenizer, needs_tiles=True)
    while True:
        for microbatch in steps.next().assignment[0]:
            samples = [s for p in microbatch for s in p.samples]
            if {s.source for s in samples} == set(sources) and len(samples) == 6 and sum(p.num_tiles for p in microbatch) >= 4:
                batch = materialise(microbatch)
                if "several" in batch.segment_tasks:
                    return batch


def _headline(batch: PackedBatch) -> str:
    samples = sum(s is not None for s in batch.segment_samples)
    return (
        f"One packed microbatch: {samples} samples, {batch.num_tiles} tiles, {batch.num_tokens} tokens "
        f"({batch.num_tokens - batch.num_useful_tokens} of them padding), {len(batch.target_ids_Q)} targets (in brackets)"
    )


def _draw_strips(axis: Axes, batch: PackedBatch, recipe: Recipe, tokenizer: Tokenizer, colours: list[str]) -> None:
    """Segments, kinds of tokens, targets: three bars over the same rows as the mask's columns."""
    total = batch.num_tokens
    segment_S = np.repeat(np.arange(len(batch.segment_lengths)), batch.segment_lengths)
    rows = np.ones((3, total, 3))
    rows[0] = np.array([to_rgb(colours[i]) for i in segment_S])
    rows[1] = to_rgb("#e4e7eb")
    rows[1, batch.image_positions_N.numpy()] = to_rgb("#f0b429")
    rows[2] = to_rgb("#e4e7eb")
    rows[2, batch.target_positions_Q.numpy()] = to_rgb("#c81e4a")
    axis.imshow(rows, aspect="auto", interpolation="nearest", extent=(0, total, 3, 0))
    for line in (1, 2):
        axis.axhline(line, color="white", lw=4)
    for bound in accumulate(batch.segment_lengths[:-1]):
        axis.axvline(bound, color="white", lw=1.5)
    axis.set_yticks([0.5, 1.5, 2.5], ["segment", "visual token", "predicts a target"], fontsize=9)
    axis.set_xticks([])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _draw_mask(axis: Axes, batch: PackedBatch, colours: list[str]) -> None:
    """Which row sees which: drawn from the pieces that the attention itself runs over."""
    total = batch.num_tokens
    image = np.ones((total, total, 3))
    packing = pack(batch.segment_lengths, torch.device("cpu"), causal=True)
    assert len(packing.pieces) == len(colours)
    for piece, colour in zip(packing.pieces, colours, strict=True):
        for row in range(piece.query_length):
            seen = piece.key_length - piece.query_length + row + 1
            image[piece.query_start + row, piece.key_start : piece.key_start + seen] = to_rgb(colour)
    for start in (0, *accumulate(batch.segment_lengths[:-1])):
        axis.axhline(start, color="#e4e7eb", lw=0.6, zorder=0)
        axis.axvline(start, color="#e4e7eb", lw=0.6, zorder=0)
    axis.imshow(image, interpolation="nearest", extent=(0, total, total, 0), alpha=0.92)
    axis.set_xlabel("is seen", fontsize=10)
    axis.set_ylabel("row", fontsize=10)
    axis.set_title("attention: causal inside a segment, nothing between segments; positions restart with each", fontsize=10, color=LINE)


def _draw_samples(figure: Figure, batch: PackedBatch, recipe: Recipe, tokenizer: Tokenizer, colours: list[str]) -> None:
    """Each sample's pictures and text beside its colour; placeholders are counted, what is learned stands in brackets."""
    per_tile = recipe.model.visual_tokens_per_tile
    image_token = tokenizer.image_token_id
    count = sum(s is not None for s in batch.segment_samples)
    height = 0.9 / count
    start = tile = 0
    for number, (length, sample) in enumerate(zip(batch.segment_lengths, batch.segment_samples, strict=True)):
        if sample is None:
            continue
        top = 0.94 - number * height
        tokens = batch.tokens_S[start : start + length]
        targets = set((batch.target_positions_Q[batch.target_segments_Q == number] + 1 - start).tolist())
        tiles = int((tokens == image_token).sum()) // per_tile
        figure.add_artist(FancyBboxPatch((0.54, top - height + 0.02), 0.004, height - 0.03, boxstyle="square,pad=0", color=colours[number]))
        for column in range(tiles):
            axis = figure.add_axes((0.553 + 0.06 * column, top - 0.094, 0.054, 0.0896))
            assert batch.tiles_TCHW is not None
            axis.imshow(batch.tiles_TCHW[tile + column].permute(1, 2, 0).numpy())
            axis.set_axis_off()
        left = 0.553 + 0.06 * tiles + (0.006 if tiles else 0.0)
        title = f"{sample.source} / {batch.segment_tasks[number]}: {length} tokens, {len(targets)} targets"
        figure.text(left, top - 0.012, title, fontsize=10, color=colours[number], weight="bold", va="center")
        text = "\n".join(
            textwrap.fill(line, int((0.99 - left) * 195), subsequent_indent="  ")
            for line in _text(tokens, targets, image_token, tokenizer).split("\n")
        )
        figure.text(left, top - 0.03, text, fontsize=8.5, family="monospace", color=INK, va="top", linespacing=1.25)
        start, tile = start + length, tile + tiles


def _text(tokens: torch.Tensor, targets: set[int], image_token: int, tokenizer: Tokenizer) -> str:
    """The conversation as tokenised; runs of placeholders as a count, targets between brackets."""
    pieces: list[tuple[str, list[int]]] = []
    for place, token in enumerate(tokens.tolist()):
        kind = "image" if token == image_token else "target" if place in targets else "text"
        if not pieces or pieces[-1][0] != kind:
            pieces.append((kind, []))
        pieces[-1][1].append(token)
    shown = {"image": lambda ids: f"<image> x {len(ids)}", "target": lambda ids: f"[{tokenizer.decode(ids)}]", "text": tokenizer.decode}
    return "".join(shown[kind](ids) for kind, ids in pieces)


if __name__ == "__main__":
    for name in sys.argv[1:] or ["route", "pack"]:
        {"route": draw_route, "pack": draw_pack}[name]()
