"""`megavlm train`: be the rank that torchrun or SLURM made, or start the ranks here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megavlm.config import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file of the run; see configs/recipes.", metavar="RECIPE.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes: parallel.tensor=2 stages.align.optimizer.lr=1e-3", metavar="[KEY=VALUE]...")
    ] = None,
    nproc: Annotated[int | None, typer.Option("--nproc", min=1, help="Ranks to start here; else run.num_ranks, else a GPU each.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print rank grid, parameters, memory and first step, and stop.")] = False,
) -> None:
    """Train a model as a recipe says; started again, it resumes. Ctrl-C saves and stops."""
    import os

    from megavlm.cli.recipes import load
    from megavlm_launchers.environment import found_ranks
    from megavlm_launchers.slurm import inside_batch_script

    loaded = load(recipe, overrides)
    if dry_run:
        show(loaded, nproc)
        return
    # In the shell of an sbatch script --nproc is an answer to what found_ranks would ask; inside an srun step it may contradict.
    environment = None if nproc and inside_batch_script(os.environ) else found_ranks(os.environ)
    if environment is not None:
        _check_nproc(nproc, environment["WORLD_SIZE"])
        raise typer.Exit(_train_here(loaded, environment))
    raise typer.Exit(launch(loaded, recipe, overrides or [], nproc))


def show(recipe: Recipe, nproc: int | None) -> None:
    """What the run would come to with so many ranks here."""
    import os

    from megavlm.training.dryrun import dry_run

    size = nproc or int(os.environ.get("WORLD_SIZE") or 0) or _num_ranks(recipe)
    dry_run(recipe, size, typer.echo)


def _num_ranks(recipe: Recipe) -> int:
    import os

    from megavlm_launchers.environment import num_visible_gpus

    if recipe.run.num_ranks is not None:
        return recipe.run.num_ranks
    return max(1, num_visible_gpus(os.environ)) if recipe.run.device != "cpu" else 1


def _check_nproc(nproc: int | None, world_size: str) -> None:
    from megavlm_launchers.errors import LaunchError

    if nproc is not None and nproc != int(world_size):
        raise LaunchError(f"--nproc {nproc}, but this is one of {world_size} ranks already: leave --nproc out")


def _train_here(recipe: Recipe, environment: dict[str, str]) -> int:
    import os

    from megavlm.training.run import train as train_rank

    os.environ.update(environment)
    return train_rank(recipe)


def launch(recipe: Recipe, path: Path, overrides: list[str], nproc: int | None) -> int:
    import os
    import sys

    from megavlm_launchers.environment import held_port, rank_environment
    from megavlm_launchers.local import launch_local

    num_ranks = nproc or _num_ranks(recipe)
    if num_ranks == 1:
        with held_port() as port:
            return _train_here(recipe, rank_environment(0, 1, port, os.environ))
    command = [sys.executable, "-m", "megavlm.cli", "train", str(path), *overrides]
    return launch_local(command, num_ranks, log_dir=Path(recipe.run.dir) / "logs")
