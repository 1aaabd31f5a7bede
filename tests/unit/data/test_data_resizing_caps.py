"""Caps on visual tokens: they hold for any pictures, resolution gives way evenly, and nothing is ever left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.resizing import ResizingError, make_resizing, plan_pictures

POLICIES = {
    "fixed": {},
    "tiles": {"max_tiles": 12, "thumbnail": True},
    "tiles, at least 4": {"policy": "tiles", "min_tiles": 4, "max_tiles": 9, "thumbnail": True},
    "anyres": {},
    "split": {"longest_edge_px": 448},
    "native": {"min_tokens_per_image": 4},
    "native, to the next patch": {"policy": "native", "whole_patches": "stretch", "longest_edge_px": 400, "min_tokens_per_image": 1},
    "native, cut": {"policy": "native", "whole_patches": "cut", "longest_edge_px": 400, "shortest_edge_px": 100},
}
sides = st.one_of(st.integers(1, 60), st.integers(1, 5000))
sizes = st.tuples(sides, sides).filter(lambda s: max(s) <= 200 * min(s))
many = st.lists(sizes, min_size=1, max_size=6)
policies = st.sampled_from(list(POLICIES))


def build(name, **caps):
    image = ImageConfig.model_validate({"policy": name, **POLICIES[name], **caps})
    vision = {"image_size_px": 112, "patch_size_px": 14}
    projector = {"pixel_shuffle": 2, "image_newline": name == "anyres"}
    model = ModelConfig.model_validate({"vision": vision, "projector": projector})
    return make_resizing(image, model), image


def check_grid(resizing, grid, width, height):
    """Tokens, pixels and rows of a plan agree; the picture itself is not cut here."""
    assert grid.tokens >= 1
    grey = resizing.grey(grid)
    if resizing.native:
        assert grey.numel() == 3 * 14 * 14 * grid.work.patches
        assert grid.work.patches == grid.rows * grid.cols == 4 * grid.tokens
    else:
        assert len(grey) == grid.work.tiles
        rows = resizing.feature_rows(grid, width, height)
        assert grid.tokens == (16 * grid.work.tiles if rows is None else len(rows))
        assert rows is None or (rows.max() < 16 * grid.work.tiles and rows.min() >= -1)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(policies, sizes, st.integers(1, 300), st.integers(0, 200))
def test_a_cap_on_one_picture_holds_and_more_room_never_means_less(name, size, cap, more):
    resizing, _ = build(name)
    least = resizing.least(*size)
    if cap < least:
        with pytest.raises(ResizingError, match=f"needs at least {least}"):
            resizing.grid(*size, cap)
        return
    lower, higher, free = (resizing.grid(*size, c) for c in (cap, cap + more, None))
    assert lower.tokens <= cap
    assert lower.tokens <= higher.tokens <= free.tokens
    assert higher.tokens <= cap + more
    if free.tokens <= cap:
        assert lower == free
    check_grid(resizing, lower, *size)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(policies, many, st.integers(1, 900), st.integers(0, 300), st.booleans())
def test_a_cap_on_a_sample_holds_and_no_picture_is_left_out(name, pictures, cap, more, as_argument):
    plain, plain_image = build(name)
    resizing, image = (plain, plain_image) if as_argument else build(name, max_tokens_per_sample=cap)
    leasts = [plain.grid(*size, plain.least(*size)).tokens for size in pictures]

    def plan():
        return plan_pictures(pictures, resizing, image, cap if as_argument else None)

    if sum(leasts) > cap:
        with pytest.raises(
            ResizingError, match=f"{len(pictures)} pictures may have {cap} visual tokens together, .* at least {sum(leasts)}"
        ):
            plan()
        return
    grids = plan()
    assert grids == plan()
    assert len(grids) == len(pictures)
    assert sum(g.tokens for g in grids) <= cap
    free, roomier = plan_pictures(pictures, plain, plain_image), plan_pictures(pictures, plain, plain_image, cap + more)
    for size, grid, least, other, uncapped in zip(pictures, grids, leasts, roomier, free, strict=True):
        assert least <= grid.tokens <= other.tokens <= uncapped.tokens
        check_grid(resizing, grid, *size)
    if sum(g.tokens for g in free) <= cap:
        assert grids == free
    # Pictures of one size stay alike, and who lost resolution is not left smaller than who kept it.
    kept = [g.tokens for g, f in zip(grids, free, strict=True) if g == f]
    ceiling = max(g.tokens for g in grids)
    assert all(tokens <= ceiling for tokens in kept)
    assert all(a == b for s, a in zip(pictures, grids, strict=True) for t, b in zip(pictures, grids, strict=True) if s == t)


def test_the_largest_picture_gives_way_first():
    resizing, image = build("native")
    large, small = plan_pictures([(2000, 1500), (140, 112)], resizing, image, 200)
    assert small == resizing.grid(140, 112)
    assert 160 <= large.tokens <= 200 - small.tokens
    assert abs(large.cols / large.rows - 4 / 3) < 0.15  # the whole picture, only smaller


def test_tiles_under_a_cap_keep_the_shape():
    resizing, image = build("tiles")
    assert [(g.cols, g.rows, g.thumbnail) for g in plan_pictures([(640, 480)], resizing, image)] == [(4, 3, True)]
    assert [(g.cols, g.rows, g.thumbnail) for g in plan_pictures([(640, 480)], resizing, image, 6 * 16)] == [(2, 2, True)]
    assert [(g.cols, g.rows) for g in plan_pictures([(640, 480)] * 2, resizing, image, 15 * 16)] == [(3, 2), (3, 2)]


def test_the_recipes_caps_are_both_applied():
    resizing, image = build("tiles", max_tokens_per_image=5 * 16, max_tokens_per_sample=8 * 16)
    alone, pair = (plan_pictures([(400, 400)] * n, resizing, image) for n in (1, 2))
    assert [g.tokens for g in alone] == [5 * 16]
    assert [g.tokens for g in pair] == [16, 16]
    with pytest.raises(ResizingError, match="9 pictures may have 128 visual tokens together, and .*policy=tiles needs at least 144"):
        plan_pictures([(400, 400)] * 9, resizing, image)


def test_a_fixed_tile_cannot_be_lowered():
    resizing, image = build("fixed", max_tokens_per_image=15)
    with pytest.raises(ResizingError, match=r"640x480 pixels may have 15 visual tokens, .*policy=fixed needs at least 16"):
        plan_pictures([(640, 480)], resizing, image)


def test_a_capped_picture_is_whole():
    """A gradient from black to white still runs from black to white."""
    gradient = np.repeat(np.linspace(0, 255, 900).astype(np.uint8)[None, :, None], 300, axis=0).repeat(3, axis=2)
    for name in POLICIES:
        resizing, _ = build(name)
        grid = resizing.grid(900, 300, resizing.least(900, 300))
        pixels = resizing.cut(gradient, grid)
        if resizing.native:
            pixels = pixels.view(1, 3, 14 * grid.rows, 14 * grid.cols)
        line = pixels[0, 0, pixels.shape[2] // 2]
        assert line[0] < 16, name
        assert line[-1] > 239, name


def test_a_picture_without_pixels_is_refused_by_name():
    for name in POLICIES:
        with pytest.raises(ResizingError, match="0x7 pixels has no pixels"):
            build(name)[0].grid(0, 7)
