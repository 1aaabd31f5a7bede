"""`megavlm convert`: between Hugging Face folders and megavlm's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from megavlm.config import Recipe
    from megavlm.data.chat import Chat
    from megavlm.parallel.context import ParallelContext

app = typer.Typer(help="Between Hugging Face folders and checkpoints.", no_args_is_help=True)
HfFolder = Annotated[
    Path,
    typer.Argument(help="Folder of a class in `megavlm convert families`, as save_pretrained writes it.", metavar="HF_FOLDER"),
]
Source = Annotated[Path, typer.Argument(help="A run's folder (its newest checkpoint) or a checkpoint.", metavar="RUN|CHECKPOINT")]
Dtype = Annotated[
    Literal["fp32", "bf16"] | None, typer.Option(help="Number format of the weights; not given: as they are. fp16 folders need it.")
]


@app.command("import")
def import_(
    folder: HfFolder,
    checkpoint: Annotated[Path, typer.Argument(help="Folder to write; must not exist.", metavar="CHECKPOINT")],
    dtype: Dtype = None,
) -> None:
    """Make a checkpoint of a Hugging Face model. (Training reads such a folder itself: init.from_hf.)

    A few tensors are in memory at a time. An import that was killed goes on where it was when the command is repeated.
    """
    from megavlm.checkpoint.hf.importing import import_hf

    imported = import_hf(folder, checkpoint, dtype=dtype)
    resumed = f", {imported.num_resumed} of them by an earlier start" if imported.num_resumed else ""
    typer.echo(f"{imported.num_tensors} weights ({imported.dtype}{resumed}) from {folder} -> {checkpoint}")


@app.command()
def export(
    source: Source,
    folder: Annotated[Path, typer.Argument(help="Folder to write.", metavar="HF_FOLDER")],
    tokenizer: Annotated[str | None, typer.Option(help="Instead of the run's: a *.model file or a folder with tokenizer.json.")] = None,
    chat_template: Annotated[str, typer.Option(help="Conversation format that goes with --tokenizer.")] = "megavlm",
    dtype: Dtype = None,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="A weight file that would grow beyond this is followed by another.")] = 5.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a Hugging Face folder that is there.")] = False,
    register: Annotated[
        str | None, typer.Option(help="Then upload the folder to the run's MLflow, as a new version of the model of this name.")
    ] = None,
) -> None:
    """Write a folder that transformers' class of the model's family, and AutoProcessor, load without custom code.

    A few tensors are in memory at a time. An export that was killed goes on where it was when the command is repeated.
    """
    from megavlm.checkpoint.hf import export_hf

    recipe = _recipe_of_run(source) if register is not None else None
    exported = export_hf(
        source,
        folder,
        chat=_chat(tokenizer, chat_template),
        dtype=dtype,
        max_shard_bytes=int(max_shard_gb * 1e9),
        overwrite=overwrite,
    )
    typer.echo(f"{exported.num_tensors} weights, {exported.num_parameters:,} numbers ({exported.dtype}) -> {exported.folder}")
    if register is not None and recipe is not None:
        _register(recipe, folder, register)


def _recipe_of_run(source: Path) -> Recipe:
    """The recipe of the run that a checkpoint belongs to: its MLflow run is the one that gets the model."""
    from megavlm.config.load import load_recipe
    from megavlm.tracking.mlflow_store import TrackingError

    for run_dir in (source, *source.resolve().parents[:2]):
        if (run_dir / "recipe.yaml").exists():
            recipe = load_recipe(run_dir / "recipe.yaml")
            recipe.run.dir = str(run_dir)  # the folder may have been moved since
            return recipe
    raise TrackingError(f"--register needs a run, whose MLflow run gets the model, and {source} belongs to none (no recipe.yaml)")


def _register(recipe: Recipe, folder: Path, name: str) -> None:
    from megavlm.checkpoint.hf.registering import register_folder
    from megavlm.tracking.console import setup_logging

    setup_logging()
    if register_folder(recipe, folder, name):
        typer.echo(f"{name} is not registered yet: `megavlm track replay {recipe.run.dir}` sends what MLflow did not take")
        raise typer.Exit(1)
    typer.echo(f"registered in MLflow as a version of {name}")


@app.command()
def verify(
    source: Source,
    folder: HfFolder,
    report: Annotated[Path | None, typer.Option(help="JSON file to write; not given: HF_FOLDER/megavlm_verify.json.")] = None,
    seed: Annotated[int, typer.Option(help="Of the tokens and pixels.")] = 0,
    tensors_only: Annotated[bool, typer.Option("--tensors-only", help="Leave out logits, which need a whole model in fp32.")] = False,
) -> None:
    """Compare a checkpoint with a Hugging Face folder, tensor by tensor and by both models' logits; exit code 1 when they differ.

    The proof is written beside the folder's weights: SHA-256 of every tensor, logits of seeded samples, versions; JSON and a page to read.
    """
    from megavlm.checkpoint.hf.verify import BLIND
    from megavlm.checkpoint.hf.verify import verify as compare

    found = compare(source, folder, None if tensors_only else _lone_rank(), seed=seed, logits=not tensors_only)
    file, page = found.write(report or folder / "megavlm_verify.json")
    typer.echo(f"{len(found.tensors) - len(found.unequal)} of {len(found.tensors)} tensors are equal bit for bit")
    for name in found.unequal[:20]:
        typer.echo(f"  differs: {name}")
    if len(found.unequal) > 20:
        typer.echo(f"  and {len(found.unequal) - 20} more, see {file}")
    for proof in found.logits:
        verdict = "" if proof.equal else "  TOO LARGE"
        typer.echo(
            f"logits, {proof.sample}: largest difference {proof.max_abs_difference:.3g} (largest logit {proof.max_abs_logit:.3g}){verdict}"
        )
    if found.pictures_matter is False:
        typer.echo(f"pictures matter: no. {BLIND}")
    typer.echo(f"report: {page}, {file}")
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def families() -> None:
    """List the Hugging Face classes that are imported and exported, with the encoders and language models in them."""
    from megavlm.checkpoint.hf.encoders import ENCODERS
    from megavlm.checkpoint.hf.encoders.folder import TOWERS
    from megavlm.checkpoint.hf.language import LANGUAGES
    from megavlm.checkpoint.hf.registry import FAMILIES
    from megavlm.topology.table import text_table

    typer.echo(text_table(("model.family", "transformers class"), [(f.name, f.hf_class) for f in FAMILIES.values()], "whole models"))
    typer.echo("\nencoders (model_type): " + ", ".join(ENCODERS))
    typer.echo("folders with such an encoder beside a text tower, which init.vision_from_hf takes too (model_type): " + ", ".join(TOWERS))
    typer.echo("language models (model_type): " + ", ".join(LANGUAGES))


def _lone_rank() -> ParallelContext:
    """A grid of one rank on the CPU: conversion needs memory, not speed."""
    import torch

    from megavlm.config.schema import ParallelConfig
    from megavlm.parallel.context import enter_grid, start_process_group

    device = torch.device("cpu")
    start_process_group(device, timeout_s=600)
    return enter_grid(ParallelConfig(), device, seed=0)


def _chat(tokenizer: str | None, chat_template: str) -> Chat | None:
    if tokenizer is None:
        return None
    from megavlm.data.chat import Chat
    from megavlm.data.tokenizer import load_tokenizer

    return Chat(chat_template, load_tokenizer(tokenizer))
