"""When and what the loop saves, and where a run goes on and a stage's weights come from."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megavlm.checkpoint import folders, random_states, resume, store
from megavlm.checkpoint.errors import DiskFull, SaveFailed
from megavlm.checkpoint.hf import start_from
from megavlm.checkpoint.retention import HELD_OUT_LOSS, Rules, prune, prune_local, remove_strangers
from megavlm.checkpoint.saver import Outcome, Saver
from megavlm.checkpoint.shares import Nodes
from megavlm.config.schema import ParallelConfig, Recipe, StageConfig
from megavlm.parallel.context import ParallelContext
from megavlm.parallel.reductions import any_rank, from_rank_zero, union_over_ranks
from megavlm.training.build import StageModel, build_chunks, wrap_for_training
from megavlm.training.layout import stage_layout
from megavlm.training.local_saves import LocalSaves, News
from megavlm.training.loss_scale import restore_scaler, scaler_state
from megavlm.training.state import RunState


def checkpoint_root(recipe: Recipe) -> Path:
    """Folder of a run's checkpoints."""
    return Path(recipe.run.dir) / folders.CHECKPOINTS


def local_run_dir(recipe: Recipe) -> Path | None:
    """The run's folder in the local tier, with one for each node in it; None without a local tier."""
    if recipe.checkpoint.local is None:
        return None
    return folders.local_run_dir(recipe.checkpoint.local.dir, recipe.run.name, recipe.run.dir)


def resume_point(recipe: Recipe) -> RunState:
    """State of the newest good checkpoint, or the beginning; `warnings` tells of damaged ones that were passed over. All ranks call this.

    Raises ValueError when checkpoint.resume is off and run.dir already holds checkpoints: a run is never overwritten. Raises
    CheckpointError when there are checkpoints and none is good, or when nobody can tell now.
    """
    if not recipe.checkpoint.resume:
        there = store.everywhere(lambda: bool(folders.named(recipe.run.dir)) if dist.get_rank() == 0 else None, "the run's checkpoints")
        if from_rank_zero(there):
            raise ValueError(f"{checkpoint_root(recipe)} already holds checkpoints and checkpoint.resume is false: choose another run.dir")
    local = local_run_dir(recipe)
    found = resume.find(recipe.run.dir, local, None if local is None else _fits(recipe))
    if found.path is None:
        return RunState(model=recipe.model.model_dump(mode="json"), dtype=recipe.precision.dtype, warnings=found.warnings)
    state = RunState.from_json(found.state, recipe)
    state.source, state.warnings = str(found.path), found.warnings
    return state


def _fits(recipe: Recipe) -> dict[str, Any]:
    """What must not have changed for a node's own checkpoint to be of use: the run, who is on which node, and what each rank holds."""
    layouts = [stage_layout(recipe.parallel, stage, recipe.model).model_dump(mode="json") for stage in recipe.stages]
    text = repr((layouts, recipe.parallel.split, [stage.packs_per_step for stage in recipe.stages]))
    return {
        "run": resume.run_id(recipe.run.dir),
        "node_of_rank": list(Nodes.agree().of_rank),
        "layout": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def prepare_model(recipe: Recipe, stage: StageConfig, layout: ParallelConfig, state: RunState, ctx: ParallelContext) -> StageModel:
    """The stage's model with its weights, ready to train.

    In the middle of a stage everything comes from that stage's checkpoint. At its beginning each module comes from the
    newest checkpoint that holds it; one that no stage has trained yet comes from the folders of `init`, or is drawn from the seed.
    """
    modules = build_chunks(recipe, stage, layout, ctx)
    root = checkpoint_root(recipe)
    if state.stage_step > 0:
        model = wrap_for_training(modules, recipe, stage, layout)
        # Its checksums have been compared just now, when it was chosen.
        source = Path(state.source) if state.source else root / state.checkpoint
        loaded = store.load(source, model.modules, model.optimizer, ctx, verify=not state.source)
        restore_scaler(model.optimizer, state.loss_scaler)
        is_same = loaded.get("grid") == random_states.grid_of(ctx)
        has_own = is_same and store.everywhere(lambda: random_states.restore(source, ctx), f"loading {source}")
        if any_rank(not has_own, ctx.device):  # all or none: some of their generators must agree
            random_states.seed_anew(recipe.run.seed, state.step, ctx)
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
    model = wrap_for_training(modules, recipe, stage, layout)
    random_states.seed_anew(recipe.run.seed, state.step, ctx)
    return model


class Checkpointer:
    """Saves one stage's model: to <run.dir>/checkpoints/<step>-<stage>, and to the node's own disk where the recipe says so.

    Every rank calls the same methods at the same steps. A save is under way until `advance` or `wait` tells how it ended.
    """

    def __init__(self, recipe: Recipe, stage: StageConfig, model: StageModel, ctx: ParallelContext) -> None:
        self.recipe, self.stage, self.model, self.ctx = recipe, stage, model, ctx
        self.config, self.root = recipe.checkpoint, checkpoint_root(recipe)
        self.local_news: News | None = None
        """What is to be told of the local save that ended last."""
        self._local: Path | None = None
        self._fits: dict[str, Any] = {}
        self._local_saves = None if self.config.local is None else LocalSaves(self.config.local.every_steps)
        if (local := local_run_dir(recipe)) is not None:
            nodes = Nodes.agree()
            self._local = local / nodes.name(ctx.rank)
            self._fits = {**_fits(recipe), resume.NODE: nodes.of_rank[ctx.rank]}
            if ctx.rank == nodes.leader(ctx.rank):  # before the first save, which may need the room
                remove_strangers(local, nodes.names)
        self._saver: Saver | None = None
        self._pending: dict[str, Any] = {}
        self._held_out: tuple[int, float] | None = None
        if self.config.local is not None or (self.config.asynchronous and self.config.every_steps is not None):
            self._make_saver().warm_up()

    @property
    def host_bytes(self) -> int:
        """Host memory that this rank saves from; 0 before the first save where none is made during a stage."""
        return 0 if self._saver is None else self._saver.host_bytes

    def measured(self, step: int, held_out_loss: float) -> None:
        """The held-out loss of the weights after so many steps."""
        self._held_out = step, held_out_loss

    def is_due(self, state: RunState) -> bool:
        """Is a checkpoint to be written after this step, in the middle of the stage?"""
        every = self.config.every_steps
        return every is not None and state.step % every == 0 and state.stage_step < self.stage.steps

    def is_local_due(self, state: RunState) -> bool:
        """Is a local one? Not where a durable one is, nor while another save is under way."""
        if self._local_saves is None or self.is_due(state) or self.is_busy or state.stage_step >= self.stage.steps:
            return False
        return self._local_saves.is_due(state.step)

    @property
    def is_busy(self) -> bool:
        """Is a save under way?"""
        return self._saver is not None and self._saver.is_busy

    def begin(self, state: RunState) -> None:
        """Begin to save the state of now; training may go on. None may be under way."""
        name = f"{state.step:08d}-{self.stage.name}"
        state.loss_scaler = scaler_state(self.model.optimizer)
        saver = self._make_saver()
        self._pending = {"checkpoint": name, "modules": {**state.modules, **dict.fromkeys(saver.shares.held, name)}}
        loss = self._held_out[1] if self._held_out is not None and self._held_out[0] == state.step else None
        saver.begin(self.root / name, {**state.to_json(), **self._pending, HELD_OUT_LOSS: loss})

    def begin_local(self, state: RunState) -> None:
        """Begin to save to this node's own disk."""
        assert self._local is not None
        name = f"{state.step:08d}-{self.stage.name}"
        state.loss_scaler = scaler_state(self.model.optimizer)
        saver = self._make_saver()
        saved = {**state.to_json(), "checkpoint": name, resume.LOCAL: self._fits, resume.SAVE: saver.next_save}
        saver.begin(self._local / folders.CHECKPOINTS / name, saved, is_local=True)

    def progress(self) -> list[int]:
        """What `advance` wants the largest of over all ranks."""
        return [0, 0] if self._saver is None else self._saver.progress()

    def advance(self, agreed: list[int], state: RunState) -> Outcome | None:
        """Go on with a save that is under way; returns how it ended when it has."""
        outcome = None if self._saver is None else self._saver.advance(agreed)
        return self._settled(outcome, state)

    def wait(self, state: RunState, *, is_last: bool = False) -> Outcome | None:
        """Until the save that is under way has ended. Nothing can make up for the last one of a stage: its failure is an error."""
        outcome = None if self._saver is None else self._saver.wait()
        return self._settled(outcome, state, is_last=is_last)

    def _settled(self, outcome: Outcome | None, state: RunState, *, is_last: bool = False) -> Outcome | None:
        """Note a save that ended in the run's state; raises SaveFailed where its failure ends the run."""
        if outcome is None:
            return None
        if outcome.is_local:
            assert self._local_saves is not None
            self.local_news = self._local_saves.ended(outcome)
            return outcome
        if outcome.error is None:
            state.checkpoint = self._pending["checkpoint"]
            state.modules.update(self._pending["modules"])
            return outcome
        if not outcome.is_full:
            raise SaveFailed(outcome.error)
        if is_last or self.config.on_disk_full == "exit":
            raise DiskFull(f"{outcome.error}. Earlier checkpoints are as they were: make room, and start again")
        return outcome

    def _make_saver(self) -> Saver:
        if self._saver is None:
            self._saver = Saver(
                self.model.modules, self.model.optimizer, self.ctx, timeout_s=self.config.timeout_s, on_nodes=self._local is not None
            )
            self._saver.after = self._tidy_up
        return self._saver

    def _tidy_up(self, path: Path, is_local: bool) -> None:
        """Behind a checkpoint, in a thread."""
        if is_local:
            assert self._local is not None and self.config.local is not None and self._saver is not None
            prune_local(self._local, self.config.local.keep_last, path.name, self._saver.attempts)
        else:
            config = self.config
            # One of a later step may be there that could not be read at the start.
            rules = Rules(config.keep_last, config.keep_every_steps, config.keep_best, frozenset({path.name}))
            prune(self.recipe.run.dir, rules)


def remove_local(recipe: Recipe) -> None:
    """The run is done: what lies on this node's own disk is of no use any more. Every rank may call this."""
    local = local_run_dir(recipe)
    if local is not None:
        shutil.rmtree(local, ignore_errors=True)
