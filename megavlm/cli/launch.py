"""`megavlm launch`: start a run here, or submit it to SLURM."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megavlm.config import Recipe
    from megavlm.config.cluster import ClusterConfig
    from megavlm_launchers.sbatch import SlurmJob


class Place(StrEnum):
    """Where ranks start."""

    local = "local"
    slurm = "slurm"


def launch(
    recipe: Annotated[Path, typer.Argument(help="YAML file of the run; see configs/recipes.", metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes: parallel.tensor=2", metavar="[KEY=VALUE]...")] = None,
    on: Annotated[Place, typer.Option("--on", help="This machine, or a SLURM cluster.")] = Place.local,
    nproc: Annotated[int | None, typer.Option("--nproc", min=1, help="Ranks, with --on local.")] = None,
    cluster: Annotated[
        Path | None, typer.Option("--cluster", envvar="MEGAVLM_CLUSTER", help="Facts of the cluster: configs/clusters/*.yaml.")
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1)] = None,
    gpus_per_node: Annotated[int | None, typer.Option("--gpus-per-node", min=0)] = None,
    ranks_per_node: Annotated[int | None, typer.Option("--ranks-per-node", min=1, help="Else one for each GPU.")] = None,
    partition: Annotated[str | None, typer.Option("--partition")] = None,
    account: Annotated[str | None, typer.Option("--account")] = None,
    qos: Annotated[str | None, typer.Option("--qos")] = None,
    time: Annotated[str | None, typer.Option("--time", help="Limit of one job, such as 24:00:00.")] = None,
    container: Annotated[str | None, typer.Option("--container", help="Image, entered as the cluster's file says (pyxis).")] = None,
    array_chain: Annotated[
        int | None, typer.Option("--array-chain", min=1, help="So many jobs one after the other, where a job may not be requeued.")
    ] = None,
    env_file: Annotated[Path | None, typer.Option("--env-file", help="NAME=value a line, read when the job starts.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, the rank grid and the memory, and submit nothing.")] = False,
) -> None:
    """Start a run on this machine or submit it to SLURM; `megavlm jobs` tells how it goes."""
    from megavlm.cli.recipes import load

    loaded = load(recipe, overrides)
    given = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "ranks_per_node": ranks_per_node,
        "partition": partition,
        "account": account,
        "qos": qos,
        "time": time,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if on is Place.local:
        _refuse_options_of_slurm({**given, "container": container, "array_chain": array_chain, "env_file": env_file})
        raise typer.Exit(_here(loaded, recipe, overrides or [], nproc, dry_run))
    if nproc is not None:
        raise typer.BadParameter("on slurm there is a rank for each GPU: --nodes and --gpus-per-node say how many", param_hint="--nproc")
    facts = _facts(cluster, given, container)
    _submit(loaded, facts, recipe, array_chain, env_file, dry_run)


def _refuse_options_of_slurm(given: dict[str, Any]) -> None:
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise typer.BadParameter("is for --on slurm", param_hint=", ".join(f"--{name.replace('_', '-')}" for name in named))


def _here(recipe: Recipe, path: Path, overrides: list[str], nproc: int | None, dry_run: bool) -> int:
    import os
    import time

    from megavlm.cli.train import launch as launch_here
    from megavlm.cli.train import show
    from megavlm_launchers.jobs import Job, remember

    if dry_run:
        show(recipe, nproc)
        return 0
    remember(Job(f"local-{os.getpid()}", "local", recipe.run.name, str(Path(recipe.run.dir).absolute()), time.time()))
    return launch_here(recipe, path, overrides, nproc)


def _facts(path: Path | None, given: dict[str, Any], container: str | None) -> ClusterConfig:
    """The cluster's file with what the command line says."""
    from megavlm.config.cluster import ClusterConfig, checked_cluster, load_cluster

    facts = load_cluster(path) if path is not None else ClusterConfig()
    values = {**facts.model_dump(mode="json"), **given}
    if container is not None:
        values["container"] = {**(values["container"] or {}), "image": container}
    return checked_cluster(values, f"{path} and the command line" if path else "the command line")


def _submit(recipe: Recipe, facts: ClusterConfig, path: Path, chain: int | None, env_file: Path | None, dry_run: bool) -> None:
    import time

    from megavlm.config.load import dump_recipe
    from megavlm.training.layout import check_layouts
    from megavlm_launchers.errors import LaunchError
    from megavlm_launchers.jobs import Job, remember
    from megavlm_launchers.sbatch import render, submit

    if env_file is not None and not env_file.is_file():
        raise LaunchError(f"--env-file {env_file}: there is no such file")
    check_layouts(recipe, facts.world_size)
    run_dir = Path(recipe.run.dir).absolute()
    own = run_dir / "slurm"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    # A copy: what waits in the queue for days, and starts again, must not change with the file.
    copy, script = own / f"recipe-{stamp}.yaml", own / f"{stamp}.sbatch"
    job = _job(recipe, facts, copy, run_dir, chain, env_file)
    text = render(job)
    if dry_run:
        from megavlm.training.dryrun import dry_run as show

        typer.echo(text)
        show(recipe, facts.world_size, typer.echo, runs_here=False)  # what the nodes have, the login node need not
        return
    own.mkdir(parents=True, exist_ok=True)
    dump_recipe(recipe, copy)
    script.write_text(text, encoding="utf-8")
    number = submit(script)
    remember(Job(number, "slurm", recipe.run.name, str(run_dir), time.time(), str(script), facts.signal))
    typer.echo(f"job {number}: {recipe.run.name} on {facts.nodes} x {facts.ranks} ranks; its log: megavlm jobs logs {number}")


def _job(recipe: Recipe, facts: ClusterConfig, copy: Path, run_dir: Path, chain: int | None, env_file: Path | None) -> SlurmJob:
    import sys

    from megavlm_launchers.sbatch import SlurmJob

    # In a container Python is the image's own.
    python = sys.executable if facts.container is None else "python"
    command = [python, "-m", "megavlm.cli", "train", str(copy)]
    local = recipe.checkpoint.local
    local_dir = None if local is None else Path.cwd() / local.dir
    return SlurmJob(recipe.run.name, facts, command, run_dir, Path.cwd(), env_file.absolute() if env_file else None, chain, local_dir)
