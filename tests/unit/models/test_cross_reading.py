"""What cross-attention gives packed attention: against a dense mask, and by the backend that precision.attention names."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch

from megavlm.models.language import cross
from megavlm.models.language.cross import Look, Sight

HEADS, GROUPS, WIDTH = 4, 2, 6
SIGHTS: dict[str, tuple[int, list[Look]]] = {
    "each once": (9, [Look(3, ((0, 4),), True), Look(2, ((4, 5),), True)]),
    "in part": (9, [Look(2, (), False), Look(3, ((1, 4),), True), Look(1, (), False), Look(2, ((6, 2),), True)]),
    "several runs, shared": (12, [Look(2, ((0, 3), (6, 2)), True), Look(1, ((6, 2),), True), Look(4, ((0, 3), (9, 3)), True)]),
    "another order": (6, [Look(1, ((3, 3),), True), Look(2, ((0, 3),), True)]),
    "nothing": (5, [Look(4, (), False)]),
}


def inputs(rows: int, features: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, HEADS, WIDTH), (features, GROUPS, WIDTH), (features, GROUPS, WIDTH)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, looks: list[Look]) -> torch.Tensor:
    """Softmax over what a mask leaves, written out; rows that see nothing are zeros."""
    sees = torch.zeros(query.shape[0], key.shape[0], dtype=torch.bool)
    for start, look in zip(accumulate((look.length for look in looks), initial=0), looks, strict=False):
        for first, number in look.features:
            sees[start : start + look.length, first : first + number] = True
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    scores = torch.einsum("lhk,mhk->hlm", query, key) * WIDTH**-0.5
    share = scores.masked_fill(~sees, -1e30).softmax(-1) * sees
    return torch.einsum("hlm,mhk->lhk", share, value)


@pytest.mark.parametrize("name", SIGHTS)
def test_equals_a_dense_mask(name: str) -> None:
    features, looks = SIGHTS[name]
    rows = sum(look.length for look in looks)
    tensors, upstream = inputs(rows, features), torch.randn(rows, HEADS, WIDTH, dtype=torch.float64)
    out, want = cross._attend(*tensors, Sight(tuple(looks), ()), "auto"), dense(*tensors, looks)
    assert torch.allclose(out, want, atol=1e-12)
    for got, other in zip(torch.autograd.grad(out, tensors, upstream), torch.autograd.grad(want, tensors, upstream), strict=True):
        assert torch.allclose(got, other, atol=1e-12)


def test_nothing_is_gathered_where_all_is_read_in_order() -> None:
    for name, all_rows, all_features in [("each once", True, True), ("in part", False, False), ("another order", True, False)]:
        features, looks = SIGHTS[name]
        reading = Sight(tuple(looks), ()).reading(features, torch.device("cpu"))
        assert (reading.rows_R is None, reading.features_F is None) == (all_rows, all_features)


def test_the_backend_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    plain = cross.packed_attention

    def spy(*args: Any, backend: str, **options: Any) -> torch.Tensor:
        seen.append(backend)
        return plain(*args, backend="auto", **options)

    monkeypatch.setattr(cross, "packed_attention", spy)
    features, looks = SIGHTS["in part"]
    cross._attend(*inputs(8, features), Sight(tuple(looks), ()), "flash_attn")
    assert seen == ["flash_attn"]
