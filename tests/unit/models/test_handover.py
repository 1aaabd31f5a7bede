"""What stages send each other: split as it was joined, gradients back where they belong, fewer rows from stage to stage."""

from __future__ import annotations

import pytest
import torch

from megavlm.config.schema import ModelConfig
from megavlm.data.prompt import Prompt, prompt_batch
from megavlm.models.handover import deepstack_side, join, pad, part, side_rows
from megavlm.models.language.cross import PICTURES
from megavlm.testing.tiny import tiny_model_config

IMAGE = 3


def batch_of(model: ModelConfig, pictures: int):
    tiles = torch.zeros(pictures, 3, 16, 16, dtype=torch.uint8)
    each = 1 if model.language.cross_attention else model.visual_tokens_per_tile
    return prompt_batch([Prompt([5, 6]), Prompt([7, *[IMAGE] * pictures * each, 8], tiles if pictures else None)], IMAGE, model)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("numbers", [(), (3,), (0, 2)])
def test_a_message_is_split_as_it_was_joined(numbers: tuple[int, ...], padding: int) -> None:
    x = torch.randn(4, 1, 8, requires_grad=True)
    rows = {f"side {i}": n for i, n in enumerate(numbers)}
    sides = {name: torch.randn(n, 1, 8, requires_grad=True) for name, n in rows.items()}
    message = pad(join(x, sides | {"read already": torch.randn(2, 1, 8)}, rows), 4 + sum(numbers) + padding)
    again, found = part(message, 4, rows)
    assert torch.equal(again, x) and all(torch.equal(found[name], side) for name, side in sides.items()) and list(found) == list(rows)
    (again.sum() + sum((2 * side.sum() for side in found.values()), start=torch.zeros(()))).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert all(torch.equal(side.grad, torch.full_like(side, 2)) for side in sides.values())


def test_a_message_is_never_cut() -> None:
    with pytest.raises(AssertionError, match="largest"):
        pad(torch.zeros(4, 1, 8), 3)


def test_rows_travel_as_far_as_they_are_read() -> None:
    model = tiny_model_config(cross_attention={"layers": [0, 2]})
    each = model.visual_tokens_per_tile
    assert [side_rows(model, batch_of(model, 2), done) for done in range(4)] == [{PICTURES: 2 * each}] * 3 + [{}]
    assert side_rows(model, batch_of(model, 0), 0) == {PICTURES: 0}
    plain = tiny_model_config()
    assert side_rows(plain, batch_of(plain, 2), 0) == {}
    vision = plain.vision.model_copy(update={"deepstack_layers": [0, 1]})
    deep = plain.model_copy(update={"vision": vision})
    assert [list(side_rows(deep, batch_of(deep, 1), done)) for done in range(3)] == [
        [deepstack_side(0), deepstack_side(1)],
        [deepstack_side(1)],
        [],
    ]
