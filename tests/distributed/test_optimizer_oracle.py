"""The update that megatron-core makes for us is torch's AdamW: groups, rates, decay, clipping, warm-up. And the schedule by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.schema import StageConfig
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage
from megavlm.training.schedule import learning_rate

RATES = {"vision": 0.1, "projector": 2.0, "language": 1.0}
DECAYS = {"vision": 0.3, "projector": 0.0, "language": 0.05}


def stage() -> dict[str, Any]:
    modules = {m: {"train": "full", "lr_scale": RATES[m], "weight_decay": DECAYS[m]} for m in RATES}
    return tiny_stage(steps=4, **modules) | {"optimizer": {"lr": 1e-2, "eps": 1e-6, "clip_grad_norm": 0.5}}


def largest_difference(run_dir: Path, data_dir: Path) -> tuple[float, float, float]:
    """Train four steps; beside it torch.optim.AdamW gets the same gradients. (weights' difference, their change, gradient norm)."""
    import torch.distributed as dist

    from megavlm.models.init import initialise
    from megavlm.parallel.context import enter_grid
    from megavlm.training.build import build_chunks, wrap_for_training
    from megavlm.training.data import RunData
    from megavlm.training.optimizer import set_learning_rate
    from megavlm.training.state import RunState
    from megavlm.training.step import forward_backward

    assert dist.is_initialized()
    recipe = tiny_recipe(run_dir, data_dir, [stage()])
    config = recipe.stages[0]
    ctx = enter_grid(recipe.parallel, torch.device("cpu"), 1)
    modules = build_chunks(recipe, config, recipe.parallel, ctx)
    initialise(modules, recipe.model, 1, ctx)
    twins = {n: p.detach().clone().requires_grad_() for n, p in modules[0].named_parameters()}
    start = {n: p.detach().clone() for n, p in twins.items()}
    model = wrap_for_training(modules, recipe, config, recipe.parallel)
    trained = {n: p for n, p in model.modules[0].named_parameters() if p.requires_grad}

    def group(name: str) -> dict[str, Any]:
        module = name.split(".", 1)[0]
        # Written out again on purpose: matrices decay, everything else does not.
        is_matrix = twins[name].dim() == 2 and "position_embedding" not in name
        return {"params": [twins[name]], "weight_decay": DECAYS[module] if is_matrix else 0.0, "scale": RATES[module]}

    oracle = torch.optim.AdamW([group(n) for n in trained], lr=1.0, betas=(0.9, 0.95), eps=1e-6)
    stream = RunData(recipe).open_stage(config, ctx, RunState())
    norm = 0.0
    for step in range(config.steps):
        model.chunks[0].zero_grad_buffer()
        model.optimizer.zero_grad()
        set_learning_rate(model.optimizer, config, step)
        forward_backward(model.chunks, stream.next().microbatches, stream.tasks, ctx)
        for name, parameter in trained.items():
            twins[name].grad = parameter.main_grad.detach().clone()  # type: ignore[attr-defined]
        norm = float(torch.nn.utils.clip_grad_norm_([twins[n] for n in trained], 0.5))
        for entry in oracle.param_groups:
            entry["lr"] = learning_rate(config, step) * entry["scale"]
        oracle.step()
        model.optimizer.step()
    stream.close()
    difference = max(float((trained[n].detach() - twins[n].detach()).abs().max()) for n in trained)
    change = min(float((twins[n].detach() - start[n]).abs().max()) for n in trained)
    return difference, change, norm


def test_update_equals_torch_adamw(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    difference, change, norm = pool.run(largest_difference, tmp_path / "run", data_dir)[0]
    assert norm > 0.5, "clipping must be at work, or this test says nothing about it"
    assert change > 1e-4, "every parameter must have moved"
    assert difference < 2e-6


def test_schedules_by_hand() -> None:
    def rates(steps: int, **schedule: Any) -> list[float]:
        made = StageConfig(name="s", steps=steps, mixture={"a": 1.0}, optimizer={"lr": 2.0}, schedule=schedule)
        return [learning_rate(made, i) for i in range(steps)]

    assert rates(3, kind="constant") == [2.0] * 3
    assert rates(4, kind="constant", warmup_steps=3) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates(5, kind="linear", min_lr_fraction=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])
    assert rates(6, kind="wsd", warmup_steps=1, decay_steps=2, min_lr_fraction=0.25) == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.25, 0.5])
    cosine = rates(5, kind="cosine", min_lr_fraction=0.1)
    assert cosine == pytest.approx([0.2 + 1.8 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)])
