"""Pictures of the page: data: URIs, the attention mask, and where a grid lies over its picture.

Shape legend: S packed sequence, C channels, H height, W width.
"""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, features

from megavlm.config.schema import ImageConfig
from megavlm.data.inspect.views import Frame

SMALL_PX = 160
"""Pictures up to this side stay exact (PNG); larger ones are compressed."""
MASK_PX = 256


def hue(number: int) -> int:
    """A hue in degrees; neighbours lie far apart (golden angle)."""
    return int(210 + number * 137.508) % 360


def data_uri(picture_HWC: np.ndarray, max_px: int) -> str:
    """uint8 RGB as a data: URI, its longer side at most `max_px`."""
    picture = Image.fromarray(np.ascontiguousarray(picture_HWC))
    if max(picture.size) > max_px:
        picture.thumbnail((max_px, max_px), Image.Resampling.LANCZOS, reducing_gap=2.0)
    if max(picture.size) <= SMALL_PX:
        return _encode(picture, "PNG", optimize=True)
    return _encode(picture, "WEBP", quality=82) if features.check("webp") else _encode(picture, "JPEG", quality=85)


def _encode(picture: Image.Image, kind: str, **options: object) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def mask_uri(segment_lengths: Sequence[int], segment_colours: Sequence[int | None], visual_S: np.ndarray, *, is_causal: bool) -> str:
    """The attention mask of a pack, rows are queries and columns keys: what is coloured attends.

    At most MASK_PX pixels a side; each pixel stands for the pair of tokens at its centre.

    Args:
        segment_colours: number of each segment's colour (see `hue`), None for padding.
        visual_S: which rows are visual tokens; their columns are lighter.
    """
    total = int(sum(segment_lengths))
    side = max(1, min(MASK_PX, total))
    at = ((np.arange(side) + 0.5) * total / side).astype(np.int64)
    segment = np.searchsorted(np.cumsum(segment_lengths), at, side="right")
    seen = segment[:, None] == segment[None, :]
    if is_causal:
        seen &= at[:, None] >= at[None, :]
    palette = np.array([_colour(c) for c in segment_colours], dtype=np.uint8).reshape(-1, 4)
    pixels = palette[np.broadcast_to(segment[None, :], (side, side))]
    lighter = np.broadcast_to(visual_S[at][None, :], (side, side))
    pixels = np.where(lighter[..., None], _lighter(pixels), pixels)
    pixels = np.where(seen[..., None], pixels, np.uint8(0))
    return _encode(Image.fromarray(pixels, "RGBA"), "PNG", optimize=True)


def _colour(number: int | None) -> tuple[int, int, int, int]:
    if number is None:
        return 140, 140, 140, 90
    red, green, blue = colorsys.hls_to_rgb(hue(number) / 360, 0.55, 0.6)
    return round(red * 255), round(green * 255), round(blue * 255), 255


def _lighter(pixels: np.ndarray) -> np.ndarray:
    faded = pixels.copy()
    faded[..., 3] = (faded[..., 3].astype(np.uint16) * 150 // 255).astype(np.uint8)
    return faded


def grid_frame(image: ImageConfig, width: int, height: int, grid_width: int, grid_height: int) -> Frame:
    """Where a grid of grid_width x grid_height pixels lies over a picture of width x height.

    Stretched over the whole picture, except: `fit: crop` covers the centre only; `fit: pad` and anyres hold the whole picture with
    a margin around it, so that the frame is larger than the picture.
    """
    is_crop = image.policy == "fixed" and image.fit == "crop"
    is_padded = image.policy == "anyres" or (image.policy == "fixed" and image.fit == "pad")
    if not is_crop and not is_padded:
        return Frame(0.0, 0.0, 1.0, 1.0)
    scales = grid_width / width, grid_height / height
    scale = max(scales) if is_crop else min(scales)
    across, down = grid_width / scale / width, grid_height / scale / height
    return Frame((1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2)
