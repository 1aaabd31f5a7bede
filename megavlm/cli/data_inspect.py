"""`megavlm data inspect` and `megavlm data stats`: a step as a web page, stages as tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megavlm.config import Recipe
    from megavlm.config.schema import StageConfig

_MANY_STEPS = 200
RecipePath = Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="RECIPE.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe.", metavar="[KEY=VALUE]...")]


def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=0, help="Step of the stage, counted from 0 as in bad_samples.jsonl.")] = 0,
    stage: Annotated[str | None, typer.Option(help="Name of the stage; else the first.")] = None,
    dp: Annotated[int | None, typer.Option("--dp", min=1, help="Data-parallel ranks; else what run.num_ranks gives.")] = None,
    packs: Annotated[int, typer.Option(min=0, help="Packs to show sample by sample.")] = 4,
    out: Annotated[Path | None, typer.Option(help="HTML file; else <stage>-step<step>.html here.")] = None,
) -> None:
    """Write one step as a web page: packs, tokens by loss mask, pictures and their grids, attention masks, balance over ranks."""
    from megavlm.cli.recipes import load
    from megavlm.data.inspect.opened import find_stage, open_stage
    from megavlm.data.inspect.page import render
    from megavlm.data.inspect.step import look_at_step, plan_step

    loaded = load(recipe, overrides)
    number = find_stage(loaded, stage, str(recipe))
    chosen = loaded.stages[number]
    if step >= chosen.steps:
        raise typer.BadParameter(f"stage {chosen.name!r} has {chosen.steps} steps, 0 to {chosen.steps - 1}", param_hint="--step")
    dp_size = _data_parallel_size(loaded, chosen, dp)
    opened = open_stage(loaded, number)
    with typer.progressbar(length=step + 1, label="planning", hidden=step < _MANY_STEPS) as bar:
        plan = plan_step(opened, step, dp_size, lambda _: bar.update(1))
    page = out or Path(f"{chosen.name}-step{step}.html")
    page.parent.mkdir(parents=True, exist_ok=True)
    view = look_at_step(opened, plan, recipe.name, packs)
    partial = page.with_name(f".{page.name}.partial")
    try:
        partial.write_text(render(view), encoding="utf-8")
        partial.replace(page)  # a full disk leaves no half page
    finally:
        partial.unlink(missing_ok=True)
    left = len(view.packs) - len(view.detailed)
    more = f"; {left} of {len(view.packs)} packs only as bars, see --packs" if left else ""
    typer.echo(f"{page} ({page.stat().st_size / 1e6:.1f} MB){more}")


def _data_parallel_size(recipe: Recipe, stage: StageConfig, asked: int | None) -> int:
    """As asked, or as a run of `run.num_ranks` ranks (1 where the recipe does not say) would have it."""
    from megavlm.data.inspect.opened import data_parallel_sizes
    from megavlm.topology.grid import RankGrid
    from megavlm.training.layout import stage_layout

    fitting = data_parallel_sizes(stage)
    if asked is not None:
        if asked not in fitting:
            raise typer.BadParameter(
                f"{stage.packs_per_step} packs in microbatches of {stage.micro_batch_packs} cannot be dealt out to {asked} ranks; "
                f"to {', '.join(map(str, fitting))} they can",
                param_hint="--dp",
            )
        return asked
    if recipe.run.num_ranks is None:
        return 1
    return RankGrid.from_config(stage_layout(recipe.parallel, stage, recipe.model), recipe.run.num_ranks).data


def stats(
    recipe: RecipePath,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Only this stage; else all.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each stage to plan, from its first.")] = 50,
    dp: Annotated[int | None, typer.Option("--dp", min=1, help="Data-parallel ranks; else what run.num_ranks gives.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for stats.json and a figure of each stage.")] = Path("data-stats"),
) -> None:
    """Tell and plot lengths, pictures, tasks, mixture, fill and the cost of vision, without reading a sample."""
    import json

    from megavlm.cli.recipes import load
    from megavlm.data.inspect.figure import draw
    from megavlm.data.inspect.opened import find_stage, open_stage
    from megavlm.data.inspect.stats import stage_statistics

    loaded = load(recipe, overrides)
    numbers = range(len(loaded.stages)) if stage is None else [find_stage(loaded, stage, str(recipe))]
    sizes = [_data_parallel_size(loaded, loaded.stages[number], dp) for number in numbers]
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for number, dp_size in zip(numbers, sizes, strict=True):
        opened = open_stage(loaded, number)
        length = min(steps, opened.stage.steps)
        with typer.progressbar(length=length, label=f"planning {opened.stage.name}", hidden=length < _MANY_STEPS) as bar:
            found.append(stage_statistics(opened, steps, dp_size, lambda _, bar=bar: bar.update(1)))  # type: ignore[misc]
        draw(found[-1], out / f"{opened.stage.name}.png")
        typer.echo(_statistics_text(found[-1]) + "\n")
    (out / "stats.json").write_text(json.dumps({"recipe": recipe.name, "stages": found}, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"{out / 'stats.json'}, " + ", ".join(str(out / f"{s['stage']}.png") for s in found))


def _statistics_text(found: dict[str, Any]) -> str:
    """A stage in at most 80 columns, for names of up to 16 letters."""
    from megavlm.topology.table import human_count, text_table

    sources = found["sources"]
    quantiles = {name: [f"{s['length'][q]:.0f}" for q in ("p5", "p50", "p95", "max")] for name, s in sources.items()}
    lengths = [
        (name, f"{s['samples']:,}", human_count(s["tokens_per_epoch"]), *quantiles[name], f"{s['tiles']['mean']:.2f}")
        for name, s in sources.items()
    ]
    shares = [
        (
            name,
            f"{100 * s['target_share']:.2f}",
            f"{100 * s['realised_share']:.2f}",
            f"{s['samples_per_step']:.1f}",
            human_count(s["tokens_per_step"]),
            "never" if s["steps_per_epoch"] is None else f"{s['steps_per_epoch']:.1f}",
        )
        for name, s in sources.items()
    ]
    lines = [
        f"stage {found['stage']} ({found['objective']})",
        f"  {found['num_planned_steps']} steps planned, data-parallel ranks: {found['dp_size']}",
        f"  fill {100 * found['mean_fill']:.2f} % (lowest {100 * found['lowest_fill']:.2f} %), idle {100 * found['mean_idle']:.2f} %,"
        f" longest wait {found['longest_wait_samples']:.0f} samples",
        f"  {human_count(found['flops_per_step'])} FLOPs a step, {100 * found['vision_share_of_flops']:.1f} % of them vision",
        "",
        text_table(("source", "samples", "tokens", "p5", "median", "p95", "longest", "tiles"), lengths),
        "",
        text_table(("source", "target %", "realised %", "samples/step", "tokens/step", "steps/epoch"), shares),
        "",
        *(f"{name}: " + ", ".join(f"{count:,} {task}" for task, count in s["tasks"].items()) for name, s in sources.items()),
    ]
    kinds = [(name, kind, count) for name, s in sources.items() for kind, count in s["over_long"].items() if count]
    over = [f"{n}: {count:,} {'samples left out as' if kind == 'unusable' else 'over-long samples'} {kind}" for n, kind, count in kinds]
    return "\n".join(lines + over)
