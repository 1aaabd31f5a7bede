"""How far a kernel may be from the truth: no number chosen by hand, but what plain torch in the same format misses it by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

FORWARD, GRADIENT = 2.0, 3.0
"""A kernel's error over eager torch's, at most."""


def errors_against_truth(
    got: Sequence[torch.Tensor], eager: Sequence[torch.Tensor], truth: Sequence[torch.Tensor], names: Sequence[str]
) -> list[str]:
    """What is wrong, one line each: the first result counts as forward, the others as gradients; [] when all is well.

    Errors are largest absolute differences from `truth` (fp64). An eager error below the format's own rounding of the largest value counts
    as that rounding: by chance eager torch may hit the truth exactly.
    """
    wrong = []
    for number, (name, ours, theirs, exact) in enumerate(zip(names, got, eager, truth, strict=True)):
        if ours.shape != exact.shape or ours.dtype != theirs.dtype:
            wrong.append(f"{name}: {tuple(ours.shape)} {ours.dtype} instead of {tuple(exact.shape)} {theirs.dtype}")
            continue
        if not exact.numel():
            continue
        error, allowed = ((x.double() - exact).abs().max().item() for x in (ours, theirs))
        rounding = torch.finfo(theirs.dtype).eps / 2 * exact.abs().max().item()
        allowed = max(allowed, rounding) * (FORWARD if number == 0 else GRADIENT)
        if not error <= allowed:
            wrong.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}")
    return wrong


def forward_and_gradients(function: Callable[..., torch.Tensor], inputs: Sequence[Any], upstream: torch.Tensor) -> list[torch.Tensor]:
    """[result, gradient of each input that requires one], for the upstream gradient `upstream`."""
    out = function(*inputs)
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]
