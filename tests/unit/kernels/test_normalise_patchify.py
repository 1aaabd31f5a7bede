"""Normalised patches: the same bits as the formula step by step, whatever the size, order and format, in blocks and in Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megavlm_kernels.normalise_patchify import patches_of_pictures, patches_of_tiles
from megavlm_kernels.normalise_patchify.reference import patches_reference
from megavlm_kernels.testing.interpreter import Interpreter

MEAN, INVERSE_STD = torch.tensor([123.675, 116.28, 103.53]), 1.0 / torch.tensor([58.395, 57.12, 57.375])
ORDERS: list[dict[str, Any]] = [{}, {"frames": 2}, {"channels_last": True}, {"channels_last": True, "frames": 3}]


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.uint8)


class Way:
    """Calls a function one of the ways that it may run."""

    def __init__(self, interpreter: Interpreter | None) -> None:
        self.interpreter = interpreter

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.interpreter.run(function, *args, **kwargs) if self.interpreter else function(*args, **kwargs)

    def reference(self, tiles: torch.Tensor, dtype: torch.dtype, order: dict[str, Any]) -> torch.Tensor:
        """The formula's bits. Triton's interpreter cuts fp32 off where it makes bf16 of it, devices round."""
        if self.interpreter is None or dtype != torch.bfloat16:
            return patches_reference(tiles, MEAN, INVERSE_STD, 4, dtype, **order)
        exact = patches_reference(tiles, MEAN, INVERSE_STD, 4, torch.float32, **order)
        return (exact.view(torch.int32) & -(1 << 16)).view(torch.float32).bfloat16()


@pytest.fixture(params=["one block", "blocks", "rows of patches", "triton"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    if request.param == "triton":
        return Way(request.getfixturevalue("interpreter"))
    elements = {"one block": 1 << 18, "blocks": 600, "rows of patches": 40}[request.param]
    for module in ("blocks", "normalise_patchify.op"):
        monkeypatch.setattr(f"megavlm_kernels.{module}.BLOCK_ELEMENTS", elements)
    return Way(None)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 3, 10, 15), (0, 3, 8, 8)])
def test_tiles(run: Way, shape: tuple[int, ...], dtype: torch.dtype, order: dict[str, Any]) -> None:
    tiles = pixels(*shape)
    want = run.reference(tiles, dtype, order)
    got = run(patches_of_tiles, tiles, MEAN, INVERSE_STD, 4, dtype, **order)
    assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("order", ORDERS)
def test_pictures_in_their_own_size(run: Way, order: dict[str, Any]) -> None:
    grids = [(1, 1), (3, 2), (1, 5), (2, 2)]
    pictures = [pixels(1, 3, 4 * rows, 4 * columns) for rows, columns in grids]
    flat = torch.cat([picture.flatten() for picture in pictures])
    want = torch.cat([run.reference(picture, torch.bfloat16, order) for picture in pictures])
    assert torch.equal(run(patches_of_pictures, flat, grids, MEAN, INVERSE_STD, 4, torch.bfloat16, **order), want)
    none = run(patches_of_pictures, flat[:0], [], MEAN, INVERSE_STD, 4, torch.bfloat16, **order)
    assert none.shape == (0, want.shape[1])


def test_views(run: Way) -> None:
    """Every second tile, and tiles whose channels come last in memory."""
    for tiles in (pixels(6, 3, 8, 8)[::2], pixels(2, 8, 8, 3).permute(0, 3, 1, 2)):
        want = run.reference(tiles, torch.float32, {})
        assert torch.equal(run(patches_of_tiles, tiles, MEAN, INVERSE_STD, 4, torch.float32), want)


def test_every_byte_is_right_to_the_last_bit() -> None:
    """Against fp64, rounded twice to fp32 as the formula does, and once to bf16; each channel has its own numbers."""
    tiles = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    difference = (tiles.double() - MEAN.double().view(1, 3, 1, 1)).float()
    want = (difference.double() * INVERSE_STD.double().view(1, 3, 1, 1)).float()
    got = patches_of_tiles(tiles, MEAN, INVERSE_STD, 16, torch.float32)
    assert torch.equal(got.view(3, 16, 16), want[0])
    assert torch.equal(patches_of_tiles(tiles, MEAN, INVERSE_STD, 16, torch.bfloat16).view(3, 16, 16), want[0].bfloat16())


def test_one_pixel_is_in_one_patch(run: Way) -> None:
    tiles = pixels(2, 3, 8, 12)
    changed = tiles.clone()
    changed[1, 2, 5, 9] ^= 128
    before, after = (run(patches_of_tiles, t, MEAN, INVERSE_STD, 4, torch.float32) for t in (tiles, changed))
    # Second tile (6 patches each), second row of patches, third column; third channel, second row, second column of it.
    assert (before != after).nonzero().tolist() == [[6 + 3 + 2, 2 * 16 + 1 * 4 + 1]]


def test_pixels_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="95 pixel values are not 2 patches"):
        patches_of_pictures(pixels(95), [(1, 2)], MEAN, INVERSE_STD, 4, torch.float32)
