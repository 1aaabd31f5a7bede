"""`megavlm quickstart`: make data, train, measure, export: the whole of megavlm on a laptop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megavlm.config import Recipe

RECIPE = Path("configs/recipes/quickstart.yaml")


def quickstart(
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe.", metavar="[KEY=VALUE]...")] = None,
    recipe: Annotated[Path, typer.Option(help="The recipe.")] = RECIPE,
    samples: Annotated[int, typer.Option(min=1, help="Held-out questions of each task.")] = 200,
    pages: Annotated[int, typer.Option(min=1, help="Training pages to make; fewer are made sooner, and teach less.")] = 10_000,
) -> None:
    """Teach a small vision-language model to read scanned digits, measure it on scans it has never seen, export it."""
    from megavlm.checkpoint.hf import check_pictures
    from megavlm.cli.recipes import load

    loaded = load(recipe, overrides)
    check_pictures(loaded.model, loaded.data.image)  # what cannot be exported in the end is not trained first
    run_dir = Path(loaded.run.dir)
    _title("1/4  data: pages of real scanned digits")
    _make_data(loaded, pages)
    _title(f"2/4  training: {recipe}, stages {', '.join(s.name for s in loaded.stages)}")
    _train(loaded, recipe, overrides or [])
    _title("3/4  measuring on held-out pages: the right picture, another sample's, none")
    _run_on_ranks(loaded, ["evaluate", str(run_dir), "--samples", str(samples)])
    _title("4/4  export to Hugging Face, and both models side by side")
    _export_and_compare(run_dir)
    how_to_open = _log_results(loaded, run_dir)
    _title("done")
    typer.echo(f"run folder         {run_dir}  (recipe.yaml, metrics.jsonl, curves.png, checkpoints/)")
    typer.echo(f"held-out answers   {run_dir / 'evaluation' / 'pictures.png'}")
    typer.echo(f"Hugging Face model {run_dir / 'hf'}")
    typer.echo(f"ask it yourself    megavlm generate {run_dir} --image PICTURE.png --prompt 'What number is this?'")
    if how_to_open is not None:
        typer.echo(f"look at the run    {how_to_open}")


def _title(text: str) -> None:
    typer.secho(f"\n== {text}", bold=True)


def _make_data(recipe: Recipe, pages: int) -> None:
    from megavlm.data.demo import make_demo

    folder = Path(recipe.data.tokenizer).parent
    manifest = make_demo(folder, num_train=pages)
    counts = ", ".join(f"{name} {sum(splits.values())}" for name, splits in manifest.num_samples.items())
    typer.echo(f"{folder}: {counts} samples")


def _train(recipe: Recipe, path: Path, overrides: list[str]) -> None:
    """As `megavlm train`, whose launcher passes Ctrl-C on and waits until the ranks have saved."""
    from megavlm.cli.train import launch

    code = launch(recipe, path, overrides, None)
    if code:
        raise typer.Exit(code)


def _run_on_ranks(recipe: Recipe, arguments: list[str]) -> None:
    """The same on several data-parallel ranks."""
    from megavlm_launchers.local import launch_local

    command = [sys.executable, "-m", "megavlm.cli", *arguments]
    code = launch_local(command, recipe.run.num_ranks or 1, log_dir=Path(recipe.run.dir) / "logs")
    if code:
        raise typer.Exit(code)


def _export_and_compare(run_dir: Path) -> None:
    from megavlm.checkpoint.hf import export_hf
    from megavlm.evaluation.held_out import held_out_sources
    from megavlm.evaluation.hf_agreement import compare_with_hf
    from megavlm.evaluation.questions import load_questions
    from megavlm.inference.load import load_for_inference

    exported = export_hf(run_dir, run_dir / "hf", overwrite=True)
    typer.echo(f"{exported.num_tensors} weights -> {exported.folder}: LlavaForConditionalGeneration and AutoProcessor load it")
    loaded = load_for_inference(run_dir, device="cpu")
    recipe, sources = loaded.recipe, held_out_sources(loaded.recipe)
    questions = load_questions(sources, recipe.data, recipe.model, loaded.tokenizer, tasks=None, per_task=4, seed=1, progress=False)
    agreement = compare_with_hf(loaded, run_dir / "hf", questions)
    agreement.write(run_dir / "hf-agreement")
    typer.echo(agreement.summary())


def _log_results(recipe: Recipe, run_dir: Path) -> str | None:
    """Add what was measured after training to the run in MLflow. Returns the command that opens it."""
    import json

    from megavlm.evaluation.tracking import TIMEOUT_S
    from megavlm.tracking.mlflow_sink import sink_for

    sink = sink_for(recipe)
    if sink is None:
        return None
    tasks = json.loads((run_dir / "evaluation" / "evaluation.json").read_text())["tasks"]
    conditions = ("right_picture", "swapped_picture", "no_picture")
    shares = {f"held_out/{task['task']}/{c}": task[c]["value"] for task in tasks for c in conditions}
    sink.metrics(sum(stage.steps for stage in recipe.stages), {name: share for name, share in shares.items() if share is not None})
    for folder in ("evaluation", "hf-agreement"):
        sink.artifact(run_dir / folder)
    sink.finish("FINISHED", TIMEOUT_S)  # the next thing that a newcomer does is to open it
    return sink.how_to_open()
