"""Plans of all pictures of a data set at once: each size is planned once, and the result is columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megavlm.config.schema import ImageConfig
from megavlm.data.resizing import PictureGrid, Resizing, ResizingError, plan_pictures
from megavlm.data.sample_index import COLUMN_TYPES, GRID_COLUMNS


@dataclass
class PicturePlans:
    """Shape legend: R samples, I pictures of all samples in order."""

    columns: dict[str, np.ndarray] = field(repr=False)
    """GRID_COLUMNS, each (I,), of the types of SampleIndex."""
    refused: dict[int, str]
    """Sample -> why a picture of it cannot be planned."""
    over_cap: dict[int, str]
    """Sample -> why its pictures together are over data.image.max_tokens_per_sample; its columns are those without that cap."""

    def sums(self, name: str, starts: np.ndarray) -> np.ndarray:
        """int64 (R,): total of a column over each sample's pictures, which are starts[r] .. starts[r + 1]."""
        running: np.ndarray = np.concatenate([[0], np.cumsum(self.columns[name], dtype=np.int64)])
        return np.asarray(running[starts[1:]] - running[starts[:-1]])


def put_grids(columns: dict[str, np.ndarray], at: int, grids: list[PictureGrid], prefix: str = "") -> None:
    """Write plans into GRID_COLUMNS (whose names begin with `prefix`) from `at` on."""
    for i, grid in enumerate(grids, start=at):
        for name, value in zip(GRID_COLUMNS, flat_grid(grid), strict=True):
            columns[prefix + name][i] = value


def flat_grid(grid: PictureGrid) -> tuple[int, ...]:
    """Its values in the order of GRID_COLUMNS."""
    return (grid.cols, grid.rows, int(grid.thumbnail), grid.tokens, *grid.work[:3])


def plan_all(widths: np.ndarray, heights: np.ndarray, starts: np.ndarray, resizing: Resizing, image: ImageConfig) -> PicturePlans:
    """What `plan_pictures` says of each sample, for all samples.

    Args:
        widths, heights: pixels of all pictures, (I,).
        starts: (R + 1,); sample r has the pictures starts[r] .. starts[r + 1].
    """
    among_several = np.repeat(np.diff(starts) > 1, np.diff(starts)).astype(np.int64)
    keys = widths.astype(np.int64) << 32 | heights.astype(np.int64) << 1 | among_several
    unique, inverse = np.unique(keys, return_inverse=True)
    table = np.zeros((len(unique), len(GRID_COLUMNS)), dtype=np.int64)
    errors: dict[int, str] = {}
    for i, key in enumerate(unique.tolist()):
        policy = resizing.for_several() if key & 1 else resizing
        try:
            table[i] = flat_grid(policy.grid(key >> 32, (key & 0xFFFFFFFF) >> 1, image.max_tokens_per_image))
        except ResizingError as error:
            errors[i] = str(error)
    columns = {n: table[:, c][inverse].astype(COLUMN_TYPES[f"image_{n}"]) for c, n in enumerate(GRID_COLUMNS)}
    plans = PicturePlans(columns, {}, {})
    for position in np.flatnonzero(np.isin(inverse, list(errors))).tolist() if errors else []:
        row = int(np.searchsorted(starts, position, side="right")) - 1
        plans.refused.setdefault(row, errors[int(inverse[position])])
    if image.max_tokens_per_sample is not None:
        _cap_samples(plans, widths, heights, starts, resizing, image, image.max_tokens_per_sample)
    return plans


def _cap_samples(
    plans: PicturePlans, widths: np.ndarray, heights: np.ndarray, starts: np.ndarray, resizing: Resizing, image: ImageConfig, cap: int
) -> None:
    known: dict[tuple[tuple[int, int], ...], list[PictureGrid] | str] = {}
    for row in np.flatnonzero(plans.sums("tokens", starts) > cap).tolist():
        if row in plans.refused:
            continue
        span = slice(int(starts[row]), int(starts[row + 1]))
        sizes = tuple(zip(widths[span].tolist(), heights[span].tolist(), strict=True))
        if sizes not in known:
            try:
                known[sizes] = plan_pictures(list(sizes), resizing, image)
            except ResizingError as error:
                known[sizes] = str(error)
        found = known[sizes]
        if isinstance(found, str):
            plans.over_cap[row] = found
        else:
            put_grids(plans.columns, span.start, found)
