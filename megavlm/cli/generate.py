"""`megavlm generate`: ask a trained model about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def generate(
    path: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint in it, or a Hugging Face folder.", metavar="PATH")],
    prompt: Annotated[str, typer.Option(help='The question. "<image>" in it places a picture; pictures not placed come first.')],
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be given several times.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most probable token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most probable tokens only; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the tokens that reach this probability only; 1: all.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")] = "auto",
    chat_template: Annotated[str | None, typer.Option(help="Instead of a Hugging Face folder's own format.")] = None,
) -> None:
    """Answer a question about pictures; the answer appears token by token."""
    from megavlm.inference.load import load_for_inference
    from megavlm.inference.stream import TextStream
    from megavlm.parallel.context import stop_process_group

    try:
        loaded = load_for_inference(path, device=device, chat_template=chat_template)
        asked = loaded.prompt(prompt, image or [])
        stream = TextStream(loaded.text, lambda text: typer.echo(text, nl=False))
        answers = loaded.generate(
            [asked],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_token=lambda _, token: stream.add(token),
        )
        stream.close()
        typer.echo("")
        if answers[0][-1] not in loaded.chat.stop_ids:
            typer.echo(f"(cut after --max-new-tokens {max_new_tokens})", err=True)
    finally:
        stop_process_group()
