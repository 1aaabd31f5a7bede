"""Picture decoders behind one interface: encoded bytes in, uint8 RGB of the upright picture out.

Pillow reads everything, on the CPU. nvImageCodec is taken for the formats where it gives the same pixels and can use a GPU; the rest
(16 bits, palettes, CMYK, transparency, GIF) goes through Pillow either way, so that both decoders agree on what a picture is.
Nothing here holds order or state: the plan feeds it.
"""

from __future__ import annotations

import io
import logging
import threading
from abc import ABC, abstractmethod
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
import torch.utils.dlpack
from PIL import Image, ImageOps, features

from megavlm.data.images import ImageError, open_picture

log = logging.getLogger(__name__)
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
        with open_picture(data) as picture:
            return pixels_of(to_rgb(picture))


def pixels_of(rgb: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of a loaded RGB picture, on Pillow's own memory (4 bytes a pixel) where that is in one piece.

    Copying 1.2 megapixels out costs a tenth of decoding them.
    """
    try:
        exported = pa.array(rgb)
    except ValueError:  # Pillow keeps pictures above some 4 megapixels in several pieces
        return np.array(rgb)
    return torch.utils.dlpack.from_dlpack(exported.flatten()).numpy().reshape(rgb.height, rgb.width, 4)[..., :3]


_TO_8_BITS = ((np.arange(65536, dtype=np.uint32) + 128) // 257).astype(np.uint8)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Upright 8-bit RGB of any Pillow picture; transparency is laid over white, as Hugging Face's convert_to_rgb does.

    16-bit grey is scaled; of 16-bit RGB Pillow takes the upper 8 bits, at most one level less. Colour profiles are not applied.
    """
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I;16") or picture.mode == "I":
        return _from_16_bits(picture)
    if picture.mode == "F":
        raise ImageError("floating-point pixels have no agreed range: convert the picture to 8 or 16 bits")
    if "A" in picture.getbands() or "a" in picture.getbands() or picture.info.get("transparency") is not None:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    if picture.mode == "RGB":
        picture.load()
        return picture
    return picture.convert("RGB")


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """Pillow's own conversion clips at 255 and turns 16-bit pictures white."""
    wide = np.asarray(picture)
    if wide.min() < 0 or wide.max() > 65535:
        raise ImageError(f"integer pixels from {wide.min()} to {wide.max()}, expected 0 to 65535")
    grey = _TO_8_BITS[wide]
    if isinstance(clear := picture.info.get("transparency"), int):
        grey[wide == clear] = 255
    return Image.fromarray(grey).convert("RGB")


class NvImageCodecDecoder(ImageDecoder):
    """NVIDIA nvImageCodec; one codec per thread. `device_id` None: on the CPU.

    The header is always read by Pillow first, and what nvImageCodec does not decode (an uncommon file, or for want of GPU memory just
    then) goes through Pillow too. So Pillow alone says what can be read: all ranks agree, whatever decoder each has, and nothing
    transient makes a sample bad.

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
        with open_picture(data) as header:
            array = self._codec_pixels(data) if _is_plain(header, data) else None
            return pixels_of(to_rgb(header)) if array is None else array

    def _codec_pixels(self, data: bytes) -> np.ndarray | None:
        """nvImageCodec's pixels; None where it gives none, or none of the kind that was asked for."""
        decoder, params = self._codec()
        try:
            picture = decoder.decode(data, params=params)
            array = None if picture is None else np.asarray(picture.cpu())
        except (RuntimeError, MemoryError) as error:
            log.debug("nvImageCodec: %s; Pillow decodes it", error)
            return None
        if array is None or array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            return None
        return array


def _is_plain(picture: Image.Image, data: bytes) -> bool:
    """8-bit grey or RGB of a common format, told from the header."""
    if picture.format == "PNG" and data[24] == 16:  # bits a channel; Pillow calls 16-bit RGB simply RGB
        return False
    return picture.format in _PLAIN_FORMATS and picture.mode in ("RGB", "L") and "transparency" not in picture.info


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


class DecoderReport(NamedTuple):
    """What one decoder can do on this machine."""

    name: str
    usable: bool
    remark: str


def decoders_here() -> list[DecoderReport]:
    """Every decoder, tried on a small picture, and which one data.image.decoder=auto takes. For `megavlm doctor`."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(file, "JPEG")
    has_gpu = torch.cuda.is_available()
    chosen = make_decoder("auto", "cuda" if has_gpu else "cpu")
    reports = []
    for name, setting, device in (
        ("nvImageCodec, GPU", "nvimgcodec", 0),
        ("nvImageCodec, CPU", "nvimgcodec", None),
        ("Pillow", "pillow", None),
    ):
        if setting == "nvimgcodec" and not nvimgcodec_available():
            reports.append(DecoderReport(name, False, "nvidia-nvimgcodec is not installed"))
            continue
        if device is not None and not has_gpu:
            reports.append(DecoderReport(name, False, "no GPU can be used"))
            continue
        try:
            decoder = PillowDecoder() if setting == "pillow" else NvImageCodecDecoder(device)
            decoder.decode(file.getvalue())
        except Exception as error:  # whatever a broken library raises: that is what is to be reported
            reports.append(DecoderReport(name, False, f"{type(error).__name__}: {error}"))
            continue
        taken = chosen.name == setting and (setting == "pillow" or device is not None)
        remarks = [f"data.image.decoder={setting}" + (", and what auto takes" if taken else "")]
        if setting == "pillow":
            lacking = [codec for codec in ("webp", "avif", "jpg_2000") if not features.check(codec)]
            remarks.append("cannot read " + ", ".join(lacking) if lacking else "reads every format")
        reports.append(DecoderReport(name, True, "; ".join(remarks)))
    return reports
