"""`train(recipe)`: what one rank does from start to end."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from megavlm.checkpoint.hf.registering import register_newest
from megavlm.checkpoint.hf.texts import KEPT, keep_texts
from megavlm.config.exits import note_resumed
from megavlm.config.schema import Recipe
from megavlm.parallel.context import choose_device, start_process_group, stop_process_group
from megavlm.tracking.tracker import Tracker
from megavlm.training.checkpointing import remove_local, resume_point
from megavlm.training.data import RunData
from megavlm.training.layout import check_run
from megavlm.training.loop import run_stages
from megavlm.training.sections import Sections
from megavlm.training.signals import StopRequest


def train(recipe: Recipe) -> int:
    """Train the recipe on this rank, resuming where run.dir stands. Returns the exit code: 0, or 128 + signal after a stop."""
    code = _train(recipe)
    if code == 0 and recipe.tracking.register_model is not None and os.environ.get("RANK", "0") == "0":
        # The other ranks have left: writing and uploading a model may take longer than any of their time limits.
        register_newest(recipe)
    return code


def _train(recipe: Recipe) -> int:
    with Sections(recipe) as sections:
        device = choose_device(recipe.run)
        start_process_group(device, recipe.run.distributed_timeout_s)
        try:
            _set_determinism(recipe.run.deterministic)
            check_run(recipe, dist.get_world_size())
            _make_run_dir(recipe)
            state = resume_point(recipe)
            if dist.get_rank() == 0:
                note_resumed(state.step)
            shows_mfu = device.type == "cuda" or recipe.tracking.peak_tflops_per_rank is not None
            with StopRequest() as stop, Tracker(recipe, dist.get_rank(), dist.get_world_size(), shows_mfu=shows_mfu) as tracker:
                tracker.start(state.step)
                if state.step:
                    tracker.message(f"resuming at step {state.step}, stage {recipe.stages[state.stage_index].name}, from {state.source}")
                code = run_stages(recipe, state, RunData(recipe), tracker, stop, device, sections)
                sections.setup()
                if code == 0:
                    remove_local(recipe)
                tracker.finish("FINISHED" if code == 0 else "KILLED")
                dist.barrier()  # SLURM ends all ranks when one has ended with a code: rank 0's last words come first
                return code
        finally:
            stop_process_group()


def _set_determinism(wanted: bool) -> None:
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    # Filling every fresh tensor with NaN is a debugging aid, not a part of determinism.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _make_run_dir(recipe: Recipe) -> None:
    """The folder, and in it the texts of the Hugging Face folder that the run starts from: its export must not need that folder."""
    if dist.get_rank() == 0:
        run_dir = Path(recipe.run.dir)
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        if recipe.init.from_hf is not None and not (run_dir / KEPT).is_dir():
            keep_texts(Path(recipe.init.from_hf), run_dir / KEPT)
    dist.barrier()
