"""`megavlm track`: what runs have told MLflow, or could not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="What runs have told MLflow, or could not yet.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `replay` a sub-command, alone as it is."""


@app.command()
def replay(
    run_dir: Annotated[Path, typer.Argument(help="The run's folder, with its recipe.yaml.", metavar="RUN_DIR")],
    uri: Annotated[str | None, typer.Option(help="Instead of the recipe's tracking.mlflow_uri.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to try; a store that does not answer is asked again.")] = 600.0,
) -> None:
    """Send what MLflow did not take while the run went on; exit code 1 when records are left, by whomever they are to be sent.

    Records that were sent already are not doubled. What a training or evaluation that still runs has to send is left to it.
    """
    from megavlm.config.load import load_recipe
    from megavlm.tracking.console import setup_logging
    from megavlm.tracking.mlflow_sink import deliver_spool
    from megavlm.tracking.old_spools import adopt_old_spools
    from megavlm.tracking.spool_folders import waiting_of

    recipe = load_recipe(run_dir / "recipe.yaml")
    recipe.run.dir = str(run_dir)  # the folder may have been moved since
    if uri is not None:
        recipe.tracking.mlflow_uri = uri
    setup_logging()
    adopt_old_spools(run_dir)
    before = waiting_of(run_dir)
    if running := before.held - before.ending:
        unless = "unless they were killed on another machine less than a minute ago"
        typer.echo(f"{run_dir}: {running} records are left to the programs they are of, which still run and send them, {unless}")
    first = before.left + before.ending
    if not first:
        typer.echo(f"{run_dir}: nothing {'else ' if running else ''}waits for MLflow")
        raise typer.Exit(1 if running else 0)
    left = deliver_spool(recipe, timeout)
    after = waiting_of(run_dir)
    typer.echo(f"{run_dir}: {max(0, first - left - after.ending)} of {first} records sent")
    if left or after.held:
        raise typer.Exit(1)
