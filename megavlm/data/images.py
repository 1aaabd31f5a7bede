"""From a picture to tiles: measuring, the tile grid (from metadata alone), resizing and cutting.

Shape legend: T tiles, C channels, H height, W width.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image, UnidentifiedImageError

from megavlm.config.schema import ImageConfig

GREY = 127
_EXIF_ORIENTATION = 0x0112
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


class ImageError(ValueError):
    """A picture that cannot be read."""


def reason(error: Exception) -> str:
    """Why Pillow failed, without the object address in its message, so that logs of two runs compare equal."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known format"
    return str(error) if isinstance(error, ImageError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Measured:
    """What a picture's header says."""

    width: int
    """Pixels after EXIF rotation."""
    height: int
    extension: str
    """Usual file name extension of its format."""


def measure_image(data: bytes) -> Measured:
    """Size and format from the header alone. Raises ImageError for what Pillow cannot open."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                width, height = picture.size
                turned = picture.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
                name = picture.format or "img"
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise ImageError(reason(error)) from error
    if turned:
        width, height = height, width
    return Measured(width, height, _EXTENSIONS.get(name, name.lower()))


@dataclass(frozen=True)
class TileGrid:
    """How a picture is cut: cols x rows tiles, row by row, then the thumbnail."""

    cols: int
    rows: int
    thumbnail: bool

    @property
    def num_tiles(self) -> int:
        return self.cols * self.rows + int(self.thumbnail)


@lru_cache(maxsize=64)
def _ratios(max_tiles: int) -> tuple[tuple[int, int], ...]:
    pairs = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if c * r <= max_tiles]
    return tuple(sorted(pairs, key=lambda p: p[0] * p[1]))


def tile_grid(width: int, height: int, image: ImageConfig, tile_px: int) -> TileGrid:
    """The grid whose aspect ratio is nearest to the picture's, among all of at most `image.max_tiles` tiles.

    On equal distance the larger grid wins when the picture has more than half of its pixels (InternVL,
    `dynamic_preprocess` / `find_closest_aspect_ratio`; grids of equal size are tried columns first here, in a fixed order).
    """
    if image.policy == "fixed" or image.max_tiles == 1:
        return TileGrid(1, 1, False)
    aspect, area = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for cols, rows in _ratios(image.max_tiles):
        distance = abs(aspect - cols / rows)
        if distance < best_distance or (distance == best_distance and area > 0.5 * tile_px * tile_px * cols * rows):
            best, best_distance = (cols, rows), distance
    cols, rows = best
    return TileGrid(cols, rows, image.thumbnail and cols * rows > 1)


def resize(picture_CHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Antialiased bicubic resize of a uint8 picture; untouched, bit for bit, when the size is right already.

    torch's uint8 kernel on channels-last memory: what torchvision (and so Hugging Face's image processors) runs, 2 to 6
    times as fast as Pillow's and within 2 of its 256 levels.
    """
    if tuple(picture_CHW.shape[-2:]) == (height, width):
        return picture_CHW
    batch = picture_CHW.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return functional.interpolate(batch, size=(height, width), mode="bicubic", antialias=True)[0]


def cut_tiles(picture_HWC: np.ndarray, grid: TileGrid, tile_px: int) -> torch.Tensor:
    """uint8 tiles (T, 3, tile_px, tile_px) of a uint8 RGB picture: resized to the whole grid, cut row by row, thumbnail last."""
    if not picture_HWC.flags.writeable:
        picture_HWC = picture_HWC.copy()
    picture = torch.from_numpy(picture_HWC).permute(2, 0, 1)
    whole = resize(picture, grid.rows * tile_px, grid.cols * tile_px).contiguous()
    tiles = whole.view(3, grid.rows, tile_px, grid.cols, tile_px).permute(1, 3, 0, 2, 4).reshape(-1, 3, tile_px, tile_px)
    if grid.thumbnail:
        tiles = torch.cat([tiles, resize(picture, tile_px, tile_px).contiguous().unsqueeze(0)])
    return tiles.contiguous()
