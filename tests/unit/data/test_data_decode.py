"""Picture formats: each is right, pixel for pixel, or refused by name; headers that promise too much are refused unread."""

from __future__ import annotations

import gc
import io
import json
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, features

from megavlm.data.decode import NvImageCodecDecoder, PillowDecoder, decoders_here, nvimgcodec_available
from megavlm.data.images import ImageError, measure_image
from megavlm.data.pixels import as_CHW, resize

DECODERS = [PillowDecoder(), *([NvImageCodecDecoder()] if nvimgcodec_available() else [])]
both = pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: d.name)


def picture(width=48, height=32, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))


def encode(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def png(width, height, depth, colour, rows, *chunks):
    """A PNG by hand, for what Pillow cannot write: 16-bit colour, colour keys."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rows_of(values):
    return b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)


@both
def test_cmyk_is_read_by_adobes_convention_with_its_marker_and_without(decoder):
    """Adobe stores CMYK upside down. Files without its marker exist both ways round; Pillow and browsers take them as Adobe's."""
    inks = Image.new("CMYK", (32, 32))
    inks.paste((255, 0, 0, 0), (0, 0, 16, 32))  # cyan
    inks.paste((0, 0, 0, 128), (16, 0, 32, 32))  # half black
    adobe = encode(inks, "JPEG", quality=100)
    marker = adobe.index(b"\xff\xee")
    length = struct.unpack(">H", adobe[marker + 2 : marker + 4])[0]
    assert adobe[marker + 4 : marker + 9] == b"Adobe"
    for data in (adobe, adobe[:marker] + adobe[marker + 2 + length :]):
        got = decoder.decode(data).astype(int)
        assert np.abs(got[:, 2:14] - (0, 255, 255)).max() <= 3
        assert np.abs(got[:, 18:30] - 127).max() <= 3


@both
def test_sixteen_bits_of_grey_and_colour(decoder):
    wide = np.random.default_rng(1).integers(0, 65536, (20, 30, 3))
    grey = wide[..., 0]
    np.testing.assert_allclose(decoder.decode(png(30, 20, 16, 0, rows_of(grey)))[..., 1], grey / 257, atol=0.51)
    np.testing.assert_allclose(decoder.decode(encode(Image.fromarray(grey.astype(np.uint16)), "TIFF"))[..., 2], grey / 257, atol=0.51)
    colour = decoder.decode(png(30, 20, 16, 2, rows_of(wide.reshape(20, 90))))
    np.testing.assert_allclose(colour, wide / 257, atol=1)
    opaque = np.concatenate([wide, np.full((20, 30, 1), 65535)], axis=2).reshape(20, 120)
    np.testing.assert_allclose(decoder.decode(png(30, 20, 16, 6, rows_of(opaque))), wide / 257, atol=1)


@both
def test_a_transparent_key_colour_is_white(decoder):
    grey = np.full((8, 8), 30000)
    grey[2, 3] = 1234
    got = decoder.decode(png(8, 8, 16, 0, rows_of(grey), (b"tRNS", struct.pack(">H", 1234))))
    assert got[2, 3].tolist() == [255] * 3
    assert got[0, 0].tolist() == [round(30000 / 257)] * 3
    eight = np.full((8, 8, 3), 10, dtype=np.uint8)
    eight[5, 6] = (1, 2, 3)
    rows = b"".join(b"\0" + line.tobytes() for line in eight)
    got = decoder.decode(png(8, 8, 8, 2, rows, (b"tRNS", struct.pack(">HHH", 1, 2, 3))))
    assert got[5, 6].tolist() == [255] * 3
    assert got[0, 0].tolist() == [10] * 3


@both
def test_animations_and_pages_give_their_first(decoder):
    first, second = Image.fromarray(picture()), Image.fromarray(picture(seed=9))
    for fmt, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encode(first.quantize(64) if fmt == "GIF" else first, fmt, save_all=True, append_images=[second], **options)
        wanted = np.asarray(first.quantize(64).convert("RGB")) if fmt == "GIF" else picture()
        np.testing.assert_array_equal(decoder.decode(data), wanted, err_msg=fmt)


@both
def test_stereo_jpegs_give_their_first(decoder):
    first, second = Image.fromarray(picture(64, 64)), Image.fromarray(picture(64, 64, seed=9))
    data = encode(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert measure_image(data).extension == "jpg"
    assert np.abs(decoder.decode(data).astype(int) - np.asarray(first)).mean() < 12


@both
@pytest.mark.parametrize("fmt", ["AVIF", "WEBP", "JPEG2000"])
def test_lossy_formats_are_what_pillow_reads(decoder, fmt):
    if not features.check({"JPEG2000": "jpg_2000"}.get(fmt, fmt.lower())):
        pytest.skip(f"this Pillow was built without {fmt}")
    data = encode(Image.fromarray(picture(64, 48)), fmt)
    got, wanted = decoder.decode(data).astype(int), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(got - wanted).max() <= 3
    assert (measure_image(data).width, measure_image(data).height) == (64, 48)


@both
def test_grey_with_alpha_and_lab(decoder):
    grey = Image.new("LA", (16, 16), (100, 0))
    grey.paste((100, 255), (0, 0, 8, 16))
    got = decoder.decode(encode(grey, "PNG"))
    assert got[0, 0].tolist() == [100] * 3
    assert got[0, 12].tolist() == [255] * 3
    red = decoder.decode(encode(Image.new("LAB", (8, 8), (136, 208, 195)), "TIFF"))  # L* 53, a* 80, b* 67
    assert np.abs(red.astype(int) - (255, 0, 0)).max() <= 12


REFUSED = {
    "float": (encode(Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)), "TIFF"), "floating-point pixels have no agreed range"),
    "wide": (encode(Image.fromarray(np.full((8, 8), 70000, dtype=np.int32)), "TIFF"), "integer pixels from 70000 to 70000"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64, "a HEIC picture: convert it"),
    "jxl": (b"\xff\x0a" + b"\0" * 64, "a JPEG XL picture: convert it"),
    "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"></svg>', "an SVG drawing"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "an EPS drawing"),
    "pdf": (b"%PDF-1.7\n", "a PDF document"),
    "html": (b"<!DOCTYPE html><html>404</html>", "a web page"),
    "empty": (b"", "the file is empty"),
    "noise": (b"\x01\x02\x03" * 50, "not a picture of a known format"),
}


@both
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(decoder, name):
    data, words = REFUSED[name]
    with pytest.raises(ImageError, match=words):
        decoder.decode(data)


def bombs():
    """A few hundred bytes each that ask for gigabytes."""
    jpeg = bytearray(encode(Image.fromarray(picture()), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65535, 65535)
    gif = bytearray(encode(Image.fromarray(picture()).quantize(16), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    bmp = bytearray(encode(Image.fromarray(picture()), "BMP"))
    bmp[18:26] = struct.pack("<ii", 100_000, 100_000)
    webp = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (16382).to_bytes(3, "little") * 2
    webp += encode(Image.fromarray(picture()), "WEBP")[12:]
    tiff = bytearray(encode(Image.fromarray(picture()), "TIFF"))
    for tag in (256, 257):
        at = (
            tiff.index(struct.pack("<HHI", tag, 4, 1))
            if struct.pack("<HHI", tag, 4, 1) in tiff
            else tiff.index(struct.pack("<HHI", tag, 3, 1))
        )
        tiff[at : at + 12] = struct.pack("<HHII", tag, 4, 1, 50_000)
    return {
        "png": png(100_000, 100_000, 8, 2, b"\0" * 1000),
        "png of one bit": png(60_000, 60_000, 1, 0, b"\0" * 7501 * 60),
        "png line": png(3_000_000, 4, 8, 2, b"\0" * 1000),
        "jpeg": bytes(jpeg),
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "webp": b"RIFF" + struct.pack("<I", len(webp)) + webp,
        "tiff": bytes(tiff),
        "ppm": b"P6 90000 90000 255\n" + b"\0" * 100,
    }


@both
@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_by_their_header(decoder, name):
    data = bombs()[name]
    for read in (decoder.decode, measure_image):
        with pytest.raises(ImageError, match="refused before memory is taken"):
            read(data)


def test_bombs_take_no_memory():
    """In a process of its own, whose peak is measured: nine bombs of 0.8 to 30 GB."""
    code = f"""
import resource, sys
sys.path.insert(0, {__file__.rsplit("/", 1)[0]!r})
import test_data_decode as here
data = here.bombs()
for decoder in here.DECODERS:
    decoder.decode(here.encode(here.Image.fromarray(here.picture(640, 480)), "JPEG"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for decoder in here.DECODERS:
    for bomb in data.values():
        try:
            decoder.decode(bomb)
        except here.ImageError:
            pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 16, f"{done.stdout} MiB"


def test_measuring_reads_the_header_alone_wherever_orientation_stands():
    """Cut off behind the header, a picture still has its size; a PNG that is turned says so even behind its pixels."""
    for fmt in ("JPEG", "PNG", "BMP", "GIF", "TIFF"):
        data = encode(Image.fromarray(picture(480, 320)).quantize(16) if fmt == "GIF" else Image.fromarray(picture(480, 320)), fmt)
        whole = measure_image(data)
        assert (whole.width, whole.height) == (480, 320)
        if fmt != "TIFF":  # Pillow writes its directory last
            assert measure_image(data[: len(data) // 2]) == whole
    exif = Image.Exif()
    exif[0x0112] = 6
    first = encode(Image.fromarray(picture(480, 320)), "PNG", exif=exif)
    start = first.index(b"eXIf") - 4
    length = 12 + struct.unpack(">I", first[start : start + 4])[0]
    chunk, end = first[start : start + length], first.index(b"IEND") - 4
    last = first[:start] + first[start + length : end] + chunk + first[end:]
    for data in (first, last):
        assert (measure_image(data).width, measure_image(data).height) == (320, 480)
        assert PillowDecoder().decode(data).shape == (480, 320, 3)


@pytest.mark.skipif(not nvimgcodec_available(), reason="nvidia-nvimgcodec is not installed")
def test_what_nvimgcodec_refuses_pillow_decides():
    """A lossless WebP with an EXIF block is one that nvImageCodec gives no pixels for and Pillow reads."""
    decoder, exif = NvImageCodecDecoder(), Image.Exif()
    exif[0x0112] = 1
    image = Image.new("RGB", (640, 480), (255, 255, 255))
    image.paste((10, 10, 250), (5, 5, 21, 21))
    image = image.convert("L")
    data = encode(image, "WEBP", lossless=True, exif=exif)
    assert decoder._codec_pixels(data) is None, "nvImageCodec has learned it: find another file for this test"
    np.testing.assert_array_equal(decoder.decode(data), np.asarray(image.convert("RGB")))
    with pytest.raises(ImageError) as ours:
        decoder.decode(data[:60])
    with pytest.raises(ImageError) as pillows:
        PillowDecoder().decode(data[:60])
    assert str(ours.value) == str(pillows.value)


@pytest.mark.skipif(not nvimgcodec_available(), reason="nvidia-nvimgcodec is not installed")
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), MemoryError()])
def test_a_gpu_without_memory_makes_no_sample_bad(error, monkeypatch):
    class Full:
        def decode(self, data, params):
            raise error

    decoder, data = NvImageCodecDecoder(), encode(Image.fromarray(picture()), "PNG")
    monkeypatch.setattr(decoder, "_codec", lambda: (Full(), None))
    np.testing.assert_array_equal(decoder.decode(data), picture())


@both
def test_threads_share_a_decoder(decoder):
    pictures = [encode(Image.fromarray(picture(160, 160, seed=i)), "PNG") for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for number, pixels in enumerate(pool.map(decoder.decode, pictures * 4)):
            np.testing.assert_array_equal(pixels, picture(160, 160, seed=number % 24))


def test_pixels_outlive_the_picture_and_the_fourth_byte_changes_nothing():
    """Decoded pixels lie in Pillow's own memory, four bytes a pixel; resizing them equals resizing a copy of three."""
    data = encode(Image.fromarray(picture(640, 480)), "PNG")
    kept = [PillowDecoder().decode(data) for _ in range(20)]
    gc.collect()
    for pixels in kept:
        np.testing.assert_array_equal(pixels, picture(640, 480))
        assert pixels.shape == (480, 640, 3)
    assert kept[0].strides == (4 * 640, 4, 1)
    for crop in (kept[0], kept[0][100:300, 50:250]):
        np.testing.assert_array_equal(resize(as_CHW(crop), 100, 77), resize(as_CHW(np.ascontiguousarray(crop)), 100, 77))


def test_large_pictures_which_pillow_keeps_in_pieces():
    large = np.random.default_rng(2).integers(0, 256, (2600, 2400, 3), dtype=np.uint8)
    np.testing.assert_array_equal(PillowDecoder().decode(encode(Image.fromarray(large), "BMP")), large)


def test_doctor_names_each_decoder_and_what_auto_takes(capsys):
    from megavlm.cli._doctor import parts
    from megavlm.cli.doctor import doctor

    reports = {r.name: r for r in decoders_here()}
    assert list(reports) == ["nvImageCodec, GPU", "nvImageCodec, CPU", "Pillow"]
    assert reports["Pillow"].usable
    assert sum("what auto takes" in r.remark for r in reports.values()) == 1
    assert reports["nvImageCodec, CPU"].usable == nvimgcodec_available()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PARTS", [])
        doctor(as_json=True, ranks=False)
        assert json.loads(capsys.readouterr().out)["decoders"][2]["name"] == "Pillow"
        doctor(as_json=False, ranks=False)
        assert "nvImageCodec, CPU" in capsys.readouterr().out
