"""What planning reads of the indexes: checked columns, and how many samples a step will take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megavlm.config.schema import DataConfig, ModelConfig, StageConfig
from megavlm.data.packing import Budget, Packer, Waiting
from megavlm.data.resizing_base import PictureGrid
from megavlm.planner.flops import VisionWork

_PILOT_WINDOWS, _PILOT_WINDOW_SAMPLES = 3, 256
"""A pilot packs so many windows of samples; a window of at most so many."""


class PlanError(ValueError):
    """Data, stage and layout do not fit together."""


class EndOfData(PlanError):
    """Every source has reached its max_epochs, and what is left fills no whole step: a stage's natural end.

    `num_steps`: steps that could be filled. `num_left_samples`: samples that were drawn and are in none of them.
    """

    def __init__(self, stage: str, num_steps: int, num_left_samples: int) -> None:
        super().__init__(
            f"stage {stage!r}: the data end after {num_steps} steps: every source with a weight above 0 has reached its "
            f"mixture.*.max_epochs, and {num_left_samples} samples are left that fill no whole step"
        )
        self.num_steps, self.num_left_samples = num_steps, num_left_samples


class Index(Protocol):
    """What planning needs of a source's SampleIndex: a row a sample, metadata only."""

    @property
    def length_tokens(self) -> npt.NDArray[np.integer]: ...
    @property
    def num_tiles(self) -> npt.NDArray[np.integer]: ...
    @property
    def num_patches(self) -> npt.NDArray[np.integer]: ...
    @property
    def patch_pairs(self) -> npt.NDArray[np.integer]: ...
    @property
    def num_targets(self) -> npt.NDArray[np.integer]: ...
    @property
    def fingerprint(self) -> str: ...
    def grids(self, row: int) -> Sequence[PictureGrid]: ...
    def __len__(self) -> int: ...


class Columns:
    """The columns of one source that planning reads, checked against the stage's budgets.

    Raises:
        PlanError: samples that break a budget or that the objective cannot use.
    """

    def __init__(self, name: str, index: Index, stage: StageConfig, data: DataConfig) -> None:
        self.num_rows, self.fingerprint = len(index), str(index.fingerprint)
        self._index, self._native = index, data.image.policy == "native"
        self.tiles, self.patches, self.pairs = (np.asarray(c) for c in (index.num_tiles, index.num_patches, index.patch_pairs))
        self.targets = np.asarray(index.num_targets)
        images_only = stage.objective == "vision_classification"
        self.lengths = np.ones(self.num_rows, dtype=np.int64) if images_only else np.asarray(index.length_tokens)
        for column in (self.lengths, self.tiles, self.patches, self.pairs, self.targets):
            assert column.shape == (self.num_rows,), f"index of {name!r}: a column has shape {column.shape}, not ({self.num_rows},)"
        if not self.num_rows:
            return
        where = f"stage {stage.name!r}, source {name!r}"
        if images_only:
            what = "have no image, and vision_classification trains on images"
            _refuse_below(where, self.tiles, 1, what, "filter by data.sources.*.tasks")
            return
        _refuse_below(where, self.lengths, 1, "have no token", "remove them from the shards")
        advice = "raise it, set data.over_long, lower the caps of data.image, or remove them from the shards: megavlm never truncates"
        _refuse_above(where, self.lengths, data.seq_len_tokens, f"are longer than data.seq_len_tokens={data.seq_len_tokens}", advice)
        if stage.objective == "text":
            _refuse_above(where, self.tiles, 0, "have images, and objective text takes none", "filter by data.sources.*.tasks")
        if (most := data.max_patches_per_pack) is not None and data.patch_budget == "hard":
            over = f"have more patches than data.max_patches_per_pack={most}"
            _refuse_above(where, self.patches, most, over, "raise it or lower data.image.max_tokens_per_sample")

    def work(self, row: int) -> VisionWork:
        """Of one sample's pictures."""
        return VisionWork(int(self.tiles[row]), int(self.patches[row]), int(self.pairs[row]))

    def looks(self, row: int, model: ModelConfig) -> int:
        """Rows of one sample's text times the features that each sees in a cross-attention layer, as if all pictures were seen by
        equally many and none stood before the first: the plan does not know where in the text they stand."""
        grids = self._index.grids(row)
        if not grids:
            return 0
        if self._native:
            features = sum(model.visual_tokens(grid.rows, grid.cols) for grid in grids)
        else:
            features = sum(grid.work.tiles for grid in grids) * model.visual_tokens_per_tile
        return int(self.lengths[row]) * features // len(grids)

    @property
    def mean_length(self) -> Fraction:
        """Mean length of the rows."""
        return Fraction(int(self.lengths.sum(dtype=np.int64)), self.num_rows)


def _refuse_above(where: str, values: npt.NDArray[np.integer], most: int, what: str, advice: str) -> None:
    """Raise PlanError when any row's value is above `most`, naming how many there are and the worst of them."""
    if values.max() > most:
        worst = int(np.argmax(values))
        _refuse(where, int(np.count_nonzero(values > most)), len(values), worst, int(values[worst]), what, advice)


def _refuse_below(where: str, values: npt.NDArray[np.integer], least: int, what: str, advice: str) -> None:
    if values.min() < least:
        worst = int(np.argmin(values))
        _refuse(where, int(np.count_nonzero(values < least)), len(values), worst, int(values[worst]), what, advice)


def _refuse(where: str, count: int, total: int, row: int, value: int, what: str, advice: str) -> None:
    raise PlanError(f"{where}: {count} of {total} samples {what} (row {row} has {value}): {advice}")


def check_tasks(stage: StageConfig, tasks: Iterable[str]) -> None:
    """Refuse loss weights of tasks that no sample of the stage has; `tasks`: those of its sources.

    Raises:
        PlanError: naming them and the tasks there are.
    """
    known = sorted(set(tasks))
    if absent := sorted(set(stage.loss.task_weights) - set(known)):
        raise PlanError(
            f"stage {stage.name!r}: loss.task_weights names {', '.join(absent)}, and no sample of its sources has such a task "
            f"(there are: {', '.join(known) or 'none'})"
        )


def pack_budget(stage: StageConfig, data: DataConfig) -> Budget:
    """Budgets of one pack."""
    if stage.objective != "vision_classification":
        return Budget(data.seq_len_tokens, data.max_patches_per_pack, data.patch_budget == "hard")
    # A fixed number of equal tiles: the budget on patches says nothing that images_per_pack does not.
    return Budget(stage.images_per_pack)


def expected_fill(columns: Mapping[str, Columns], shares: Mapping[str, Fraction], budget: Budget, window: int) -> Fraction:
    """Share of the token budget that packs of such a mixture will hold, by packing a few windows of samples drawn at random.

    The same number on every machine: whole numbers of a fixed stream.
    """
    names = [name for name in sorted(shares) if shares[name] > 0]
    window = min(window, _PILOT_WINDOW_SAMPLES)
    count = _PILOT_WINDOWS * window
    words = np.random.PCG64(20240501).random_raw(2 * count).reshape(2, count)
    edges = np.cumsum([float(shares[name]) for name in names])[:-1]
    chosen = np.searchsorted(edges, words[0] / 2.0**64)
    stream: list[Waiting[int]] = []
    for place, word in zip(chosen.tolist(), words[1].tolist(), strict=True):
        source = columns[names[place]]
        row = word % source.num_rows
        stream.append(Waiting(int(source.lengths[row]), int(source.patches[row]), row, len(stream)))
    packer: Packer[int] = Packer(budget, window)
    drawn = iter(stream)
    packs, tokens = 0, 0
    while True:
        pack = packer.next_pack(lambda: next(drawn, None))
        if len(packer.waiting) + len(pack) < window:
            return Fraction(round(Fraction(tokens, max(packs, 1) * budget.length) * 2**20), 2**20) if packs else Fraction(1)
        # The first packs have the whole window to choose from, the later ones what was left over.
        if packer.waiting and packer.waiting[-1].arrival >= window:
            packs, tokens = packs + 1, tokens + sum(w.length for w in pack)
