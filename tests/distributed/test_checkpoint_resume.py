"""Save in one layout, go on training, load in another: the losses go on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megavlm.checkpoint import store
from megavlm.config.schema import ModelConfig, ParallelConfig, Recipe
from megavlm.data.types import PackedBatch
from megavlm.models.init import initialise
from megavlm.parallel.context import enter_grid
from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankPool
from megavlm.testing.tiny import tiny_batch, tiny_chunks, tiny_model_config
from megavlm.training.build import wrap_for_training
from megavlm.training.step import train_step

GLOBAL_BATCH = 4
IMAGES = [(1, 0, 2), (0, 0, 0), (2, 1, 0), (0, 3, 1)]
FREEZING: dict[str, dict[str, Any]] = {
    "all": {"vision": {"train": "full"}},
    "projector": {"vision": {"train": "frozen"}, "language": {"train": "frozen"}},
    "partial": {"vision": {"train": "last_layers", "last_layers": 1}, "language": {"train": "last_layers", "last_layers": 1}},
}


def make_recipe(model: ModelConfig, freezing: str, dtype: str) -> Recipe:
    stage = {
        "name": "s",
        "steps": 9,
        "mixture": {"a": 1.0},
        "optimizer": {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.1},
        **FREEZING[freezing],
    }
    return Recipe.model_validate(
        {
            "run": {"dir": "unused"},
            "model": model.model_dump(),
            "precision": {"dtype": dtype},
            "data": {"sources": {"a": {"path": "unused"}}},
            "stages": [stage],
        }
    )


def microbatches(model: ModelConfig, step: int, data_rank: int, data_size: int) -> list[PackedBatch]:
    """This rank's part of a global batch with unequal images and targets; 96 rows each, as pipeline messages want."""
    each = GLOBAL_BATCH // data_size
    numbers = range(data_rank * each, (data_rank + 1) * each)
    return [
        tiny_batch(model, seed=97 * step + n, images_per_sample=IMAGES[(n + step) % 4], seq_len_tokens=96, num_targets=5 + 2 * n)
        for n in numbers
    ]


class Run:
    """A model in training form on this rank."""

    def __init__(self, layout: dict[str, Any], freezing: str, dtype: str, *, tie: bool = False, seed: int = 0) -> None:
        self.config = tiny_model_config(tie_embeddings=tie)
        self.parallel = ParallelConfig(**layout)
        self.ctx = enter_grid(self.parallel, torch.device("cpu"), seed=1)
        self.recipe = make_recipe(self.config, freezing, dtype)
        modules = tiny_chunks(self.config, self.ctx, self.parallel, dtype=dtype)
        initialise(modules, self.config, seed, self.ctx)
        self.model = wrap_for_training(modules, self.recipe, self.recipe.stages[0], self.parallel)
        for group in self.model.optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-3, group["wd_mult"]

    def train(self, first: int, last: int) -> list[float]:
        numbers = []
        for step in range(first, last):
            batches = microbatches(self.config, step, self.ctx.data_rank, self.ctx.grid.data)
            loss, norm = train_step(self.model, batches, ["tiny"], self.ctx)
            numbers += [loss.loss, norm]
        return numbers


def save_then_go_on(path: Path, layout: dict[str, Any], freezing: str, dtype: str, steps: int = 3, **kwargs: Any) -> list[float]:
    run = Run(layout, freezing, dtype, **kwargs)
    run.train(0, steps)
    store.save(path, run.model.modules, run.model.optimizer, {"step": steps}, run.ctx)
    assert not psutil.Process().children(), "the writer left processes behind"
    return run.train(steps, steps + 3)


def load_and_go_on(path: Path, layout: dict[str, Any], freezing: str, dtype: str, **kwargs: Any) -> list[float]:
    run = Run(layout, freezing, dtype, seed=99, **kwargs)
    state = store.load(path, run.model.modules, run.model.optimizer, run.ctx)
    return run.train(state["step"], state["step"] + 3)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pp2-0+4": (2, {"pipeline": 2, "layers_per_stage": [0, 4]}),
    "pp3-1+3+0": (3, {"pipeline": 3, "layers_per_stage": [1, 3, 0]}),
    "pp2vpp2-0+1+2+1-zero": (4, {"pipeline": 2, "virtual_pipeline": 2, "layers_per_stage": [0, 1, 2, 1], "zero": 1}),
    "dp2": (2, {}),
    "dp2zero": (2, {"zero": 1}),
    "dp2zero-overlap": (2, {"zero": 1, "overlap_grad_reduce": True}),
    "cp2": (2, {"context": 2}),
    "tp2pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2dp2zero": (4, {"tensor": 2, "zero": 1}),
    "tp2pp2dp2zero": (8, {"tensor": 2, "pipeline": 2, "zero": 1}),
    "dp2zero2": (2, {"zero": 2}),
    "dp2zero3": (2, {"zero": 3}),
    "tp2dp2zero3": (4, {"tensor": 2, "zero": 3}),
    "pp2dp2zero3": (4, {"pipeline": 2, "zero": 3}),
}


def go(pool: RankPool, function: Any, path: Path, layout: str, *args: Any, **kwargs: Any) -> list[float]:
    world_size, parallel = LAYOUTS[layout]
    return pool.run(function, path, parallel, *args, world_size=world_size, **kwargs)[0]


def slow_but(params: list[Any], *quick: int) -> list[Any]:
    """All of `params` for `make test-all`, those at `quick` for every run."""
    wrapped = [p if isinstance(p, tuple) else (p,) for p in params]
    return [pytest.param(*p, marks=[] if i in quick else pytest.mark.slow) for i, p in enumerate(wrapped)]


@pytest.mark.parametrize("layout", slow_but(list(LAYOUTS), 0, 4, 7, 10, 13, 17))
def test_same_layout_is_bit_exact(pool: RankPool, tmp_path: Path, layout: str) -> None:
    expected = go(pool, save_then_go_on, tmp_path / "00000003-s", layout, "all", "fp32")
    assert go(pool, load_and_go_on, tmp_path / "00000003-s", layout, "all", "fp32") == expected


RESHARDINGS = [
    ("tp2", ["pp2", "dp2zero", "1"]),
    ("pp2vpp2", ["1", "tp2sp", "tp2pp2"]),
    ("dp2zero", ["1", "pp2vpp2", "tp2dp2zero"]),
    ("1", ["dp2zero-overlap", "cp2"]),
    ("tp2pp2dp2zero", ["dp2", "dp2zero-overlap"]),
    ("pp2-0+4", ["pp3-1+3+0", "pp2vpp2-0+1+2+1-zero", "1"]),
    ("pp2vpp2-0+1+2+1-zero", ["pp2-0+4", "pp2vpp2", "tp2"]),
    ("tp2", ["pp3-1+3+0"]),
    ("dp2zero3", ["1", "tp2", "dp2zero", "tp2dp2zero3"]),
    ("dp2zero", ["dp2zero3"]),
    ("pp2dp2zero3", ["dp2zero2", "tp2"]),
]


@pytest.mark.parametrize("source, targets", slow_but(RESHARDINGS, 0, 1, 2, 5, 6, 8, 9))
def test_any_layout_loads_into_any_other(pool: RankPool, tmp_path: Path, source: str, targets: list[str]) -> None:
    expected = torch.tensor(go(pool, save_then_go_on, tmp_path / "00000003-s", source, "all", "fp32"))
    for target in targets:
        got = torch.tensor(go(pool, load_and_go_on, tmp_path / "00000003-s", target, "all", "fp32"))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=lambda m, t=target: f"{t}: {m}")


@pytest.mark.parametrize("freezing", slow_but(list(FREEZING), 1, 2))
def test_masters_and_ranks_that_train_nothing(pool: RankPool, tmp_path: Path, freezing: str) -> None:
    """bf16 with fp32 masters. Without tensor parallelism these layouts do the same arithmetic: a master that was lost and
    drawn from the bf16 weights again would be off by 1e-3 (the tolerance that tensor parallelism, in another order, needs)."""
    expected = torch.tensor(go(pool, save_then_go_on, tmp_path / "00000003-s", "dp2zero", freezing, "bf16"))
    for target, rtol in (("dp2zero", 0.0), ("1", 1e-6), ("pp2", 1e-6), ("tp2pp2", 3e-2)):
        got = torch.tensor(go(pool, load_and_go_on, tmp_path / "00000003-s", target, freezing, "bf16"))
        torch.testing.assert_close(got, expected, rtol=rtol, atol=0.0, msg=lambda m, t=target: f"{t}: {m}")


@pytest.mark.parametrize("freezing", slow_unless(FREEZING, lambda freezing: freezing == "partial"))
def test_fp32_parameters_of_zero_3_are_masters(pool: RankPool, tmp_path: Path, freezing: str) -> None:
    """Stored as masters beside bf16 weights, and taken from them: in both directions, with modules that are frozen."""
    for source, target in (("dp2zero3", "dp2zero3"), ("dp2zero3", "1"), ("1", "dp2zero3")):
        folder = tmp_path / f"{source}-{target}" / "00000003-s"
        folder.parent.mkdir()
        expected = torch.tensor(go(pool, save_then_go_on, folder, source, freezing, "bf16"))
        got = torch.tensor(go(pool, load_and_go_on, folder, target, freezing, "bf16"))
        rtol = 0.0 if source == target else 1e-5
        torch.testing.assert_close(got, expected, rtol=rtol, atol=0.0, msg=lambda m, t=f"{source} to {target}": f"{t}: {m}")


@pytest.mark.parametrize("source, target", slow_but([("pp2", "dp2zero"), ("dp2zero", "pp2"), ("tp2", "1"), ("pp2-0+4", "pp3-1+3+0")], 0, 3))
def test_tied_embeddings(pool: RankPool, tmp_path: Path, source: str, target: str) -> None:
    expected = torch.tensor(go(pool, save_then_go_on, tmp_path / "00000003-s", source, "all", "fp32", tie=True))
    got = torch.tensor(go(pool, load_and_go_on, tmp_path / "00000003-s", target, "all", "fp32", tie=True))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", slow_but(["1", "dp2zero"], 1))
def test_before_the_first_step(pool: RankPool, tmp_path: Path, layout: str) -> None:
    expected = go(pool, save_then_go_on, tmp_path / "00000000-s", layout, "all", "bf16", 0)
    assert go(pool, load_and_go_on, tmp_path / "00000000-s", layout, "all", "bf16") == expected
