"""Resizing policies against the processors of their Hugging Face families: same tiles, same tokens, pixels within two levels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.pixels import as_CHW, resize, tile_grid
from megavlm.data.resizing import ResizingError, make_resizing
from megavlm.planner.flops import VisionWork

SIZES = [(1, 1), (1, 2000), (2000, 1), (5000, 30), (30, 5000), (13, 17), (4000, 3000), (640, 480), (480, 640), (333, 1000), (1023, 1024)]
PINPOINTS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
RAW = {"do_normalize": False, "do_rescale": False}


@pytest.fixture(autouse=True)
def lines_first(monkeypatch):
    """Pillow 13 resizes columns before lines where that is less work, and rounds in between. Models were trained on lines first, which
    is what Pillow up to 12 and torchvision do: so do the oracles here, with Pillow's own two passes."""
    whole = Image.Image.resize

    def resize(self, size, resample=None, box=None, reducing_gap=None):
        if box is not None:
            return whole(self, size, resample, box)
        return whole(whole(self, (size[0], self.height), resample), size, resample)

    monkeypatch.setattr(Image.Image, "resize", resize)


def model(side=336, patch=14, shuffle=1, newline=False):
    vision = {"image_size_px": side, "patch_size_px": patch}
    return ModelConfig.model_validate({"vision": vision, "projector": {"pixel_shuffle": shuffle, "image_newline": newline}})


def noise(width, height):
    return np.random.default_rng(width * 7919 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tiles_of(resizing, pixels):
    grid = resizing.grid(pixels.shape[1], pixels.shape[0])
    return grid, resizing.cut(pixels, grid).numpy().astype(np.int64)


def assert_close(ours, theirs, what):
    """At most 2 of 256 levels anywhere (torch's antialiased bicubic against Pillow's), and few pixels at all."""
    theirs = np.rint(np.asarray(theirs, dtype=np.float64)).astype(np.int64)
    assert ours.shape == theirs.shape, what
    difference = np.abs(ours - theirs)
    message = f"{what}: at most {difference.max()} levels, {(difference > 0).mean():.2%} of the pixels differ"
    assert difference.max() <= 2, message
    assert (difference > 0).mean() < 0.02, message


def test_on_photos_the_order_of_passes_changes_little(monkeypatch):
    """What a Hugging Face processor on Pillow 13, with its own order, makes of real photographs."""
    from sklearn.datasets import load_sample_image

    monkeypatch.undo()
    worst, share = 0, 0.0
    for name in ("china.jpg", "flower.jpg"):
        photo = load_sample_image(name)
        for down, across in ((420, 644), (336, 336), (200, 600), (64, 900), (900, 700)):
            ours = resize(as_CHW(photo), down, across).permute(1, 2, 0).numpy().astype(np.int64)
            theirs = np.asarray(Image.fromarray(photo).resize((across, down), Image.Resampling.BICUBIC)).astype(np.int64)
            difference = np.abs(ours - theirs)
            worst, share = max(worst, int(difference.max())), max(share, float((difference > 2).mean()))
    message = f"at most {worst} levels; {share:.3%} of a photo's values differ by more than 2"
    assert worst <= 8, message
    assert share < 0.001, message


# ------------------------------------------------------------------------------------------------------------- fixed


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crop_is_clips(size):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **RAW)
    pixels = noise(*size)
    grid, ours = tiles_of(make_resizing(ImageConfig(fit="crop"), model(side=32, patch=8)), pixels)
    assert (grid.cols, grid.rows, grid.tokens, grid.work) == (1, 1, 16, VisionWork.uniform(1, 16))
    assert_close(ours, processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"], f"crop {size}")


@pytest.mark.parametrize("size", [*SIZES, (2100, 2110)], ids=str)
def test_pad_is_llavas(size):
    from transformers import LlavaImageProcessorPil

    side = {"height": 112, "width": 112}
    processor = LlavaImageProcessorPil(do_pad=True, size=side, crop_size=side, **RAW)
    pixels = noise(*size)
    _, ours = tiles_of(make_resizing(ImageConfig(fit="pad"), model(side=112)), pixels)
    assert_close(ours, processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"], f"pad {size}")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stretch_is_siglips(size):
    from transformers import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size={"height": 112, "width": 112}, resample=Image.Resampling.BICUBIC, **RAW)
    pixels = noise(*size)
    _, ours = tiles_of(make_resizing(ImageConfig(fit="stretch"), model(side=112)), pixels)
    assert_close(ours, processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"], f"stretch {size}")


def test_a_picture_one_pixel_wide_costs_no_memory():
    """Resized as a whole before it is cropped or padded, this one would take 88 MB and 13 GB."""
    line = noise(1, 65_535)
    for fit in ("crop", "pad", "stretch"):
        _, tile = tiles_of(make_resizing(ImageConfig(fit=fit), model(side=112)), line)
        assert tile.shape == (1, 3, 112, 112)


# ------------------------------------------------------------------------------------------------------------- tiles


def internvl_grid(width, height, min_num, max_num, size):
    """find_closest_aspect_ratio and dynamic_preprocess of InternVL's model cards, re-told: a set of ratios, sorted by area."""
    ratios = {(i, j) for n in range(min_num, max_num + 1) for i in range(1, n + 1) for j in range(1, n + 1) if min_num <= i * j <= max_num}
    best, best_difference = (1, 1), float("inf")
    for ratio in sorted(ratios, key=lambda r: r[0] * r[1]):
        difference = abs(width / height - ratio[0] / ratio[1])
        if difference < best_difference:
            best, best_difference = ratio, difference
        elif difference == best_difference and width * height > 0.5 * size * size * ratio[0] * ratio[1]:
            best = ratio
    return best


def test_grids_are_internvls_on_every_shape_and_on_ties():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    rng = np.random.default_rng(3)
    sizes = [(int(w), int(h)) for w, h in rng.integers(1, 3000, (400, 2))]
    # Every aspect ratio half way between two grids' is a tie; so are all whole ones, between grids of one shape and several sizes.
    sizes += [(a * s, b * s) for a in range(1, 9) for b in range(1, 9) for s in (10, 150, 700)]
    for limits in ((1, 12), (1, 6), (4, 4), (2, 9), (12, 12), (1, 2), (6, 40)):
        image = ImageConfig(policy="tiles", min_tiles=limits[0], max_tiles=limits[1])
        for width, height in sizes:
            ours = tile_grid(width, height, image, 448)
            assert (ours.cols, ours.rows) == get_optimal_tiled_canvas((height, width), (448, 448), *limits), (width, height, limits)


def test_only_ties_between_grids_of_as_many_tiles_differ_from_the_published_code():
    """There InternVL's choice hangs on the order of a Python set; Hugging Face's, which is ours, on a list."""
    rng = np.random.default_rng(4)
    for limits in ((1, 12), (1, 6), (2, 9), (4, 4)):
        image = ImageConfig(policy="tiles", min_tiles=limits[0], max_tiles=limits[1])
        for width, height in rng.integers(1, 60, (400, 2)) * 25:
            ours, theirs = tile_grid(int(width), int(height), image, 448), internvl_grid(width, height, *limits, 448)
            if (ours.cols, ours.rows) != theirs:
                aspect = width / height
                assert abs(aspect - ours.cols / ours.rows) == abs(aspect - theirs[0] / theirs[1])
                assert ours.cols * ours.rows == theirs[0] * theirs[1]


@pytest.mark.parametrize("limits", [(1, 12), (3, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_and_thumbnail_are_internvls(size, limits):
    from transformers import GotOcr2ImageProcessorPil

    side = {"height": 56, "width": 56}
    processor = GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, min_patches=limits[0], max_patches=limits[1], **RAW)
    pixels = noise(*size)
    theirs = processor(Image.fromarray(pixels), return_tensors="np")
    tiled = {"policy": "tiles", "min_tiles": limits[0], "max_tiles": limits[1], "thumbnail": True}
    grid, ours = tiles_of(make_resizing(ImageConfig.model_validate(tiled), model(side=56, shuffle=2)), pixels)
    assert [grid.work.tiles] == list(theirs["num_patches"])
    assert grid.tokens == grid.work.tiles * 4
    assert grid.work == VisionWork.uniform(len(ours), 16)
    assert_close(ours, theirs["pixel_values"], f"tiles {size} {limits}")


# ------------------------------------------------------------------------------------------------------------- anyres


@pytest.fixture(scope="module")
def llava_next():
    from transformers import LlavaNextImageProcessorPil

    pinpoints = [[56 * rows, 56 * cols] for rows, cols in PINPOINTS]
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    return LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, do_pad=False, **size, **RAW)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_anyres_tiles_are_llava_nexts(size, llava_next):
    pixels = noise(*size)
    theirs = llava_next(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    grid, ours = tiles_of(make_resizing(ImageConfig(policy="anyres"), model(side=56)), pixels)
    assert grid.work == VisionWork.uniform(len(theirs), 16)
    assert_close(ours, theirs, f"anyres {size}")


def their_rows(image_processor, size, newline):
    """What LlavaNextModel does to features that hold their own row's number; -1 is the newline's."""
    from transformers import LlavaNextModel
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    pinpoints, sizes = image_processor.image_grid_pinpoints, torch.tensor([size[::-1]])
    tiles = image_size_to_num_patches(sizes[0], pinpoints, 56)
    features = torch.arange(tiles * 16, dtype=torch.float64).view(tiles, 16, 1)
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=56, patch_size=14), image_grid_pinpoints=pinpoints)
    end = torch.tensor([-1.0], dtype=torch.float64) if newline else None
    packed, lengths = LlavaNextModel.pack_image_features(SimpleNamespace(config=config), [features], sizes, "default", end)
    assert int(lengths[0]) == len(packed[0])
    return packed[0][:, 0].to(torch.int64).numpy()


def their_count(image_processor, size):
    from transformers import LlavaNextProcessor

    processor = SimpleNamespace(image_processor=image_processor, patch_size=14, num_additional_image_tokens=0)
    processor._get_unpadded_features = lambda *numbers: LlavaNextProcessor._get_unpadded_features(processor, *numbers)
    return LlavaNextProcessor._get_number_of_features(processor, size[1], size[0], 56, 56)


def test_anyres_tokens_and_their_order_are_llava_nexts(llava_next):
    rng = np.random.default_rng(5)
    sizes = SIZES + [(int(w), int(h)) for w, h in rng.integers(1, 1500, (150, 2))]
    with_newline, without = (make_resizing(ImageConfig(policy="anyres"), model(side=56, newline=n)) for n in (True, False))
    for size in sizes:
        grid = with_newline.grid(*size)
        rows = with_newline.feature_rows(grid, *size)
        np.testing.assert_array_equal(rows, their_rows(llava_next, size, True), err_msg=str(size))
        assert grid.tokens == len(rows) == their_count(llava_next, size), size
        grid = without.grid(*size)
        rows = without.feature_rows(grid, *size)
        np.testing.assert_array_equal(rows, their_rows(llava_next, size, False), err_msg=str(size))
        assert grid.tokens == len(rows), size


def test_anyres_without_room_for_a_grid_is_the_whole_picture_alone():
    from transformers import LlavaNextModel

    resizing = make_resizing(ImageConfig(policy="anyres"), model(side=56, newline=True))
    grid = resizing.grid(640, 480, 17)
    assert (grid.tokens, grid.thumbnail, grid.work) == (17, False, VisionWork.uniform(1, 16))
    feature = torch.arange(16, dtype=torch.float64).view(1, 16, 1)
    packed, _ = LlavaNextModel.pack_image_features(None, [feature], [(480, 640)], "default", torch.tensor([-1.0], dtype=torch.float64))
    assert resizing.feature_rows(grid, 640, 480).tolist() == packed[0][:, 0].long().tolist()
    tiles, first = resizing.cut(noise(640, 480), grid), resizing.cut(noise(640, 480), resizing.grid(640, 480))[:1]
    assert torch.equal(tiles, first)


def test_anyres_refuses_a_kept_class_token_by_name():
    kept = ModelConfig.model_validate({"vision": {"class_token": True, "keep_class_token": True}})
    for policy in ("anyres", "native"):
        with pytest.raises(ResizingError, match="keep_class_token=false"):
            make_resizing(ImageConfig(policy=policy), kept)


# ------------------------------------------------------------------------------------------------------------- native


def qwen(**size):
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28, **size})


def unpatchify(values, rows, cols):
    """(3, H, W) of Qwen2-VL's rows of pixels, of which it makes two equal frames."""
    frames = values.reshape(rows // 2, cols // 2, 2, 2, 3, 2, 14, 14)
    np.testing.assert_array_equal(frames[..., 0, :, :], frames[..., 1, :, :])
    return frames[..., 0, :, :].transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * 14, cols * 14)


@pytest.mark.parametrize("size", [s for s in SIZES if max(s) <= 200 * min(s)], ids=str)
def test_native_pixels_are_qwens_after_normalising(size):
    processor, pixels = qwen(longest_edge=1280 * 28 * 28), noise(*size)
    theirs = processor(Image.fromarray(pixels), return_tensors="np")
    resizing = make_resizing(ImageConfig(policy="native"), model(shuffle=2))
    grid = resizing.grid(*size, 1280)
    flat = resizing.cut(pixels, grid)
    assert [[1, grid.rows, grid.cols]] == theirs["image_grid_thw"].tolist()
    assert grid.tokens * 4 == len(theirs["pixel_values"]) == grid.work.patches
    assert flat.shape == resizing.grey(grid).shape == (3 * grid.rows * grid.cols * 14**2,)
    mean, std = (np.array(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    ours = flat.view(3, grid.rows * 14, grid.cols * 14).numpy().astype(np.int64)
    assert_close(ours, (unpatchify(theirs["pixel_values"], grid.rows, grid.cols) * std + mean) * 255, f"native {size}")


def test_native_sizes_are_smart_resizes():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(6)
    sizes = SIZES + [(int(w), int(h)) for w, h in np.exp(rng.uniform(0, 9, (600, 2))).astype(int)]
    over = 0
    for least, most in ((4, None), (4, 1280), (256, 400), (1, 1), (64, 64)):
        image = ImageConfig(policy="native", min_tokens_per_image=least, max_tokens_per_image=most)
        resizing, cap = make_resizing(image, model(shuffle=2)), most or 16384
        for width, height in sizes:
            try:
                down, across = smart_resize(height, width, 28, least * 28**2, cap * 28**2)
            except ValueError:
                with pytest.raises(ResizingError, match=f"{width}x{height} pixels is more than 200 times"):
                    resizing.grid(width, height, most)
                continue
            grid = resizing.grid(width, height, most)
            assert grid.tokens == grid.rows * grid.cols // 4
            if down * across <= cap * 28**2:
                assert (grid.rows * 14, grid.cols * 14) == (down, across), (width, height, least, most)
            else:  # smart_resize itself went over its cap: a long thin picture, or least and most next to each other
                over += 1
                assert 1 <= grid.tokens <= cap
    assert over > 20


TABLE = {
    "fixed": ({}, model(), 576, 576),
    "tiles": ({"max_tiles": 12, "thumbnail": True}, model(side=448, shuffle=2), 3328, 1792),
    "anyres": ({}, model(newline=True), 2340, 2256),
    "native": ({}, model(shuffle=2), 391, 11125),
}


@pytest.mark.parametrize("policy", TABLE)
def test_the_table_in_the_documentation(policy):
    """docs/data/pictures.md: visual tokens of a 640x480 photo and of a scanned A4 page."""
    fields, its_model, photo, page = TABLE[policy]
    resizing = make_resizing(ImageConfig.model_validate({"policy": policy, **fields}), its_model)
    assert (resizing.grid(640, 480).tokens, resizing.grid(2480, 3508).tokens) == (photo, page)
