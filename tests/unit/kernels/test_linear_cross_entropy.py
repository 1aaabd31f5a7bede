"""The head with cross-entropy against a few lines of torch and autograd: in fp64, on one rank and with the vocabulary on several; in other
formats by the rule of megavlm_kernels.testing.tolerance; and its kernels under Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavlm.testing.pool import RankPool
from megavlm_kernels.linear_cross_entropy import linear_cross_entropy, op
from megavlm_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from megavlm_kernels.testing.interpreter import Interpreter
from megavlm_kernels.testing.tolerance import errors_against_truth

ROWS, WIDTH, VOCABULARY, PADDED = 13, 6, 21, 24
NAMES = ["loss", "hidden", "weight", "z-loss"]


def inputs(rows: int = ROWS, width: int = WIDTH, vocabulary: int = VOCABULARY, padded: int = PADDED) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = (2 * torch.randn(padded, width, generator=generator, dtype=torch.float64)).requires_grad_()
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    loss_weight = torch.rand(rows, generator=generator, dtype=torch.float64)
    loss_weight[: rows // 4] = 0.0
    return [hidden, weight, target, loss_weight]


def reference(given: list[torch.Tensor], vocabulary: int, softcap: float | None, z_loss: float, upstream: float) -> list[torch.Tensor]:
    """[loss of each row, gradients of hidden rows and weight, z-loss] by autograd, in the inputs' format."""
    total, loss, z_total = linear_cross_entropy_reference(*given, vocabulary, softcap, z_loss)  # type: ignore[arg-type]
    return [loss, *torch.autograd.grad(upstream * total, given[:2]), z_total]


def ours(
    given: list[torch.Tensor], vocabulary: int, softcap: float | None, z_loss: float, upstream: float, chunk: int = 1 << 24
) -> list[torch.Tensor]:
    """The same on this rank; with several ranks each has its share of the vocabulary's rows."""
    hidden, weight, target, loss_weight = given
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    own = weight.shape[0] // ranks
    part = weight.detach()[own * rank : own * (rank + 1)].requires_grad_()
    group = dist.group.WORLD if ranks > 1 else None
    options: dict[str, Any] = {"vocab_size": vocabulary, "vocab_start": own * rank, "group": group, "softcap": softcap, "z_loss": z_loss}
    whole, op.CHUNK_ELEMENTS = op.CHUNK_ELEMENTS, chunk
    try:
        total, loss, z_total = linear_cross_entropy(hidden, part, target, loss_weight, **options)
    finally:
        op.CHUNK_ELEMENTS = whole
    exact = (loss * loss_weight).sum() + z_total
    assert torch.allclose(total, exact.to(total.dtype), rtol=1e-5), "the total is the weighted losses and the z-loss"
    grads = list(torch.autograd.grad(upstream * total, (hidden, part)))
    if ranks > 1:
        dist.all_reduce(grads[0])
    return [loss, *grads, z_total]


def in_rank(softcap: float | None, z_loss: float, chunk: int) -> list[torch.Tensor]:
    return ours(inputs(), VOCABULARY, softcap, z_loss, 0.3, chunk)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 1.5, 30.0])
@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("chunk", [1 << 24, 3 * PADDED])
def test_losses_and_gradients(pool: RankPool, softcap: float | None, z_loss: float, ranks: int, chunk: int) -> None:
    """With eight ranks the last one has nothing but padding."""
    want = reference(inputs(), VOCABULARY, softcap, z_loss, 0.3)
    results = pool.run(in_rank, softcap, z_loss, chunk, world_size=ranks)
    for loss, hidden_grad, _, z_total in results:
        assert torch.allclose(loss, want[0], rtol=0, atol=1e-12)
        assert torch.allclose(hidden_grad, want[1], rtol=0, atol=1e-12)
        assert torch.allclose(z_total, want[3], rtol=0, atol=1e-12)
    assert torch.allclose(torch.cat([result[2] for result in results]), want[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_reference_is_the_derivative(softcap: float | None) -> None:
    hidden, weight, target, loss_weight = inputs()

    def total(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy_reference(h, w, target, loss_weight, VOCABULARY, softcap, 0.1)[0]

    assert torch.autograd.gradcheck(total, (hidden, weight))


def in_format(given: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    hidden, weight, target, loss_weight = given
    return [hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_(), target, loss_weight.float()]


def rounded_truth(given: list[torch.Tensor]) -> list[torch.Tensor]:
    """fp64 copies of inputs that another format has rounded."""
    return [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in given]


SHAPES = [(13, 6, 21, 24), (1, 5, 1, 8), (7, 33, 4097, 4104), (3, 16, 5000, 8192)]
"""(rows, width, vocabulary, with padding): odd ones, a vocabulary of one, more than a block of columns, a block of padding alone."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (None, 0.01), (5.0, 0.01)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by", ["torch", "triton"])
def test_formats_and_shapes(
    by: str, shape: tuple[int, int, int, int], softcap: float | None, z_loss: float, dtype: torch.dtype, interpreter: Interpreter
) -> None:
    given = in_format(inputs(*shape), dtype)
    options = (shape[2], softcap, z_loss, 1.0)
    truth, eager = reference(rounded_truth(given), *options), reference(given, *options)
    got = interpreter.run(ours, given, *options) if by == "triton" else ours(given, *options)
    assert got[0].dtype == torch.float32 and got[2].dtype == dtype
    # Logits are of the inputs' format on both sides: of what is made of them no more digits count.
    for number in (0, 3):
        got[number], eager[number] = got[number].to(dtype), eager[number].to(dtype)
    assert not errors_against_truth(got, eager, truth, NAMES)


@pytest.mark.parametrize("by", ["torch", "triton"])
def test_no_targets(by: str, interpreter: Interpreter) -> None:
    given = in_format(inputs(rows=0), torch.bfloat16)
    got = interpreter.run(ours, given, VOCABULARY, None, 0.1, 1.0) if by == "triton" else ours(given, VOCABULARY, None, 0.1, 1.0)
    assert [x.shape for x in got] == [(0,), (0, WIDTH), (PADDED, WIDTH), ()]
    assert not got[2].any() and not got[3].any()


def test_the_interpreted_process_takes_the_kernels(interpreter: Interpreter) -> None:
    """Or the tests above compare torch with torch."""
    assert interpreter.run(taken_path) == "_chunk_by_triton" and taken_path() == "_chunk"


def taken_path() -> str:
    taken = []
    for name in ("_chunk", "_chunk_by_triton"):
        real = getattr(op, name)
        setattr(op, name, lambda *a, real=real, name=name: (taken.append(name), real(*a))[1])
    given = in_format(inputs(), torch.float32)
    linear_cross_entropy(*given, vocab_size=VOCABULARY)  # type: ignore[arg-type]
    (name,) = taken
    return name


def test_frozen_inputs() -> None:
    """Only what trains gets a gradient, and without one nothing is computed for it."""
    hidden, weight, target, loss_weight = inputs()
    want = reference([hidden, weight, target, loss_weight], VOCABULARY, None, 0.1, 1.0)
    for trains in ((True, False), (False, True)):
        h, w = (x.detach().requires_grad_(wanted) for x, wanted in zip((hidden, weight), trains, strict=True))
        total = linear_cross_entropy(h, w, target, loss_weight, vocab_size=VOCABULARY, z_loss=0.1).total
        total.backward()
        for x, wanted, grad in zip((h, w), trains, want[1:3], strict=True):
            assert (x.grad is not None) == wanted
            assert x.grad is None or torch.allclose(x.grad, grad, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(linear_cross_entropy(hidden, weight, target, loss_weight, vocab_size=VOCABULARY).loss_Q, want[0])


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    """Else they are scaled where they lie, and no second copy of the head's gradient is made."""
    hidden, weight, target, loss_weight = inputs()
    total = 3.0 * linear_cross_entropy(hidden, weight, target, loss_weight).total
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    kept = [x.clone() for x in first]
    again = torch.autograd.grad(total, (hidden, weight))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(kept, again, first, strict=True))

    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        total = 3.0 * linear_cross_entropy(hidden, weight, target, loss_weight).total
    grads = torch.autograd.grad(total, (hidden, weight))
    assert grads[1].data_ptr() in {x.data_ptr() for x in saved if x.shape == weight.shape}
    assert all(torch.equal(a, b) for a, b in zip(kept, grads, strict=True))


def test_gradients_of_the_weight_are_summed_in_fp32() -> None:
    """Many chunks of one row: summed in bf16 the small ones would vanish beside the large sum."""
    rows = 600
    given = in_format(inputs(rows=rows), torch.bfloat16)
    given[3] = torch.ones(rows)
    truth = reference(rounded_truth(given), VOCABULARY, None, 0.0, 1.0)
    got = ours(given, VOCABULARY, None, 0.0, 1.0, chunk=PADDED)
    scale = truth[2].abs().max()
    assert (got[2].double() - truth[2]).abs().max() <= 2**-8 * scale
    summed = torch.zeros_like(given[1])
    for row in range(rows):
        one = [given[0][row : row + 1], given[1], given[2][row : row + 1], given[3][row : row + 1]]
        summed += torch.autograd.grad(linear_cross_entropy(*one, vocab_size=VOCABULARY).total, given[1])[0]  # type: ignore[arg-type]
    assert (summed.double() - truth[2]).abs().max() > 2**-8 * scale, "bf16 sums would pass too"


def test_fp16_keeps_small_gradients_and_takes_a_large_loss_scale() -> None:
    """A loss scale is 65536 or more, infinite in fp16, and comes only with the backward pass; loss weights of a long pack are small."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(5, 32, generator=generator).half()
    weight = (0.1 * torch.randn(4096, 32, generator=generator)).half()
    target, loss_weight = torch.arange(5), torch.full((5,), 1e-4)
    found, truth = [], []
    for dtype, into in ((torch.float16, found), (torch.float64, truth)):
        given = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        total = linear_cross_entropy(*given, target, loss_weight.to(dtype if dtype == torch.float64 else torch.float32)).total
        into += torch.autograd.grad(2.0**17 * total, given)
    for ours_, exact in zip(found, truth, strict=True):
        assert ours_.isfinite().all()
        error = (ours_.double() - exact).abs() / exact.abs().clamp(min=exact.abs().median() / 100)
        assert error.median() < 1e-3, "half of all entries within fp16's own rounding"
        assert (ours_ == 0).double().mean() < 1e-3, "nothing is flushed to zero"
