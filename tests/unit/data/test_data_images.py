"""Pictures: decoders agree with Pillow's pixels, resizing with Hugging Face's, tiles with InternVL's grid."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, features

from megavlm.config.schema import ImageConfig
from megavlm.data.decode import NvImageCodecDecoder, PillowDecoder, make_decoder, nvimgcodec_available
from megavlm.data.images import ImageError, measure_image
from megavlm.data.pixels import TileGrid, cut_tiles, tile_grid

ONE_TILE = TileGrid(1, 1, False)
needs_nvimgcodec = pytest.mark.skipif(not nvimgcodec_available(), reason="nvidia-nvimgcodec is not installed")


def picture(width=48, height=32, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))


def encode(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def hf_pixels(pixels, size):
    """The uint8 picture that Hugging Face's CLIP processor makes, as (3, size, size) floats."""
    from transformers import CLIPImageProcessorPil

    side = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(size=side, crop_size=side, do_normalize=False, do_rescale=False)
    return np.asarray(processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0], dtype=np.float64)


def test_right_size_is_untouched_bit_for_bit():
    pixels = np.random.default_rng(1).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    tile = cut_tiles(pixels, ONE_TILE, 336)
    np.testing.assert_array_equal(tile[0].permute(1, 2, 0).numpy(), pixels)
    np.testing.assert_array_equal(tile[0].numpy(), hf_pixels(pixels, 336))


@pytest.mark.parametrize(("width", "height", "size"), [(640, 480, 224), (100, 77, 64), (33, 47, 112), (500, 40, 64)])
def test_resized_pictures_are_within_two_levels_of_hugging_face(width, height, size):
    pixels = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    difference = np.abs(cut_tiles(pixels, ONE_TILE, size)[0].numpy() - hf_pixels(pixels, size))
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02


def intern_vl_grid(width, height, max_num, size):
    """InternVL's dynamic_preprocess, re-told: all ratios up to max_num, nearest aspect, larger on ties when the area allows."""
    ratios = {(i, j) for n in range(1, max_num + 1) for i in range(1, n + 1) for j in range(1, n + 1) if 1 <= i * j <= max_num}
    best, best_difference = (1, 1), float("inf")
    for ratio in sorted(ratios, key=lambda r: (r[0] * r[1], r)):
        difference = abs(width / height - ratio[0] / ratio[1])
        if difference < best_difference:
            best, best_difference = ratio, difference
        elif difference == best_difference and width * height > 0.5 * size * size * ratio[0] * ratio[1]:
            best = ratio
    return best


def test_grid_is_intern_vls():
    rng = np.random.default_rng(3)
    for _ in range(300):
        width, height = (int(v) for v in rng.integers(10, 2000, 2))
        most = int(rng.integers(2, 13))
        grid = tile_grid(width, height, ImageConfig(policy="tiles", max_tiles=most, thumbnail=True), 448)
        assert (grid.cols, grid.rows) == intern_vl_grid(width, height, most, 448)
        assert grid.num_tiles == grid.cols * grid.rows + (grid.cols * grid.rows > 1)
    assert tile_grid(640, 480, ImageConfig(policy="tiles", max_tiles=12, thumbnail=True), 448).num_tiles == 13
    assert tile_grid(640, 480, ImageConfig(policy="tiles", thumbnail=True), 448) == ONE_TILE


def test_tiles_come_row_by_row_and_the_thumbnail_last():
    pixels = np.zeros((32, 48, 3), dtype=np.uint8)
    for row in range(2):
        for col in range(3):
            pixels[16 * row : 16 * row + 16, 16 * col : 16 * col + 16] = 10 * (3 * row + col)
    tiles = cut_tiles(pixels, TileGrid(3, 2, True), 16)
    assert tiles.shape == (7, 3, 16, 16)
    assert tiles.dtype == torch.uint8
    assert [int(t.float().mean()) for t in tiles[:6]] == [0, 10, 20, 30, 40, 50]
    assert abs(tiles[6].float().mean() - 25) < 1


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def gradient16():
    return np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)


def rgba():
    image = Image.fromarray(picture()).convert("RGBA")
    image.putalpha(Image.fromarray((np.arange(32 * 48).reshape(32, 48) % 256).astype(np.uint8)))
    return image


def plain(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_and_measured(orientation, fmt):
    if fmt in ("WEBP", "AVIF") and not features.check(fmt.lower()):
        pytest.skip(f"this Pillow was built without {fmt}")
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100, "speed": 10}}.get(fmt, {})
    data = encode(Image.fromarray(picture(seed=5)), fmt, exif=exif(orientation), **options)
    turned = {1: 0, 2: "lr", 3: 2, 4: "ud", 5: "t", 6: -1, 7: "a", 8: 1}[orientation]
    raw = picture(seed=5)
    by_name = {"lr": raw[:, ::-1], "ud": raw[::-1], "t": raw.transpose(1, 0, 2), "a": np.rot90(raw, 2).transpose(1, 0, 2)}
    wanted = by_name[turned] if isinstance(turned, str) else np.rot90(raw, turned)
    got = PillowDecoder().decode(data)
    assert got.shape == wanted.shape
    assert np.abs(got.astype(int) - wanted).mean() <= {"JPEG": 2, "AVIF": 10}.get(fmt, 0)
    measured = measure_image(data)
    assert (measured.height, measured.width) == got.shape[:2]


def test_transparency_is_laid_over_white_as_hugging_face_does():
    from transformers.image_transforms import convert_to_rgb

    image = rgba()
    palette = image.convert("RGB").quantize(8)
    palette.info["transparency"] = 3
    for data in (
        encode(image, "PNG"),
        encode(image, "WEBP", lossless=True),
        encode(palette, "PNG", transparency=3),
        encode(image.convert("LA"), "PNG"),
    ):
        theirs = convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
        np.testing.assert_array_equal(PillowDecoder().decode(data), theirs)


def test_sixteen_bits_are_scaled_not_clipped():
    got = PillowDecoder().decode(encode(Image.fromarray(gradient16()), "PNG"))
    assert got.shape == (48, 64, 3)
    np.testing.assert_allclose(got[..., 0], gradient16() / 257, atol=0.51)


def test_palette_cmyk_grey_one_bit_gif_webp_and_bmp_are_read():
    image = Image.fromarray(picture())
    second = Image.fromarray(picture(seed=9))
    cases = {
        "palette": encode(image.quantize(16), "PNG"),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "grey": encode(image.convert("L"), "JPEG"),
        "bits": encode(image.convert("1"), "PNG"),
        "webp": encode(image, "WEBP", lossless=True),
        "bmp": encode(image, "BMP"),
        "tiff": encode(image, "TIFF"),
    }
    for name, data in cases.items():
        np.testing.assert_array_equal(PillowDecoder().decode(data), plain(data), err_msg=name)
    gif = encode(image.quantize(64), "GIF", save_all=True, append_images=[second.quantize(64)])
    first = PillowDecoder().decode(gif)
    assert np.abs(first.astype(int) - picture().astype(int)).mean() < 20 < np.abs(first.astype(int) - picture(seed=9).astype(int)).mean()


BROKEN = {
    "empty": b"",
    "noise": b"\x00" * 100,
    "cut jpeg": encode(Image.fromarray(picture(480, 320)), "JPEG")[:2000],
    "cut png": encode(Image.fromarray(picture(480, 320)), "PNG")[:200],
    "cut webp": encode(Image.fromarray(picture(480, 320)), "WEBP")[:200],
    "cut gif": encode(Image.fromarray(picture(480, 320)), "GIF")[:300],
    "html": b"<html>404</html>",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_raise_image_error_and_nothing_else(name):
    with pytest.raises(ImageError):
        PillowDecoder().decode(BROKEN[name])


@needs_nvimgcodec
@pytest.mark.parametrize("name", BROKEN)
def test_nvimgcodec_refuses_the_same_broken_pictures(name):
    with pytest.raises(ImageError):
        NvImageCodecDecoder().decode(BROKEN[name])


@needs_nvimgcodec
def test_both_decoders_give_the_same_pixels():
    image = Image.fromarray(picture())
    cases = {
        "png": encode(image, "PNG"),
        "turned png": encode(image, "PNG", exif=exif(6)),
        "grey": encode(image.convert("L"), "PNG"),
        "palette": encode(image.quantize(16), "PNG"),
        "sixteen": encode(Image.fromarray(gradient16()), "PNG"),
        "rgba": encode(rgba(), "PNG"),
        "webp": encode(image, "WEBP", lossless=True),
        "turned webp": encode(image, "WEBP", lossless=True, exif=exif(8)),
        "gif": encode(image, "GIF"),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
    }
    ours, theirs = PillowDecoder(), NvImageCodecDecoder()
    for name, data in cases.items():
        np.testing.assert_array_equal(theirs.decode(data), ours.decode(data), err_msg=name)
    jpeg = encode(Image.fromarray(picture(480, 320)), "JPEG", quality=90, exif=exif(6))
    assert np.abs(theirs.decode(jpeg).astype(int) - ours.decode(jpeg)).max() <= 4


def test_decoder_choice():
    assert make_decoder("auto").name == "pillow"
    assert make_decoder("pillow", "cuda").name == "pillow"
    if nvimgcodec_available():
        assert make_decoder("nvimgcodec").name == "nvimgcodec"
        assert make_decoder("auto", "cuda:0").name == "nvimgcodec"
