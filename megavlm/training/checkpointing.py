"""When and what the loop saves, and where a stage's weights come from."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megavlm.checkpoint import store
from megavlm.checkpoint.hf import start_from
from megavlm.checkpoint.retention import Rules, prune
from megavlm.config.schema import ParallelConfig, Recipe, StageConfig
from megavlm.parallel.context import ParallelContext
from megavlm.parallel.reductions import from_rank_zero, union_over_ranks
from megavlm.training.build import StageModel, build_chunks, wrap_for_training
from megavlm.training.loss_scale import restore_scaler, scaler_state
from megavlm.training.state import RunState


def checkpoint_root(recipe: Recipe) -> Path:
    """Folder of a run's checkpoints."""
    return Path(recipe.run.dir) / "checkpoints"


def resume_point(recipe: Recipe) -> RunState:
    """State of the newest checkpoint in run.dir, or the beginning. All ranks get rank 0's answer.

    Raises ValueError when checkpoint.resume is off and run.dir already holds checkpoints: a run is never overwritten.
    """

    def look() -> RunState | Exception:
        try:
            newest = store.newest(recipe.run.dir)
            if newest is None:
                return RunState(model=recipe.model.model_dump(mode="json"), dtype=recipe.precision.dtype)
            if not recipe.checkpoint.resume:
                raise ValueError(f"{newest.parent} already holds checkpoints and checkpoint.resume is false: choose another run.dir")
            state = RunState.from_json(store.read_state(newest), recipe)
            return state
        except (ValueError, OSError) as error:
            return error

    answer = from_rank_zero(look() if dist.get_rank() == 0 else None)
    if isinstance(answer, Exception):
        raise answer
    assert isinstance(answer, RunState)
    return answer


def prepare_model(recipe: Recipe, stage: StageConfig, layout: ParallelConfig, state: RunState, ctx: ParallelContext) -> StageModel:
    """The stage's model with its weights, ready to train.

    In the middle of a stage everything comes from that stage's checkpoint. At its beginning each module comes from the
    newest checkpoint that holds it; one that no stage has trained yet comes from the folders of `init`, or is drawn from the seed.
    """
    modules = build_chunks(recipe, stage, layout, ctx)
    root = checkpoint_root(recipe)
    if state.stage_step > 0:
        model = wrap_for_training(modules, recipe, stage, layout)
        store.load(root / state.checkpoint, model.modules, model.optimizer, ctx)
        restore_scaler(model.optimizer, state.loss_scaler)
        return model
    start_from(modules, recipe.init, recipe.model, recipe.run.seed, ctx)
    by_folder: dict[str, set[str]] = {}
    for module, folder in state.modules.items():
        by_folder.setdefault(folder, set()).add(module)
    held = {name for chunk in modules for name, _ in chunk.named_children()}
    for folder, names in by_folder.items():
        wanted = names & union_over_ranks(held)
        if wanted:
            store.load(root / folder, modules, None, ctx, modules=wanted)
    return wrap_for_training(modules, recipe, stage, layout)


class Checkpointer:
    """Writes <run.dir>/checkpoints/<step>-<stage> and clears away what the recipe does not keep."""

    def __init__(self, recipe: Recipe, ctx: ParallelContext) -> None:
        self.recipe, self.ctx, self.root = recipe, ctx, checkpoint_root(recipe)

    def save(self, model: StageModel, stage: StageConfig, state: RunState) -> Path:
        """Save model, optimizer and state; the last checkpoint of every stage is kept."""
        folder = f"{state.step:08d}-{stage.name}"
        held = union_over_ranks({name for chunk in model.modules for name, _ in chunk.named_children()})
        state.modules.update(dict.fromkeys(sorted(held), folder))
        state.checkpoint = folder
        state.loss_scaler = scaler_state(model.optimizer)
        path = self.root / folder
        store.save(path, model.modules, model.optimizer, state.to_json(), self.ctx, timeout_s=self.recipe.checkpoint.timeout_s)
        if dist.get_rank() == 0:
            config = self.recipe.checkpoint
            prune(self.recipe.run.dir, Rules(config.keep_last, config.keep_every_steps, config.keep_best))
        dist.barrier()
        return path
