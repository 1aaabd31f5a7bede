"""Pictures as arrays: the tile grid (from metadata alone), resizing and cutting.

Shape legend: T tiles, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image

from megavlm.config.data import Interpolation
from megavlm.config.schema import ImageConfig

GREY = 127
_LINES_AT_A_TIME_PX = 2**22
_PILLOW: dict[Interpolation, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class TileGrid:
    """How a picture is cut: cols x rows tiles, row by row, then the thumbnail."""

    cols: int
    rows: int
    thumbnail: bool

    @property
    def num_tiles(self) -> int:
        return self.cols * self.rows + int(self.thumbnail)


@lru_cache(maxsize=256)
def _ratios(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    pairs = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if min_tiles <= c * r <= max_tiles]
    return tuple(sorted(pairs, key=lambda p: p[0] * p[1]))


@lru_cache(maxsize=65536)
def _nearest_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_px: int) -> tuple[int, int]:
    aspect, area = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for cols, rows in _ratios(min_tiles, max_tiles):
        distance = abs(aspect - cols / rows)
        if distance < best_distance or (distance == best_distance and area > 0.5 * tile_px * tile_px * cols * rows):
            best, best_distance = (cols, rows), distance
    return best


def tile_grid(width: int, height: int, image: ImageConfig, tile_px: int, max_tiles: int | None = None) -> TileGrid:
    """The grid whose aspect ratio is nearest to the picture's, among all of image.min_tiles to image.max_tiles tiles.

    On equal distance the larger grid wins when the picture has more than half of its pixels (InternVL,
    `dynamic_preprocess` / `find_closest_aspect_ratio`; grids of equal size are tried in Hugging Face's order, fewest columns first).
    `max_tiles`: a lower limit than the recipe's, which goes before min_tiles.
    """
    most = image.max_tiles if max_tiles is None else min(max_tiles, image.max_tiles)
    if image.policy == "fixed" or most == 1:
        return TileGrid(1, 1, False)
    cols, rows = _nearest_grid(width, height, min(image.min_tiles, most), most, tile_px)
    return TileGrid(cols, rows, image.thumbnail and cols * rows > 1)


def as_CHW(picture_HWC: np.ndarray) -> torch.Tensor:
    """A decoded picture as uint8 tensor (3, H, W), without a copy where the memory may be written."""
    if not picture_HWC.flags.writeable:
        picture_HWC = picture_HWC.copy()
    owner, (height, width, _) = picture_HWC.base, picture_HWC.shape
    if picture_HWC.strides == (4 * width, 4, 1) and isinstance(owner, np.ndarray) and owner.nbytes == 4 * height * width:
        return torch.from_numpy(owner.reshape(height, width, 4)).permute(2, 0, 1)[:3]  # its storage holds the fourth byte too
    return torch.from_numpy(picture_HWC).permute(2, 0, 1)


def resize(picture_CHW: torch.Tensor, height: int, width: int, interpolation: Interpolation = "bicubic") -> torch.Tensor:
    """Antialiased resize of a uint8 picture; untouched, bit for bit, when the size is right already.

    Bicubic and bilinear: torch's uint8 kernel on channels-last memory, what torchvision (and so Hugging Face's image processors)
    runs, 4 to 9 times as fast as Pillow's and within 2 of its 256 levels. Lines first, then columns, as Pillow did up to version 12
    and as published models were trained; Pillow 13 takes columns first where that is less work. Lanczos, which torch has not: Pillow's,
    in the same order.
    """
    if tuple(picture_CHW.shape[-2:]) == (height, width):
        return picture_CHW
    if interpolation == "lanczos":
        return _by_pillow(picture_CHW, height, width, interpolation)
    channels, rows, columns = picture_CHW.shape
    if picture_CHW.stride() == (1, 4 * columns, 4) and picture_CHW.untyped_storage().nbytes() == 4 * rows * columns:
        # Three of the four bytes that Pillow keeps for each pixel: resizing all four is cheaper than packing three first.
        pixels_HWC = picture_CHW.as_strided((rows, columns, 4), (4 * columns, 4, 1))
    else:
        pixels_HWC = picture_CHW.permute(1, 2, 0).contiguous()
    # A batch of one with its full stride: by any other torch does not see channels-last memory, and converts the result.
    depth = pixels_HWC.shape[2]
    batch = pixels_HWC.as_strided((1, depth, rows, columns), (depth * rows * columns, 1, depth * columns, depth))
    return functional.interpolate(batch, size=(height, width), mode=interpolation, antialias=True)[0, :channels]


def _by_pillow(picture_CHW: torch.Tensor, height: int, width: int, interpolation: Interpolation) -> torch.Tensor:
    picture, kernel = Image.fromarray(picture_CHW.permute(1, 2, 0).contiguous().numpy()), _PILLOW[interpolation]
    # Two passes by hand: as one, Pillow 13 may take the columns first.
    lines = picture.resize((width, picture.height), kernel)
    return as_CHW(np.array(lines.resize((width, height), kernel)))


def split_tiles(whole_CHW: torch.Tensor, tile_px: int) -> torch.Tensor:
    """(T, 3, tile_px, tile_px) of a picture of whole tiles, row by row."""
    rows, cols = whole_CHW.shape[1] // tile_px, whole_CHW.shape[2] // tile_px
    split = whole_CHW.reshape(3, rows, tile_px, cols, tile_px)
    return split.permute(1, 3, 0, 2, 4).reshape(-1, 3, tile_px, tile_px)


def cut_tiles(picture_HWC: np.ndarray, grid: TileGrid, tile_px: int, interpolation: Interpolation = "bicubic") -> torch.Tensor:
    """uint8 tiles (T, 3, tile_px, tile_px) of a uint8 RGB picture: resized to the whole grid, cut row by row, thumbnail last."""
    picture = as_CHW(picture_HWC)
    tiles = split_tiles(resize(picture, grid.rows * tile_px, grid.cols * tile_px, interpolation), tile_px)
    if grid.thumbnail:
        tiles = torch.cat([tiles, resize(picture, tile_px, tile_px, interpolation).unsqueeze(0)])
    return tiles.contiguous()


def crop_to_square(picture_HWC: np.ndarray, side: int, interpolation: Interpolation = "bicubic") -> torch.Tensor:
    """(3, side, side): the shortest side resized to `side`, the middle of the other kept (Hugging Face's CLIPImageProcessor)."""
    height, width = picture_HWC.shape[:2]
    long_side = int(side * max(height, width) / min(height, width))
    new_width, new_height = (side, long_side) if width <= height else (long_side, side)
    left, top = (new_width - side) // 2, (new_height - side) // 2
    if long_side > 8 * side:  # a line: resized as a whole it could be thousands of times as long as wide; Pillow computes the middle alone
        columns, lines = (
            (left * width / new_width, (left + side) * width / new_width),
            (top * height / new_height, (top + side) * height / new_height),
        )
        line, kernel = Image.fromarray(np.ascontiguousarray(picture_HWC)), _PILLOW[interpolation]
        line = line.resize((side, height), kernel, box=(columns[0], 0, columns[1], height))
        return as_CHW(np.array(line.resize((side, side), kernel, box=(0, lines[0], side, lines[1])))).contiguous()
    return resize(as_CHW(picture_HWC), new_height, new_width, interpolation)[:, top : top + side, left : left + side].contiguous()


def pad_to_square(
    picture_HWC: np.ndarray, side: int, colour: tuple[int, int, int], interpolation: Interpolation = "bicubic"
) -> torch.Tensor:
    """(3, side, side): padded to a square with `colour`, the picture in the middle, then resized (LLaVA's expand2square).

    The two passes of the resize are done one after the other, lines first and some at a time: the whole square never exists. A
    picture eight times as tall as wide is shortened first, where lines as long as it is tall would take seconds.
    """
    height, width = picture_HWC.shape[:2]
    picture, longest = as_CHW(picture_HWC), max(height, width)
    if height >= 8 * width and height > side:
        picture = resize(picture, side, width, interpolation)
    rows = picture.shape[1]
    background = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    narrow = background.repeat(1, longest if rows == height else side, side)
    above, before = (narrow.shape[1] - rows) // 2, (longest - width) // 2
    step = max(1, _LINES_AT_A_TIME_PX // longest) if width < height else rows
    for top in range(0, rows, step):
        lines = picture[:, top : top + step]
        if width < height:
            padded = background.repeat(1, lines.shape[1], longest)
            padded[:, :, before : before + width] = lines
            lines = padded
        narrow[:, above + top : above + top + lines.shape[1]] = resize(lines, lines.shape[1], side, interpolation)
    return resize(narrow, side, side, interpolation).contiguous()
