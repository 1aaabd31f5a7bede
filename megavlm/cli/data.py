"""`megavlm data`: make the demonstration data, build indexes ahead of a run, look at samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make, index and look at data.", no_args_is_help=True)


@app.command("make-quickstart")
def make_quickstart(
    folder: Annotated[Path, typer.Argument(help="Where the sources and the tokenizer go.")] = Path("runs/quickstart-data"),
    seed: Annotated[int, typer.Option(help="Another seed makes other pages.")] = 1234,
) -> None:
    """Make the quickstart's data: pages of real scanned digits with captions, questions, counts and boxes. Idempotent."""
    from megavlm.data.demo import make_demo

    make_demo(folder, seed=seed)
    typer.echo(f"quickstart data are in {folder}")
