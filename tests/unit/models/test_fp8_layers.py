"""Transformer Engine's side of FP8 without it: rows filled up around its layers, contexts around its blocks."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from megavlm.config.parallel import ContextSplit
from megavlm.models.layers.fp8 import ROW_UNITS, _inside, fill_rows
from megavlm.topology.context import rows_of_rank


class Layer:
    """A linear layer that takes rows in multiples of a unit only, as Transformer Engine's do, on one of several tensor ranks.

    A column-parallel one under sequence parallelism sees the rows of all ranks; a row-parallel one gives back its own. The ranks of the
    test all hold the same rows, so gathering is repeating.
    """

    def __init__(self, mode: str, ranks: int, sequence: bool, unit: int) -> None:
        self.parallel_mode, self.tp_size, self.sequence_parallel, self.unit = mode, ranks, sequence, unit
        self.weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.seen.append(x.shape[0])
        assert x.shape[0] % self.unit == 0
        if self.sequence_parallel and self.parallel_mode == "column":
            x = torch.cat([x] * self.tp_size)
        out = x @ self.weight.T
        if self.sequence_parallel and self.parallel_mode == "row":
            out = torch.stack(out.chunk(self.tp_size)).sum(0)
        return out, None


@pytest.mark.parametrize("rows", [1, 16, 17, 31])
@pytest.mark.parametrize(("mode", "ranks", "sequence"), [("column", 1, False), ("column", 2, True), ("row", 2, True), ("row", 2, False)])
def test_any_number_of_rows(mode: str, ranks: int, sequence: bool, rows: int) -> None:
    strict, free = Layer(mode, ranks, sequence, 16), Layer(mode, ranks, sequence, 1)
    fill_rows(strict, 16)
    given = rows * ranks if sequence and mode == "row" else rows
    x = torch.randn(given, 1, 4, dtype=torch.float64, requires_grad=True)
    (out, bias), (want, _) = strict.forward(x), free.forward(x)
    assert bias is None and out.shape == want.shape and torch.allclose(out, want, rtol=1e-12)
    gradient = torch.randn_like(want)
    (got_x,), (want_x,) = torch.autograd.grad(out, x, gradient), torch.autograd.grad(want, x, gradient)
    assert torch.allclose(got_x, want_x, rtol=1e-12)
    assert strict.seen == [-(-rows // 16) * 16 * (ranks if sequence and mode == "row" else 1)]


@pytest.mark.parametrize("split", get_args(ContextSplit))
@pytest.mark.parametrize("sequence", [False, True])
def test_rows_of_a_context_rank(sequence: bool, split: ContextSplit) -> None:
    """Linear layers see this rank's rows only, however odd a split leaves them: filled up, they need no other split."""
    whole = rows_of_rank((37, 6, 22), split, 2, 2 if sequence else 1)
    assert whole % 16, "or nothing would be filled up"
    rows = whole // 2 if sequence else whole
    for mode in ("column", "row"):
        test_any_number_of_rows(mode, 2 if sequence else 1, sequence, rows)


def test_units_are_multiples_of_what_the_products_take() -> None:
    assert all(unit % 16 == 0 for unit in ROW_UNITS.values()) and ROW_UNITS["blockwise"] % 32 == 0


def test_a_context_is_entered_again_when_a_layer_is_recomputed() -> None:
    """Recomputation outside the context would be in bf16, and give other activations than the forward pass had."""
    from torch.utils.checkpoint import checkpoint

    state = SimpleNamespace(on=False, runs=[])

    @contextmanager
    def context() -> Any:
        state.on = True
        try:
            yield
        finally:  # recomputation ends early, by an exception
            state.on = False

    def layer(x: torch.Tensor) -> torch.Tensor:
        state.runs.append(state.on)
        return (x * 2).sin()

    forward = _inside(context, layer)
    x = torch.ones(3, requires_grad=True)
    checkpoint(forward, x, use_reentrant=False).sum().backward()
    assert state.runs == [True, True] and not state.on
