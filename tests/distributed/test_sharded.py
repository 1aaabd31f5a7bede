"""ZeRO-2 and ZeRO-3: the same losses, gradients and updates as one rank, and a fraction of the state on each."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.schema import ModelConfig, ParallelConfig, Recipe
from megavlm.data.types import PackedBatch
from megavlm.planner.state import state_bytes
from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import TRAINING, assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.tiny import tiny_batch, tiny_chunks, tiny_model_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ZeRO-2": (2, {"zero": 2}),
    "ZeRO-3": (2, {"zero": 3}),
    "ZeRO-3 alone": (1, {"zero": 3}),
    "TP2+SP x ZeRO-3": (4, {"tensor": 2, "sequence": True, "zero": 3}),
    "PP2 x ZeRO-3": (4, {"pipeline": 2, "zero": 3}),
    "PP2xVPP2 x ZeRO-2": (4, {"pipeline": 2, "virtual_pipeline": 2, "zero": 2}),
    "CP2 x ZeRO-3": (2, {"context": 2, "zero": 3}),
    "ZeRO-3 + recompute": (2, {"zero": 3, "recompute": "full"}),
    "ZeRO-3 + recompute + offload": (2, {"zero": 3, "recompute": "full", "offload_activations": 9}),
    "ZeRO-2 + MLP again + offload": (2, {"zero": 2, "recompute": "selective", "recompute_modules": ["mlp"], "offload_activations": 2}),
}
QUICK = {
    ("ZeRO-2", "all"),
    ("PP2xVPP2 x ZeRO-2", "all"),
    ("TP2+SP x ZeRO-3", "all"),
    ("CP2 x ZeRO-3", "all"),
    ("ZeRO-3 + recompute", "all"),
}
QUICK |= (
    {("ZeRO-2 + MLP again + offload", "top_layers")}
    | {("ZeRO-3", training) for training in TRAINING}
    | {("PP2 x ZeRO-3", "projector_only"), ("ZeRO-2", "top_layers")}
)


def run(pool: RankPool, folder: Path, data: Path, world_size: int, stage: dict[str, Any], **blocks: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = pool.run(train_and_read, tiny_recipe(folder, data, [stage], **blocks), world_size=world_size)[0]
    return records


@pytest.fixture(scope="session")
def one_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    base = tmp_path_factory.mktemp("one")
    return {name: run(pool, base / name, data_dir, 1, tiny_stage(steps=3, **training)) for name, training in TRAINING.items()}


@pytest.mark.parametrize(
    ("layout", "training"),
    [
        pytest.param(layout, training, marks=[] if (layout, training) in QUICK else pytest.mark.slow)
        for layout in LAYOUTS
        for training in TRAINING
    ],
)
def test_layout_equals_one_rank(
    layout: str, training: str, pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: dict[str, list[dict[str, Any]]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    assert_same_records(
        run(pool, tmp_path, data_dir, world_size, tiny_stage(steps=3, **TRAINING[training]), parallel=parallel), one_rank[training]
    )


@pytest.mark.parametrize("zero", [2, 3])
def test_ranks_without_any_picture_and_evaluation_between_steps(zero: int, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Whole steps in which one rank has pictures and the other none; held-out batches between them gather parameters too."""
    stage = tiny_stage(steps=4) | {"mixture": {"pages": 0.06, "text": 0.94}}
    evaluation = {"sources": ["held_out"], "every_steps": 2, "packs": 4}
    reference = run(pool, tmp_path / "one", data_dir, 1, stage, evaluation=evaluation)
    assert_same_records(run(pool, tmp_path / "two", data_dir, 2, stage, evaluation=evaluation, parallel={"zero": zero}), reference)


@pytest.mark.parametrize(
    ("zero", "training"), slow_unless(product([2, 3], ["all", "top_layers"]), lambda zero, training: (zero == 3) == (training == "all"))
)
def test_bf16_is_that_of_the_distributed_optimizer(zero: int, training: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Parameters are computed with in bf16 and updated in fp32, as megatron-core's bf16 optimizers do with their masters."""
    stage, bf16 = tiny_stage(steps=4, **TRAINING[training]), {"dtype": "bf16"}
    reference = run(pool, tmp_path / "one", data_dir, 2, stage, precision=bf16, parallel={"zero": 1})
    assert_same_records(run(pool, tmp_path / "two", data_dir, 2, stage, precision=bf16, parallel={"zero": zero}), reference, 1e-3, 1e-2)


IMAGES = [(1, 0, 2), (0, 0, 0), (0, 0, 0), (0, 3, 1)]


def batches(model: ModelConfig, rank: int, size: int) -> list[PackedBatch]:
    """Four microbatches over `size` ranks: with two, each has one with and one without pictures; with four, two have none."""
    numbers = range(rank * 4 // size, (rank + 1) * 4 // size)
    return [tiny_batch(model, seed=n, images_per_sample=IMAGES[n], seq_len_tokens=96, num_targets=5 + 2 * n) for n in numbers]


class Trained:
    """A tiny model of this rank after one step, and what it holds."""

    def __init__(self, parallel: dict[str, Any], training: str, dtype: str, siglip: bool) -> None:
        from megavlm.models.init import initialise
        from megavlm.parallel.context import enter_grid
        from megavlm.training.build import wrap_for_training
        from megavlm.training.optimizer import set_learning_rate

        self.model, layout = tiny_model_config(siglip=siglip, tie_embeddings=not siglip), ParallelConfig(**parallel)
        ctx = enter_grid(layout, torch.device("cpu"), 1)
        stage = {"name": "s", "steps": 9, "mixture": {"a": 1.0}, **TRAINING[training]}
        stage |= {"optimizer": {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "clip_grad_norm": 0.5}}
        self.recipe = Recipe.model_validate(
            {
                "run": {"dir": "unused"},
                "model": self.model.model_dump(),
                "precision": {"dtype": dtype},
                "data": {"sources": {"a": {"path": "unused"}}},
                "stages": [stage],
            }
        )
        modules = tiny_chunks(self.model, ctx, layout, dtype=dtype)
        initialise(modules, self.model, 0, ctx)
        self.ctx, self.state = ctx, wrap_for_training(modules, self.recipe, self.recipe.stages[0], layout)
        set_learning_rate(self.state.optimizer, self.recipe.stages[0], 0)

    def step(self) -> None:
        from megavlm.training.step import forward_backward

        forward_backward(self.state.chunks, batches(self.model, self.ctx.data_rank, self.ctx.grid.data), ["tiny"], self.ctx)


def gradients_and_weights(parallel: dict[str, Any], training: str, siglip: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every parameter's whole gradient before the update, and whole value after it."""
    from torch.distributed.tensor import DTensor

    trained = Trained(parallel, training, "fp32", siglip)
    trained.step()
    (module,) = trained.state.modules

    def whole(x: torch.Tensor | None) -> Any:
        return None if x is None else (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone().numpy()

    parameters = dict(module.named_parameters())
    gradients = {n: whole(getattr(p, "main_grad", p.grad)) for n, p in parameters.items() if p.requires_grad}
    trained.state.optimizer.step()
    return gradients, {n: whole(p) for n, p in parameters.items()}


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("training", ["all", "top_layers"])
@pytest.mark.parametrize(("world_size", "zero"), [(2, 2), (4, 3)])
def test_every_gradient_and_every_update(world_size: int, zero: int, training: str, siglip: bool, pool: RankPool) -> None:
    """Gathered gradients of every parameter, on two ranks and on four that have no equal parts of most; and what Adam makes of them."""
    expected = pool.run(gradients_and_weights, {}, training, siglip)[0]
    got = pool.run(gradients_and_weights, {"zero": zero}, training, siglip, world_size=world_size)
    assert got[0][0].keys() == expected[0].keys()
    for gradients, weights in got:
        for name, gradient in expected[0].items():
            scale = max(float(abs(gradient).max()), 1e-6)
            assert abs(gradients[name] - gradient).max() <= 1e-4 * scale, name
        for name, weight in expected[1].items():
            assert abs(weights[name] - weight).max() <= 1e-5, name
    moved = [name for name in expected[0] if abs(expected[0][name]).max() > 0]
    assert any(name.startswith("vision.") for name in moved) and len(moved) > 10


def bytes_held(parallel: dict[str, Any], dtype: str) -> tuple[int, int, int, int]:
    """(trained parameters of the model, bytes of their local parts, of local gradients, of local optimizer state) after a backward pass."""
    from torch.distributed.tensor import DTensor

    trained = Trained(parallel, "all", dtype, siglip=False)
    trained.step()
    parameters = [p for module in trained.state.modules for p in module.parameters() if p.requires_grad]
    trained.state.optimizer.step()

    def held(tensors: Any) -> int:
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
        return sum(t.numel() * t.element_size() for t in local)

    adams = [part.optimizer for part in getattr(trained.state.optimizer, "chained_optimizers", [trained.state.optimizer])]
    moments = [v for adam in adams for state in adam.state.values() for k, v in state.items() if k.startswith("exp_avg")]
    return sum(p.numel() for p in parameters), held(parameters), held(p.grad for p in parameters), held(moments)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_rank_holds_its_part_and_the_planner_knows(dtype: str, pool: RankPool) -> None:
    every = pool.run(bytes_held, {"zero": 3}, dtype, world_size=4)
    number = every[0][0]
    precision = tiny_recipe("unused", "unused", precision={"dtype": dtype}).precision
    expected = state_bytes(precision, 4, zero=3)
    for column, each in enumerate((expected.weight, expected.gradient, expected.optimizer), start=1):
        # Rows that four ranks cannot share equally: none holds more than the planner's share by more than a few rows.
        sizes = [rank[column] for rank in every]
        assert sum(sizes) == pytest.approx(4 * each * number, rel=1e-6)
        assert max(sizes) <= 1.1 * each * number


def flops_of_a_text_microbatch(parallel: dict[str, Any], text_only: bool) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    from megavlm.models.init import initialise
    from megavlm.parallel.context import enter_grid

    model, layout = tiny_model_config(), ParallelConfig(**parallel)
    ctx = enter_grid(layout, torch.device("cpu"), 1)
    modules = tiny_chunks(model, ctx, layout, text_only=text_only)
    initialise(modules, model, 0, ctx)
    batch = tiny_batch(model, images_per_sample=(0, 0, 0))
    with FlopCounterMode(display=False) as counter:
        modules[0](batch).total.backward()
    if not text_only:
        assert all(p.grad is not None and not p.grad.any() for p in modules[0].projector.parameters())  # type: ignore[union-attr, operator]
    return int(counter.get_total_flops())


def test_an_encoder_without_a_picture_computes_nothing(pool: RankPool) -> None:
    """It takes part in reductions (every weight gets a gradient of zero) without a single FLOP."""
    with_encoder = pool.run(flops_of_a_text_microbatch, {"overlap_grad_reduce": True}, False)[0]
    assert with_encoder == pool.run(flops_of_a_text_microbatch, {}, True)[0] > 0


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"zero": 3, "overlap_grad_reduce": True}, "leave overlap_grad_reduce out"),
        ({"zero": 3, "overlap_param_gather": True}, "needs zero=1"),
        ({"zero": 1, "distributed_optimizer": True}, "earlier name"),
    ],
)
def test_what_cannot_be_is_refused(parallel: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParallelConfig.model_validate(parallel)


def test_the_switch_of_earlier_recipes_is_understood() -> None:
    assert ParallelConfig.model_validate({"distributed_optimizer": True}).zero == 1
    assert ParallelConfig.model_validate({"distributed_optimizer": False}).zero == 0
