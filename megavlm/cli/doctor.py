"""`megavlm doctor`: what of this machine megavlm can use, what each missing part costs, and what a recipe takes here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML file of a run: is everything that it needs here?", metavar="[RECIPE.yaml]")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, as for train.", metavar="[KEY=VALUE]...")] = None,
    cluster: Annotated[Path | None, typer.Option(help="YAML file of a SLURM cluster: is its partition there?")] = None,
    nproc: Annotated[int | None, typer.Option("--nproc", min=1, help="Ranks of the run; else run.num_ranks, else a GPU each.")] = None,
    ranks: Annotated[bool, typer.Option("--ranks/--no-ranks", help="Start two ranks (a rank for each GPU) and let them talk.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Tell what is here, what is lost without the rest, and with a recipe what it takes here. Exit code 1: something needed is unusable.

    Started by torchrun or srun, all their ranks must reach each other, and rank 0 tells.
    """
    import json
    import os
    import sys

    from rich.console import Console

    from megavlm.cli._doctor.examine import examine_machine, examine_recipe, examine_surroundings
    from megavlm.cli.recipes import load
    from megavlm.config.cluster import load_cluster

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    loaded = load(recipe, overrides) if recipe is not None else None
    where = load_cluster(cluster) if cluster is not None else None
    with Console(file=sys.stderr).status("importing ...") as status:
        report = examine_machine(status.update)
        tells = examine_surroundings(report, loaded, where, ranks, status.update, nproc)
        if loaded is not None and tells:
            examine_recipe(report, loaded, nproc, status.update)
    if tells:
        if as_json:
            typer.echo(json.dumps(report.as_json(), indent=2))
        else:
            report.print()
    if report.problems:
        raise typer.Exit(1)
