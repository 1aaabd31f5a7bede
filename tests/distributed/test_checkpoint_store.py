"""Loading by module, and everything that can be wrong with a checkpoint: one clear error on all ranks, never a hang."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.checkpoint import optimizer_state, saver, store
from megavlm.checkpoint.errors import CheckpointError
from megavlm.checkpoint.retention import Rules, prune
from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.models.init import initialise
from megavlm.models.weights import sharding_metadata
from megavlm.parallel.context import ParallelContext, enter_grid
from megavlm.testing.pool import RankPool
from megavlm.testing.tiny import tiny_batch, tiny_chunks, tiny_model_config
from megavlm.training.build import StageModel, wrap_for_training
from megavlm.training.step import train_step

CPU = torch.device("cpu")
ZERO = {"zero": 1}


def build(
    layout: dict[str, Any], *, dtype: str = "fp32", seed: int = 0, frozen: tuple[str, ...] = (), text_only: bool = False, **language: Any
) -> tuple[StageModel, ParallelContext]:
    """A tiny model ready to train."""
    model, parallel = tiny_model_config(**language), ParallelConfig(**layout)
    ctx = enter_grid(parallel, CPU, seed=1)
    modules = tiny_chunks(model, ctx, parallel, dtype=dtype, text_only=text_only)
    initialise(modules, model, seed, ctx)
    stage = {"name": "s", "steps": 9, "mixture": {"a": 1.0}, **{m: {"train": "frozen" if m in frozen else "full"} for m in MODULES}}
    values = {"run": {"dir": "unused"}, "model": model.model_dump(), "precision": {"dtype": dtype}}
    recipe = Recipe.model_validate(values | {"data": {"sources": {"a": {"path": "unused"}}}, "stages": [stage]})
    return wrap_for_training(modules, recipe, recipe.stages[0], parallel), ctx


MODULES = ("vision", "projector", "language")


def save_one(path: Path, layout: dict[str, Any], steps: int = 1, **kwargs: Any) -> dict[str, Any]:
    model, ctx = build(layout, **kwargs)
    batch = tiny_batch(tiny_model_config(), seq_len_tokens=96, images_per_sample=(0, 0, 0) if kwargs.get("text_only") else (1, 0, 2))
    for _ in range(steps):
        train_step(model, [batch], ["tiny"], ctx)
    store.save(path, model.modules, model.optimizer, {"step": steps}, ctx)
    return store.read_state(path)


def load_one(path: Path, layout: dict[str, Any], modules: set[str] | None, with_optimizer: bool, **kwargs: Any) -> dict[str, float]:
    """Load; returns the largest change of any weight, by module (0 where nothing was loaded)."""
    model, ctx = build(layout, seed=77, **kwargs)
    before = {n: p.detach().clone() for n, p in model.modules[0].named_parameters()}
    store.load(path, model.modules, model.optimizer if with_optimizer else None, ctx, modules=modules)
    changes: dict[str, float] = {}
    for name, parameter in model.modules[0].named_parameters():
        module = name.split(".", 1)[0]
        changes[module] = max(changes.get(module, 0.0), float((parameter - before[name]).detach().abs().max()))
    return changes


def test_state_says_what_is_held(pool: RankPool, tmp_path: Path) -> None:
    state = pool.run(save_one, tmp_path / "00000001-a", {"pipeline": 2}, world_size=2)[0]
    assert state["held"] == ["language", "projector", "vision"]
    assert state["modules"] == dict.fromkeys(state["held"], "00000001-a")
    assert (state["step"], state["optimizer_step"], state["has_optimizer"], state["format"]) == (1, 1, True, 1)
    assert store.module_folders(tmp_path / "00000001-a")["vision"] == tmp_path / "00000001-a"


def test_only_the_modules_that_are_asked_for_change(pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "00000001-a"
    pool.run(save_one, path, {"tensor": 2}, world_size=2)
    changes = pool.run(load_one, path, {}, {"vision", "projector"}, False)[0]
    assert changes["vision"] > 0.1 and changes["projector"] > 0.1 and changes["language"] == 0.0
    # The second stage holds neither of the two, and takes part all the same.
    first, second = pool.run(load_one, path, {"pipeline": 2}, {"vision"}, False, world_size=2)
    assert first["vision"] > 0.1 and first["language"] == 0.0 and second == {"language": 0.0}


def test_a_text_only_checkpoint_has_no_encoder(pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "00000001-text"
    assert pool.run(save_one, path, {}, text_only=True)[0]["held"] == ["language"]
    assert pool.run(load_one, path, {"tensor": 2}, {"language"}, False, world_size=2)[0]["vision"] == 0.0
    with pytest.raises(AssertionError, match="holds language, not vision"):
        pool.run(load_one, path, {"tensor": 2}, {"language", "vision"}, False, world_size=2)


@pytest.mark.parametrize(
    "saved, loaded, with_optimizer, message",
    [
        ({}, {"num_layers": 8}, False, "lacks .*layers.4.* holds another model"),
        ({}, {"ffn_hidden_size": 192}, False, r"linear_fc1.weight has shape \(192, 48\), the recipe's model block makes it \(384, 48\)"),
        ({}, {"qkv_bias": True}, False, "lacks .*linear_qkv.bias"),
        ({"frozen": ("vision",)}, {}, True, "no optimizer state for .*vision.*another set of trainable modules"),
        ({}, {"dtype": "bf16"}, True, "no optimizer state for .*another precision.dtype"),
    ],
)
def test_another_model_is_refused(
    pool: RankPool, tmp_path: Path, saved: dict[str, Any], loaded: dict[str, Any], with_optimizer: bool, message: str
) -> None:
    pool.run(save_one, tmp_path / "00000001-a", {}, **saved)
    with pytest.raises(AssertionError, match=message):
        pool.run(load_one, tmp_path / "00000001-a", {"tensor": 2}, None, with_optimizer, world_size=2, **loaded)


def flip_a_bit(path: Path) -> None:
    shard = max(path.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize(
    "damage, message",
    [
        (flip_a_bit, "changed since it was written"),
        (lambda p: min(p.glob("*.distcp")).unlink(), "distcp is missing"),
        (lambda p: (p / ".metadata").unlink(), ".metadata is missing"),
        (lambda p: (p / "state.json").unlink(), "no state.json"),
        (shutil.rmtree, "there is no such folder"),
    ],
)
def test_damage_is_one_error_on_every_rank(pool: RankPool, tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "00000001-a"
    pool.run(save_one, path, ZERO, world_size=2)
    damage(path)
    with pytest.raises(AssertionError, match=f"CheckpointError: .*{message}"):
        pool.run(load_one, path, {"pipeline": 2}, None, True, world_size=2)


def save_where_a_rank_cannot_write(path: Path) -> str:
    model, ctx = build({})
    original = saver._write_file

    def fail(*arguments: Any) -> Any:
        if ctx.rank == 1:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    saver._write_file = fail
    try:
        store.save(path, model.modules, model.optimizer, {}, ctx)
    except CheckpointError as error:
        return str(error)
    finally:
        saver._write_file = original
    return "saved"


def test_a_folder_that_cannot_be_made(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AssertionError, match="CheckpointError: .*rank 0 could not write: .*Not a directory"):
        pool.run(save_one, tmp_path / "file" / "00000001-a", {}, world_size=2)


def save_where_each_rank_sees_its_own(root: Path) -> None:
    model, ctx = build({})
    store.save(root / str(ctx.rank) / "00000001-a", model.modules, None, {}, ctx)


def test_a_folder_that_not_all_nodes_share(pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="__1_0.distcp is not there, as rank 0 sees it: every node must see the same run.dir"):
        pool.run(save_where_each_rank_sees_its_own, tmp_path, world_size=2)
    assert not list(tmp_path.glob("*/00000001-a"))


def test_a_full_disk_leaves_the_older_checkpoint_alone(pool: RankPool, tmp_path: Path) -> None:
    run = tmp_path / "checkpoints"
    pool.run(save_one, run / "00000001-a", {}, world_size=2)
    messages = pool.run(save_where_a_rank_cannot_write, run / "00000002-a", world_size=2)
    assert all("No space left on device" in m for m in messages)
    assert store.newest(tmp_path) == run / "00000001-a"
    # The same ranks save again: nothing of the failed save may be left in them.
    pool.run(save_one, run / "00000003-a", {}, world_size=2)
    pool.run(load_one, run / "00000003-a", {}, None, True, world_size=2)
    shutil.rmtree(run / "00000003-a")
    prune(tmp_path, Rules(keep_last=1))
    assert [p.name for p in run.iterdir() if p.is_dir()] == ["00000001-a"]


def padded_rows(path: Path) -> float:
    """Rows of padding after loading from a layout with another padding; they are never trained and must stay zero."""
    model, ctx = build({"tensor": 2}, seed=5)
    store.load(path, model.modules, model.optimizer, ctx)
    weight = model.modules[0].language.embedding.word_embeddings.weight
    real = 101 - ctx.tensor_rank * weight.shape[0]
    return float(weight[real:].detach().abs().max()) if real < weight.shape[0] else 0.0


def test_vocabulary_padding_follows_the_layout_and_stays_zero(pool: RankPool, tmp_path: Path) -> None:
    pool.run(save_one, tmp_path / "00000001-a", {})
    assert pool.run(padded_rows, tmp_path / "00000001-a", world_size=2) == [0.0, 0.0]


# ------------------------------------------------------------------------------------------- megatron-core's traps


def own_steps(path: Path) -> tuple[int, int, set[float]]:
    model, ctx = build(ZERO, seed=3)
    store.load(path, model.modules, model.optimizer, ctx)
    (part,) = model.optimizer.chained_optimizers
    steps = [s["step"] for s in part.optimizer.state.values()]
    return len(steps), len({id(s) for s in steps}), {float(s) for s in steps}


def test_every_parameter_counts_its_own_steps(pool: RankPool, tmp_path: Path) -> None:
    """megatron-core's load hands all parameters one tensor, which N parameters then increment N times an update."""
    pool.run(save_one, tmp_path / "00000002-a", ZERO, steps=2, world_size=2)
    number, distinct, values = pool.run(own_steps, tmp_path / "00000002-a", world_size=2)[0]
    assert number == distinct > 10 and values == {2.0}


def traps() -> dict[str, str]:
    """What megatron-core's own methods do. When one of these no longer fails, our way round it can go."""
    model, ctx = build(ZERO, dtype="bf16")
    (part,) = model.optimizer.chained_optimizers
    sharded = model.modules[0].sharded_state_dict(metadata=sharding_metadata(ctx))
    found = {}
    try:
        part.state_dict()
    except AssertionError:
        found["state_dict before the first step"] = "AssertionError"
    optimizer_state.tensors(model.optimizer)
    state = part.sharded_state_dict(sharded, metadata=sharding_metadata(ctx))
    loaded = {k: {n: t.data for n, t in v.items() if hasattr(t, "local_shape")} for k, v in state["param_state"].items()}
    try:
        part.load_parameter_state_from_fully_reshardable({k: v for k, v in loaded.items() if v})
    except KeyError as error:
        found["fully_reshardable"] = f"KeyError {error}"
    part.load_state_dict(part.state_dict())
    steps = [s["step"] for s in part.optimizer.state.values()]
    found["tensors of step"] = "shared" if len({id(s) for s in steps}) < len(steps) else "own"
    return found


def test_the_traps_are_still_there(pool: RankPool) -> None:
    found = pool.run(traps)[0]
    assert found["state_dict before the first step"] == "AssertionError"
    assert found["tensors of step"] == "shared"


def makes_on_meta() -> bool:
    with torch.device("meta"):
        return torch.arange(3).is_meta and torch.empty(2).is_meta


def test_device_contexts_reach_wrapped_factories(pool: RankPool) -> None:
    """transformers loads on meta."""
    assert pool.run(makes_on_meta) == [True]


def draws(layout: dict[str, Any]) -> bool:
    """Is the generator, which is the only one on a CPU, elsewhere after two steps?"""
    model, ctx = build(layout)
    batch = tiny_batch(tiny_model_config(), seq_len_tokens=96)
    before = torch.get_rng_state().clone()
    for _ in range(2):
        train_step(model, [batch], ["tiny"], ctx)
    return not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence": True}, {"recompute": "full", "zero": 3}])
def test_a_step_draws_no_random_number(pool: RankPool, layout: dict[str, Any]) -> None:
    """Or checkpoints would have to hold the generators' states."""
    assert pool.run(draws, layout, world_size=2) == [False, False]
