"""Pages composed of real scanned digits: the pictures of the demonstration data, and where on them each digit stands.

The scans are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set: 1,797 scans of 8x8
pixels with 17 grey levels. Train and held-out pages never share a scan.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

NUM_HELD_OUT_SCANS = 300
SPLIT_SEED = 0
"""The division of the scans does not depend on the data set's seed: a scan held out once is held out always."""
DIGIT_SHARE = (0.27, 1 / 3)
"""A digit's cell takes this share of the page's side: three fit beside each other."""
TRAIN_VARIATION = 1.5
"""Training scans are turned, sheared and stretched this much more than held-out ones: 1,497 scans are few to learn shapes from."""
INK_LEVEL = 0.25
"""Darkness from which a pixel counts as ink when a digit's box is measured."""
SCAN_PX = 8
_MARGIN_PX = 1
"""Blank frame around a scan before it is turned: corners keep their ink, and edges fade instead of ending."""


@dataclass(frozen=True)
class PlacedDigit:
    """A digit on a page and the tight box around its ink: x0, y0, x1, y1 in pixels, the right and lower edges exclusive."""

    digit: int
    box_px: tuple[int, int, int, int]

    def box_per_mille(self, page_px: int) -> tuple[int, int, int, int]:
        """The box as integers 0-999 (0: left or upper edge of the page, 999: right or lower edge)."""
        x0, y0, x1, y1 = (round(999 * v / page_px) for v in self.box_px)
        return x0, y0, x1, y1


@dataclass(frozen=True)
class Page:
    """One picture. `digits` stand in the order in which they were asked for (a row: left to right)."""

    ink_HW: np.ndarray
    """Darkness 0-1; H = W = page side in pixels."""
    digits: tuple[PlacedDigit, ...]
    paper_seed: int
    """What paper, pen and light are drawn from, once the pixels are asked for."""

    def pixels(self) -> np.ndarray:
        """uint8 RGB (H, W, C): paper and pen tinted, the light falling off to one side, a little noise."""
        rng = np.random.default_rng(self.paper_seed)
        paper_C = rng.uniform(175, 250) + rng.uniform(-12, 12, size=3)
        pen_C = rng.uniform(5, 90) + rng.uniform(-20, 40, size=3)
        slope_x, slope_y = rng.uniform(-14, 14, size=2)
        axis = np.linspace(-1, 1, len(self.ink_HW), dtype=np.float32)
        light_HW = slope_x * axis[None, :] + slope_y * axis[:, None] + rng.normal(0, rng.uniform(0, 5), size=self.ink_HW.shape)
        page_HWC = paper_C + self.ink_HW[..., None] * (pen_C - paper_C) + light_HW[..., None]
        page: np.ndarray = np.clip(page_HWC, 0, 255).astype(np.uint8)
        return page

    def png(self) -> bytes:
        """The picture as a PNG file."""
        buffer = BytesIO()
        Image.fromarray(self.pixels()).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


class ScanLibrary:
    """The scans of one split, by digit."""

    def __init__(self, split: str) -> None:
        """Take the scans of `split` ("train" or "heldout").

        Raises:
            ValueError: another split.
        """
        from sklearn.datasets import load_digits  # here, not above: half a second that only makers of data should pay

        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r}: the demonstration data know 'train' and 'heldout'")
        scans_NHW, labels_N = load_digits(return_X_y=True)
        order_N = np.random.default_rng(SPLIT_SEED).permutation(len(labels_N))
        self.indices_N = np.sort(order_N[:NUM_HELD_OUT_SCANS] if split == "heldout" else order_N[NUM_HELD_OUT_SCANS:])
        """Rows of scikit-learn's table that belong to this split."""
        self.variation = TRAIN_VARIATION if split == "train" else 1.0
        self._by_digit = [[self._framed(scans_NHW[i]) for i in self.indices_N if labels_N[i] == digit] for digit in range(10)]

    @staticmethod
    def _framed(scan_P: np.ndarray) -> Image.Image:
        ink_HW = np.round(scan_P.reshape(SCAN_PX, SCAN_PX) * (255 / 16)).astype(np.uint8)
        return Image.fromarray(np.pad(ink_HW, _MARGIN_PX))

    def ink(self, digit: int, side_px: int, rng: np.random.Generator) -> np.ndarray:
        """A random scan of `digit` as darkness 0-1 on a square of `side_px`, slightly turned, sheared and stretched."""
        scans = self._by_digit[digit]
        scan = scans[int(rng.integers(len(scans)))]
        angle_rad, shear = rng.uniform(-0.2, 0.2) * self.variation, rng.uniform(-0.2, 0.2) * self.variation
        stretch_x, stretch_y = 0.9 + rng.uniform(-0.12, 0.12, size=2) * self.variation
        # PIL wants the map from a pixel of the result to a pixel of the source: scale from the result's side to the framed scan's.
        scale = scan.width / side_px
        cos, sin = np.cos(angle_rad), np.sin(angle_rad)
        a, b = cos * scale * stretch_x, (sin + shear) * scale * stretch_x
        d, e = -sin * scale * stretch_y, cos * scale * stretch_y
        centre_source, centre = scan.width / 2, side_px / 2
        matrix = (a, b, centre_source - (a + b) * centre, d, e, centre_source - (d + e) * centre)
        turned = scan.transform((side_px, side_px), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        # A gamma makes strokes thinner (above 1) or thicker (below 1).
        gamma = float(np.exp(rng.uniform(-0.4, 0.4) * self.variation))
        return (np.asarray(turned, dtype=np.float32) / 255.0) ** gamma


class PageMaker:
    """Composes pages from the scans of one split."""

    def __init__(self, split: str, page_px: int) -> None:
        """Raises ValueError for a page too small to hold three digits that can be told apart."""
        if page_px < 40:
            raise ValueError(f"page_px={page_px}: a digit would get {page_px * DIGIT_SHARE[0]:.0f} pixels; use at least 40")
        self.scans = ScanLibrary(split)
        self.page_px = page_px

    def row(self, digits: list[int], rng: np.random.Generator) -> Page:
        """A number: digits of one size beside each other, the line at a random place and slightly uneven.

        Raises:
            ValueError: more digits than fit beside each other.
        """
        if not 1 <= len(digits) <= 3:
            raise ValueError(f"a row of {len(digits)} digits does not fit on a page: 1 to 3 do")
        side_px = int(rng.uniform(*DIGIT_SHARE) * self.page_px)
        x_px = int(rng.integers(0, self.page_px - side_px * len(digits) + 1))
        y_px = int(rng.integers(1, self.page_px - side_px))
        corners = [(x_px + i * side_px, int(np.clip(y_px + rng.integers(-1, 2), 0, self.page_px - side_px))) for i in range(len(digits))]
        return self._draw(digits, [side_px] * len(digits), corners, rng)

    def scattered(self, digits: list[int], rng: np.random.Generator) -> Page:
        """Digits of several sizes, strewn over the page without overlap.

        Raises:
            ValueError: more digits than can be strewn (more than 6 seldom find room).
        """
        if not 1 <= len(digits) <= 6:
            raise ValueError(f"{len(digits)} digits on a page: 1 to 6 find room without overlap")
        while True:
            sides = [int(rng.uniform(*DIGIT_SHARE) * self.page_px) for _ in digits]
            corners = self._strew(sides, rng)
            if corners is not None:
                return self._draw(digits, sides, corners, rng)

    def crowded(self, rng: np.random.Generator) -> Page:
        """Three lines of two or three digits with uneven gaps: as many digits as a page can hold, to learn their shapes from."""
        digits, sides, corners = [], [], []
        side_px = int(rng.uniform(*DIGIT_SHARE) * self.page_px)
        for y in self._spread(3, side_px, rng):
            for x in self._spread(int(rng.integers(2, 4)), side_px, rng):
                digits.append(int(rng.integers(10)))
                sides.append(side_px)
                corners.append((x, y))
        return self._draw(digits, sides, corners, rng)

    def _spread(self, count: int, side_px: int, rng: np.random.Generator) -> list[int]:
        """Where `count` intervals of `side_px` begin so that none overlap, the free pixels between them split at random."""
        free = self.page_px - count * side_px
        return [int(cut) + i * side_px for i, cut in enumerate(np.sort(rng.integers(0, free + 1, size=count)))]

    def _strew(self, sides: list[int], rng: np.random.Generator, tries: int = 40) -> list[tuple[int, int]] | None:
        """Upper left corners of squares that do not overlap; None when luck ran out."""
        placed: list[tuple[int, int, int]] = []
        for side in sides:
            candidates = rng.integers(0, self.page_px - side + 1, size=(tries, 2)).tolist()
            for x, y in candidates:
                if all(x + side <= x2 or x2 + side2 <= x or y + side <= y2 or y2 + side2 <= y for x2, y2, side2 in placed):
                    placed.append((x, y, side))
                    break
            else:
                return None
        return [(x, y) for x, y, _ in placed]

    def _draw(self, digits: list[int], sides: list[int], corners: list[tuple[int, int]], rng: np.random.Generator) -> Page:
        ink_HW = np.zeros((self.page_px, self.page_px), dtype=np.float32)
        placed = []
        for digit, side, (x, y) in zip(digits, sides, corners, strict=True):
            cell_HW = self.scans.ink(digit, side, rng)
            ink_HW[y : y + side, x : x + side] = cell_HW * rng.uniform(0.85, 1.0)
            rows, columns = np.flatnonzero((cell_HW > INK_LEVEL).any(axis=1)), np.flatnonzero((cell_HW > INK_LEVEL).any(axis=0))
            box = (x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1)
            placed.append(PlacedDigit(digit, box))
        return Page(ink_HW, tuple(placed), int(rng.integers(2**63)))
