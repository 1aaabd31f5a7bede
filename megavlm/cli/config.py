"""`megavlm config`: look at a recipe as it will be used, or at everything a recipe can say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at recipes.", no_args_is_help=True)


@app.command()
def show(
    recipe: Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Print a recipe resolved: bases merged, overrides applied, every default filled in."""
    from megavlm.cli.recipes import load
    from megavlm.config.load import recipe_yaml

    typer.echo(recipe_yaml(load(recipe, overrides)), nl=False)


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead of the terminal.")] = None,
) -> None:
    """Print the JSON schema of recipes, for completion and checks in an editor."""
    import json

    from megavlm.config.jsonschema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
