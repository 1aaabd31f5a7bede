"""`megavlm data`: make the demonstration data, build indexes ahead of a run, look at samples as they are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megavlm.cli.data_inspect import inspect, stats
from megavlm.cli.data_prepare import prepare

if TYPE_CHECKING:
    from megavlm.config import Recipe
    from megavlm.data.index import Objective

app = typer.Typer(help="Make, index and look at data.", no_args_is_help=True)
RecipePath = Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="RECIPE.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe.", metavar="[KEY=VALUE]...")]


@app.command("make-quickstart")
def make_quickstart(
    folder: Annotated[Path, typer.Argument(help="Where the sources and the tokenizer go.")] = Path("runs/quickstart-data"),
    seed: Annotated[int | None, typer.Option(help="Another seed makes other pages.")] = None,
    num_train: Annotated[int | None, typer.Option(min=1, help="Training pages.")] = None,
    num_held_out: Annotated[int | None, typer.Option(min=1, help="Held-out pages.")] = None,
) -> None:
    """Make the quickstart's data: pages of real scanned digits with captions, questions, counts and boxes. Idempotent."""
    from megavlm.data.demo import make_demo

    chosen = {"seed": seed, "num_train": num_train, "num_held_out": num_held_out}
    manifest = make_demo(folder, **{name: value for name, value in chosen.items() if value is not None})
    for source, splits in manifest.num_samples.items():
        typer.echo(f"{folder / source}: " + ", ".join(f"{count} {split}" for split, count in splits.items()))


@app.command()
def index(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Build every index that a run of this recipe reads (it would do so itself, while the GPUs wait), and show what is in them."""
    from megavlm.cli.recipes import load
    from megavlm.data.index import build_index
    from megavlm.data.tokenizer import load_tokenizer
    from megavlm.topology.table import text_table

    loaded = load(recipe, overrides)
    tokenizer = load_tokenizer(loaded.data.tokenizer, loaded.data.image_token)
    rows: dict[str, list[tuple[object, ...]]] = {}
    for name, objective in _wanted(loaded):
        built = build_index(loaded.data.sources[name], loaded.data, loaded.model, objective, tokenizer)
        lengths = built.length_tokens
        numbers = [len(built), lengths.sum(), lengths.max(), built.num_targets.sum(), built.num_tiles.sum()]
        rows.setdefault(objective, []).append((name, *(f"{int(n):,}" for n in numbers)))
        counts = [f"{int((built.task_ids == i).sum()):,} {task}" for i, task in enumerate(built.task_names)]
        notes = [f"{count:,} {kind}" for kind, count in built.notes.items() if count]
        typer.echo(f"{name}: {', '.join(counts)}" + (f"; too long or unusable: {', '.join(notes)}" if notes else ""))
    for title, table in rows.items():
        typer.echo("\n" + text_table(("source", "samples", "tokens", "longest", "targets", "tiles"), table, title))


@app.command()
def show(
    recipe: RecipePath,
    source: Annotated[str, typer.Argument(help="Name in data.sources.")],
    overrides: Overrides = None,
    row: Annotated[int, typer.Option(min=0, help="First row of the source's index.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Samples to show.")] = 1,
    pictures: Annotated[Path | None, typer.Option(help="Save their pictures into this folder.")] = None,
) -> None:
    """Show samples as they are trained on: the rendered conversation, what of it is a target, tokens, tiles, pictures."""
    from megavlm.cli._samples import describe, save_pictures
    from megavlm.cli.recipes import load
    from megavlm.config import RecipeError
    from megavlm.config.fields import did_you_mean
    from megavlm.data.index import build_index
    from megavlm.data.tokenizer import load_tokenizer

    loaded = load(recipe, overrides)
    if source not in loaded.data.sources:
        known = list(loaded.data.sources)
        raise RecipeError(
            str(recipe), f"data.sources has no {source!r}{did_you_mean(source, known)} (it has: {', '.join(known) or 'none'})"
        )
    tokenizer = load_tokenizer(loaded.data.tokenizer, loaded.data.image_token)
    objective: Objective = next((o for n, o in _wanted(loaded) if n == source), "multimodal")
    built = build_index(loaded.data.sources[source], loaded.data, loaded.model, objective, tokenizer)
    if row >= len(built):
        raise typer.BadParameter(f"{row} is not below the {len(built)} rows of {source!r}", param_hint="--row")
    for number in range(row, min(row + count, len(built))):
        typer.echo(describe(built, number, loaded, tokenizer))
        for path in save_pictures(built, number, pictures) if pictures is not None else ():
            typer.echo(f"  saved {path}")


app.command()(inspect)
app.command()(stats)
app.command()(prepare)


def _wanted(recipe: Recipe) -> list[tuple[str, Objective]]:
    """(source, objective) of every index that a run reads, in the order of the stages."""
    pairs: list[tuple[str, Objective]] = []
    for stage in recipe.stages:
        pairs += [(name, stage.objective) for name in stage.sources]
    pairs += [(name, "multimodal") for name in recipe.evaluation.sources]
    return list(dict.fromkeys(pairs))
