"""Positions by fraction of the picture: the place in the table that transformers' code takes, for any grid and table."""

from __future__ import annotations

import pytest
import torch

from megavlm.models.vision.positions import bucketed_positions, factorised_positions


def idefics2_places(side: int, rows: int, columns: int) -> torch.Tensor:
    """What transformers' embedding looks up for a picture of rows x columns patches, padded to twice that."""
    from transformers import Idefics2VisionConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

    config = Idefics2VisionConfig(hidden_size=1, num_attention_heads=1, image_size=side, patch_size=1)
    embeddings = Idefics2VisionEmbeddings(config)
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(torch.arange(side * side, dtype=torch.float32)[:, None])
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        mask = torch.zeros(1, 2 * rows, 2 * columns, dtype=torch.bool)
        mask[:, :rows, :columns] = True
        found = embeddings(torch.zeros(1, 3, 2 * rows, 2 * columns), mask)
    return found.view(2 * rows, 2 * columns)[:rows, :columns].long()


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 26, 32, 49, 70])
def test_places_are_idefics2s(side: int) -> None:
    table = torch.arange(side * side, dtype=torch.float32)[:, None]
    sizes = sorted({1, 2, 3, 7, 11, side - 1, side, side + 1, 2 * side, 3 * side - 1} - {0})
    for rows in sizes:
        found = bucketed_positions(table, rows, sizes[-1])
        assert torch.equal(found.view(rows, sizes[-1]).long(), idefics2_places(side, rows, sizes[-1])), rows


def test_even_the_trained_grid_follows_the_rounding() -> None:
    """Guards the comparison: a table of 49 x 49 is not taken as it stands, one of 26 x 26 (Idefics3) is."""
    for side, as_it_stands in ((49, False), (26, True)):
        assert torch.equal(idefics2_places(side, side, side).flatten(), torch.arange(side * side)) is as_it_stands


def test_factorised_gradients_by_finite_differences() -> None:
    table = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: factorised_positions(t, 3, 5), (table,))
