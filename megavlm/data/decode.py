"""Picture decoders behind one interface: encoded bytes in, uint8 RGB of the upright picture out.

Pillow reads everything. nvImageCodec is taken for the formats where it gives the same pixels and can use a GPU; the rest
(16 bits, palettes, CMYK, transparency, GIF) goes through Pillow either way, so that both decoders agree on what a picture is.
Nothing here holds order or state: the plan feeds it.
"""

from __future__ import annotations

import io
import threading
import warnings
from abc import ABC, abstractmethod
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, features

from megavlm.data.images import ImageError, reason

_PLAIN_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_CPU_DEVICE = -99999  # NVIMGCODEC_DEVICE_CPU_ONLY


class ImageDecoder(ABC):
    """Decodes one picture. Thread-safe."""

    name: str

    @abstractmethod
    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (H, W, 3). Rotated as EXIF says; first frame; transparency over white; 16 bits scaled to 8.

        Raises:
            ImageError: broken or unknown data, with the reason.
        """


class PillowDecoder(ImageDecoder):
    """Pillow on the calling thread."""

    name = "pillow"

    def decode(self, data: bytes) -> np.ndarray:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data)) as picture:
                    return np.asarray(to_rgb(picture))
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, zlib.error, ...
            if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and not features.check("webp"):
                raise ImageError("a WebP picture, and this Pillow was built without WebP: install a Pillow wheel") from error
            raise ImageError(reason(error)) from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Upright 8-bit RGB of any Pillow picture; transparency is laid over white, as Hugging Face's convert_to_rgb does."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # Pillow's own conversion clips at 255 and turns 16-bit pictures white.
        wide = np.asarray(picture)
        if wide.min() < 0 or wide.max() > 65535:
            raise ImageError(f"integer pixels from {wide.min()} to {wide.max()}, expected 0 to 65535")
        return Image.fromarray((wide.astype(np.float64) / 257.0 + 0.5).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ImageError("floating-point pixels have no agreed range: convert the picture to 8 or 16 bits")
    if "A" in picture.getbands() or "a" in picture.getbands() or picture.info.get("transparency") is not None:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return picture.convert("RGB")


class NvImageCodecDecoder(ImageDecoder):
    """NVIDIA nvImageCodec; one codec per thread. `device_id` None: on the CPU.

    Raises:
        ImageError: nvImageCodec is not installed.
    """

    name = "nvimgcodec"

    def __init__(self, device_id: int | None = None) -> None:
        if not nvimgcodec_available():
            raise ImageError(
                "data.image.decoder=nvimgcodec, but nvidia-nvimgcodec is not installed: install nvidia-dali-cuda130, or use pillow"
            )
        self.device_id = device_id
        self._local = threading.local()
        self._pillow = PillowDecoder()

    def _codec(self) -> tuple[Any, Any]:
        if not hasattr(self._local, "codec"):
            from nvidia import nvimgcodec

            backends = [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)] if self.device_id is None else None
            device = _CPU_DEVICE if self.device_id is None else self.device_id
            decoder = nvimgcodec.Decoder(device_id=device, max_num_cpu_threads=1, backends=backends)
            self._local.codec = decoder, nvimgcodec.DecodeParams(apply_exif_orientation=True, color_spec=nvimgcodec.ColorSpec.SRGB)
        codec: tuple[Any, Any] = self._local.codec
        return codec

    def decode(self, data: bytes) -> np.ndarray:
        if not _is_plain(data):
            return self._pillow.decode(data)
        decoder, params = self._codec()
        picture = decoder.decode(data, params=params)
        if picture is None:
            raise ImageError("nvImageCodec could not decode it")
        array = np.asarray(picture.cpu())
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ImageError(f"nvImageCodec gave {array.dtype} {array.shape}, expected uint8 (H, W, 3)")
        return array


def _is_plain(data: bytes) -> bool:
    """8-bit grey or RGB of a common format, told from the header."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.format in _PLAIN_FORMATS and picture.mode in ("RGB", "L") and "transparency" not in picture.info
    except Exception:  # not even a header: let Pillow say why
        return False


@lru_cache(maxsize=1)
def nvimgcodec_available() -> bool:
    """Whether nvImageCodec is installed."""
    try:
        return find_spec("nvidia.nvimgcodec") is not None
    except ModuleNotFoundError:
        return False


def make_decoder(name: Literal["auto", "pillow", "nvimgcodec"], device: torch.device | str = "cpu") -> ImageDecoder:
    """Decoder of recipe.data.image.decoder. auto: nvImageCodec on a GPU where there is one, else Pillow.

    Raises:
        ImageError: nvimgcodec was asked for and is not installed.
    """
    where = torch.device(device)
    device_id = (where.index or 0) if where.type == "cuda" else None
    if name == "nvimgcodec" or (name == "auto" and device_id is not None and nvimgcodec_available()):
        return NvImageCodecDecoder(device_id)
    return PillowDecoder()
