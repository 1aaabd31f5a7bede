"""`megavlm convert`: between Hugging Face folders and megavlm's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from megavlm.data.chat import Chat
    from megavlm.parallel.context import ParallelContext

app = typer.Typer(help="Between Hugging Face folders and checkpoints.", no_args_is_help=True)
HfFolder = Annotated[
    Path, typer.Argument(help="Folder as save_pretrained of LlavaForConditionalGeneration writes it.", metavar="HF_FOLDER")
]
Source = Annotated[Path, typer.Argument(help="A run's folder (its newest checkpoint) or a checkpoint.", metavar="RUN|CHECKPOINT")]
Dtype = Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="Number format of the weights; not given: as they are.")]


@app.command("import")
def import_(
    folder: HfFolder,
    checkpoint: Annotated[Path, typer.Argument(help="Folder to write; must not exist.", metavar="CHECKPOINT")],
    dtype: Dtype = None,
) -> None:
    """Make a checkpoint of a Hugging Face model. (Training reads such a folder itself: model.init_from.)"""
    from megavlm.checkpoint.hf.importing import import_hf

    imported = import_hf(folder, checkpoint, _lone_rank(), dtype=dtype)
    typer.echo(f"{imported.num_tensors} weights ({imported.dtype}) from {folder} -> {checkpoint}")


@app.command()
def export(
    source: Source,
    folder: Annotated[Path, typer.Argument(help="Folder to write.", metavar="HF_FOLDER")],
    tokenizer: Annotated[str | None, typer.Option(help="Instead of the run's: a *.model file or a folder with tokenizer.json.")] = None,
    chat_template: Annotated[str, typer.Option(help="Conversation format that goes with --tokenizer.")] = "megavlm",
    dtype: Dtype = None,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="A weight file that would grow beyond this is followed by another.")] = 5.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder when it is there.")] = False,
) -> None:
    """Write a folder that LlavaForConditionalGeneration and AutoProcessor load without custom code."""
    from megavlm.checkpoint.hf import export_hf

    exported = export_hf(
        source,
        folder,
        chat=_chat(tokenizer, chat_template),
        dtype=dtype,
        max_shard_bytes=int(max_shard_gb * 1e9),
        overwrite=overwrite,
    )
    typer.echo(f"{exported.num_tensors} weights, {exported.num_parameters:,} numbers ({exported.dtype}) -> {exported.folder}")


@app.command()
def verify(
    source: Source,
    folder: HfFolder,
    report: Annotated[Path | None, typer.Option(help="JSON file to write; not given: HF_FOLDER/megavlm_verify.json.")] = None,
    seed: Annotated[int, typer.Option(help="Of the tokens and pixels.")] = 0,
) -> None:
    """Compare a checkpoint with a Hugging Face folder, tensor by tensor and by both models' logits; exit code 1 when they differ."""
    import json

    from megavlm.checkpoint.hf.verify import verify as compare

    found = compare(source, folder, _lone_rank(), seed=seed)
    target = report or folder / "megavlm_verify.json"
    target.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
    typer.echo(f"{found.num_tensors - len(found.unequal)} of {found.num_tensors} tensors are equal bit for bit")
    for name in found.unequal[:20]:
        typer.echo(f"  differs: {name}")
    if len(found.unequal) > 20:
        typer.echo(f"  and {len(found.unequal) - 20} more, see {target}")
    typer.echo(f"largest difference of logits: {found.max_abs_logit_difference:.3g} (largest logit {found.max_abs_logit:.3g})")
    typer.echo(f"report: {target}")
    if not found.ok:
        raise typer.Exit(1)


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
