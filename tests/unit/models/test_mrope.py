"""Positions on three axes against transformers' own, sample by sample."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.models.language.mrope import mrope_positions, pair_positions, position_shift

SAMPLES = [[(2, 3)], [], [(1, 5), (4, 2)], [(3, 3)], [(6, 1), (1, 1)]]
"""(rows, columns) of visual tokens of each sample's pictures."""
ENDS_WITH_PICTURE = 3


def rope_index(kinds: list[int], grids: list[tuple[int, int]]) -> tuple[torch.Tensor, int]:
    """transformers' positions (3, L) of one sample, and its `rope_delta`."""
    tf = quiet_transformers()
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    fake = SimpleNamespace(config=tf.Qwen2VLConfig())
    fake.get_vision_position_ids = Qwen2VLModel.get_vision_position_ids.__get__(fake)
    kinds_BL = torch.tensor([kinds])
    grid_thw = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
    positions, delta = Qwen2VLModel.get_rope_index(fake, torch.zeros_like(kinds_BL), kinds_BL, grid_thw)
    return positions[:, 0], int(delta)


def test_a_pack_has_the_positions_of_its_samples() -> None:
    packed: list[torch.Tensor] = []
    wanted, visual, start = [], [], 0
    for number, grids in enumerate(SAMPLES):
        kinds = [0, 0, 0]
        for rows, columns in grids:
            kinds += [1] * (rows * columns) + [0]
        kinds = kinds[:-1] if number == ENDS_WITH_PICTURE else [*kinds, 0, 0]
        expected, delta = rope_index(kinds, grids)
        assert delta == position_shift(grids)
        wanted.append(expected)
        visual += [start + i for i, kind in enumerate(kinds) if kind]
        packed.append(torch.arange(len(kinds)))
        start += len(kinds)
    grids = [grid for sample in SAMPLES for grid in sample]
    assert torch.equal(mrope_positions(torch.cat(packed), torch.tensor(visual), grids), torch.cat(wanted, dim=1))


def test_placeholders_and_pictures_must_match() -> None:
    with pytest.raises(ValueError, match="5 image placeholders, but 1 pictures of 6 visual tokens"):
        mrope_positions(torch.arange(9), torch.arange(2, 7), [(2, 3)])


@pytest.mark.parametrize(("interleaved", "sections"), [(False, [2, 3, 3]), (False, [4, 2, 2]), (True, [4, 2, 2]), (True, [3, 3, 2])])
def test_pairs_follow_the_axes_that_transformers_gives_them(interleaved: bool, sections: list[int]) -> None:
    tf = quiet_transformers()
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    text = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "mrope_section": sections},
    }
    config = tf.Qwen3VLTextConfig(**text, head_dim=16) if interleaved else tf.Qwen2VLTextConfig(**text)
    rotary = (Qwen3VLTextRotaryEmbedding if interleaved else Qwen2VLRotaryEmbedding)(config)
    positions_3S = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(0))
    cos, sin = rotary(torch.zeros(1), positions_3S[:, None])
    angle = pair_positions(positions_3S, sections, interleaved).float() / 50 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(torch.cat([angle, angle], dim=-1).cos(), cos[0], atol=1e-5)
    assert torch.allclose(torch.cat([angle, angle], dim=-1).sin(), sin[0], atol=1e-5)
