"""`megavlm evaluate`: measure a trained model on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from megavlm.evaluation.results import EvaluationResult


def evaluate(
    path: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint in it, or a Hugging Face folder.", metavar="PATH")],
    split: Annotated[str, typer.Option(help="Which samples of the sources.")] = "heldout",
    samples: Annotated[int, typer.Option(help="At most so many of each task.")] = 200,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be given several times. Else all.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="A source of the recipe; several times. Else evaluation.sources.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="A folder of shards; several times. Instead of the recipe's sources.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for table, predictions and pictures; else PATH/evaluation.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.")] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer; else the longest right answer and a little more.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses samples and swapped pictures.")] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")] = "auto",
    chat_template: Annotated[str | None, typer.Option(help="Instead of a Hugging Face folder's own format.")] = None,
    mlflow: Annotated[
        bool, typer.Option("--mlflow/--no-mlflow", help="Send table, samples and shares to the run's MLflow, where it has one.")
    ] = True,
) -> None:
    """Held-out answers with the right picture, with another sample's, and with none: is it good, and does it look?"""
    from megavlm.evaluation.held_out import evaluate as measure
    from megavlm.evaluation.held_out import folder_sources, held_out_sources
    from megavlm.inference.load import load_for_inference
    from megavlm.parallel.context import stop_process_group

    try:
        loaded = load_for_inference(path, device=device, chat_template=chat_template)
        sources = folder_sources(data, split) if data else held_out_sources(loaded.recipe, source, split)
        folder = out or path / "evaluation"
        result = measure(
            loaded,
            sources=sources,
            split=split,
            tasks=task,
            samples_per_task=samples,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            seed=seed,
            out=folder,
        )
        if loaded.model.ctx.rank == 0:
            typer.echo(result.table())
            typer.echo(f"every answer: {folder / 'predictions.jsonl'}; pictures: {folder / 'pictures.png'}")
            if mlflow:
                _send(path, result, folder)
    finally:
        stop_process_group()


def _send(path: Path, result: EvaluationResult, folder: Path) -> None:
    """To the MLflow run that the measured run has: a checkpoint outside of one, or a Hugging Face folder, has none."""
    from megavlm.checkpoint.folders import newest, step_and_stage
    from megavlm.config.load import load_recipe
    from megavlm.evaluation.tracking import log_evaluation
    from megavlm.tracking.run_start import saved_run_id

    run_dir = path if newest(path) is not None else path.resolve().parents[1]
    checkpoint = newest(path) or path
    if not (run_dir / "recipe.yaml").exists() or saved_run_id(run_dir) is None or checkpoint.resolve().parent.name != "checkpoints":
        return
    recipe = load_recipe(run_dir / "recipe.yaml")
    recipe.run.dir = str(run_dir)  # the folder may have been moved since
    waiting = log_evaluation(recipe, result, folder, step_and_stage(checkpoint.name)[0])
    if waiting:
        typer.echo(f"MLflow did not take it: `megavlm track replay {run_dir}` sends it later")
    elif waiting == 0:
        typer.echo("also in the run's MLflow: table, samples with their pictures, shares")
