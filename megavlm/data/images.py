"""Opening pictures, and measuring them from their header alone. No torch here: what prepares data starts many processes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, TiffImagePlugin, UnidentifiedImageError, features

MAX_PIXELS = 178_956_970
"""More are refused by the header, before memory is taken for them. Pillow's own limit for decompression bombs: half a GiB of RGB."""
MAX_SIDE_PX = 65_535
"""Longest side; JPEG has no longer. A line of pixels a million long would be a bomb to anything that makes it square."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is read (JPEG with MPO). Pillow's other plugins are for formats nobody trains on, and some start a program (EPS: Ghostscript)."""
_EXIF_ORIENTATION = 0x0112
_PNG_EXIF_MARKS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type")
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
_NAMES = {
    "heic": "a HEIC picture",
    "jxl": "a JPEG XL picture",
    "svg": "an SVG drawing",
    "pdf": "a PDF document",
    "html": "a web page, not a picture",
    "eps": "an EPS drawing",
    "psd": "a Photoshop document",
}


# Pillow warns at half of MAX_PIXELS, and of every odd tag in a TIFF or EXIF block: at the scale of the web that is noise without end.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class ImageError(ValueError):
    """A picture that cannot be read."""


def reason(error: Exception, data: bytes = b"") -> str:
    """Why Pillow failed, without the object address in its message, so that logs of two runs compare equal."""
    if isinstance(error, UnidentifiedImageError):
        if not data:
            return "the file is empty"
        for codec, magic in (("webp", b"RIFF"), ("avif", b"ftypavi")):
            if magic in data[:12] and not features.check(codec):
                return f"perhaps a {codec.upper()} picture, which this Pillow was built without: install a Pillow wheel"
        if name := _NAMES.get(_foreign(data)):
            return f"{name}: convert it to JPEG, PNG or WebP"
        return "not a picture of a known format, or its header is damaged"
    return str(error) if isinstance(error, ImageError) else f"{type(error).__name__}: {error}"


def _foreign(data: bytes) -> str:
    """Which known format that is not read these bytes have; "" for none."""
    head = data[:512].lstrip().lower()
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return "heic"
    if data[:2] == b"\xff\x0a" or data[:12] == b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a":
        return "jxl"
    if head.startswith(b"<svg") or (head.startswith(b"<?xml") and b"<svg" in head):
        return "svg"
    if head.startswith((b"<!doctype", b"<html", b"<head", b"<body")):
        return "html"
    return {b"%pdf": "pdf", b"%!ps": "eps", b"8bps": "psd"}.get(head[:4], "")


@contextmanager
def open_picture(data: bytes) -> Iterator[Image.Image]:
    """Pillow's picture, its header read and its size allowed; whatever goes wrong inside becomes an ImageError with the reason.

    The format comes from the bytes, never from a file's name.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            check_pixels(*picture.size)
            yield picture
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {MAX_PIXELS} pixels: refused before memory is taken for them") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, zlib.error, EOFError, MemoryError, ...
        raise ImageError(reason(error, data)) from error


def check_pixels(width: int, height: int) -> None:
    """Raises ImageError for a picture too large to be one, told from its header."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        raise ImageError(
            f"{width}x{height} pixels, more than {MAX_PIXELS} or a side longer than {MAX_SIDE_PX}: refused before memory is taken for them"
        )


@dataclass(frozen=True)
class Measured:
    """What a picture's header says."""

    width: int
    """Pixels after EXIF rotation."""
    height: int
    extension: str
    """Usual file name extension of its format."""


def measure_image(data: bytes) -> Measured:
    """Size and format from the header alone. Raises ImageError for what is not read, by name."""
    with open_picture(data) as picture:
        width, height = picture.size
        name = picture.format or "img"
        # Pillow decodes a whole PNG to see whether orientation comes after the pixels: only where the bytes name some.
        told = name != "PNG" or any(mark in data for mark in _PNG_EXIF_MARKS)
        turned = told and picture.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        if isinstance(picture, TiffImagePlugin.TiffImageFile):  # its size may be turned already (Pillow 11.2 and later): ask the tags
            width, height = int(picture.tag_v2[256]), int(picture.tag_v2[257])
    if turned:
        width, height = height, width
    return Measured(width, height, _EXTENSIONS.get(name, name.lower()))
