"""`megavlm generate`: ask a trained model about pictures, once, line by line from a file, or in a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from megavlm.inference.loaded import LoadedModel

HELP = "/image FILE shows a picture with the next question, /new begins anew, /quit ends"


def generate(
    path: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint in it, or a Hugging Face folder.", metavar="PATH")],
    prompt: Annotated[
        str | None, typer.Option(help='The question. "<image>" in it places a picture; pictures not placed come first.')
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be given several times.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk: the model remembers the conversation and its pictures.")] = False,
    system: Annotated[str | None, typer.Option(help="System message at the beginning.")] = None,
    file: Annotated[
        Path | None, typer.Option(help='JSON lines {"prompt": ..., "images": [...]}; answers are written as JSON lines.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where --file's answers go; not given: standard output.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions of --file that are answered together.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the most probable token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most probable tokens only; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the tokens that reach this probability only; 1: all.")] = 1.0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1: tokens that were there already become less probable. Not given: a Hugging Face folder's own, else 1."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the answer, and is not shown; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")] = "auto",
    dtype: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="Not given: as the run trained; a folder: bf16 on a GPU.")] = None,
    tensor: Annotated[int, typer.Option(min=1, help="Split the model over so many GPUs (or processes, on a CPU).")] = 1,
    chat_template: Annotated[str | None, typer.Option(help="Instead of a Hugging Face folder's own format.")] = None,
) -> None:
    """Answer questions about pictures; an answer appears token by token."""
    import os
    import sys

    from megavlm_launchers.companions import companions
    from megavlm_launchers.environment import found_ranks

    if sum((prompt is not None, chat, file is not None)) != 1:
        raise typer.BadParameter("give one of --prompt TEXT, --chat and --file FILE")
    if file is not None and (image or system):
        raise typer.BadParameter("--image and --system do not go with --file: its lines name their pictures")
    placed = prompt.count("<image>") if prompt is not None else 0
    if placed > len(image or []):
        raise typer.BadParameter(f'--prompt places {placed} "<image>": give as many --image, not {len(image or [])}')
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
    }

    def run() -> None:
        _run(path, prompt, image or [], chat, system, file, out, batch_size, sampling, stop or [], (device, dtype, tensor, chat_template))

    if tensor == 1 or found_ranks(os.environ) is not None:
        run()
        return
    with companions([sys.executable, "-m", "megavlm.cli", *sys.argv[1:]], tensor) as environment:
        os.environ.update(environment)
        run()


def _run(
    path: Path,
    prompt: str | None,
    images: list[Path],
    chat: bool,
    system: str | None,
    file: Path | None,
    out: Path | None,
    batch_size: int,
    sampling: dict[str, Any],
    stop: list[str],
    where: tuple[Any, Any, int, str | None],
) -> None:
    """On every rank; only rank 0 reads and writes."""
    from megavlm.config.schema import ParallelConfig
    from megavlm.inference.load import load_for_inference
    from megavlm.inference.requests import read_requests
    from megavlm.inference.sampling import Sampling
    from megavlm.inference.stop import StopStrings
    from megavlm.parallel.context import stop_process_group

    # What is refused should be refused before the weights are read.
    Sampling(**{name: value for name, value in sampling.items() if name != "max_new_tokens" and value is not None})
    StopStrings(stop, lambda _: "")
    requests = read_requests(file) if file is not None else []
    device, dtype, tensor, chat_template = where
    try:
        layout = ParallelConfig(tensor=tensor, encoder_tensor="auto")
        loaded = load_for_inference(path, parallel=layout, device=device, dtype=dtype, chat_template=chat_template)
        options = {**sampling, "stop": StopStrings(stop, loaded.text)}
        if file is not None:
            _answer_file(loaded, requests, out, batch_size, options)
        elif chat:
            _chat(loaded, system, images, options)
        else:
            assert prompt is not None
            _ask(loaded, prompt, system, images, options)
    finally:
        stop_process_group()


def _speaks() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _ask(loaded: LoadedModel, prompt: str, system: str | None, images: list[Path], options: dict[str, Any]) -> None:
    from megavlm.inference.conversation import Conversation

    _stream(loaded, Conversation(loaded, system).prompt(prompt, images), options)


def _stream(loaded: LoadedModel, asked: Any, options: dict[str, Any]) -> str:
    """Show the answer while it arrives; returns its text."""
    from megavlm.inference.stream import TextStream

    shown = _speaks()
    stream = TextStream(loaded.text, lambda text: typer.echo(text, nl=False) if shown else None, options["stop"])
    answer = loaded.generate([asked], **options, on_token=lambda _, token: stream.add(token))[0]
    stream.close()
    text: str = options["stop"].cut(loaded.text(answer))
    if shown:
        typer.echo("")
        ended = answer[-1] in loaded.chat.stop_ids or text != loaded.text(answer)
        if not ended:
            typer.echo(f"(cut after --max-new-tokens {options['max_new_tokens']})", err=True)
    return text


def _answer_file(loaded: LoadedModel, requests: list[Any], out: Path | None, batch_size: int, options: dict[str, Any]) -> None:
    """A line an answer, in the order of the questions; each batch is written as soon as it is done."""
    import contextlib
    import json
    import sys

    from tqdm import tqdm

    shown = _speaks()
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(out.open("w", encoding="utf-8")) if out is not None and shown else sys.stdout
        bar = stack.enter_context(tqdm(total=len(requests), unit=" answers", disable=not (shown and sys.stderr.isatty())))
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            answers = loaded.generate([loaded.prompt(request.prompt, request.images) for request in batch], **options, first_number=start)
            for request, ids in zip(batch, answers, strict=True):
                if shown:
                    answer = options["stop"].cut(loaded.text(ids))
                    target.write(json.dumps(request.line | {"answer": answer}, ensure_ascii=False) + "\n")
            target.flush()
            bar.update(len(batch))
    if out is not None:
        _tell(f"{len(requests)} answers -> {out}")


def _chat(loaded: LoadedModel, system: str | None, images: list[Path], options: dict[str, Any]) -> None:
    """Read a line, answer it, until the end of the input."""
    from megavlm.inference.conversation import Conversation

    conversation, waiting = Conversation(loaded, system), list(images)
    if _speaks():
        typer.echo(HELP, err=True)
    while (line := _next_line(loaded)) is not None:
        command, _, argument = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            conversation.clear()
            waiting = []
        elif command == "/image":
            waiting = _with_picture(waiting, Path(argument.strip()).expanduser())
        elif command.startswith("/") and command[1:].isalpha():
            _tell(f"{command}: {HELP}")
        elif line.strip():
            waiting = _turn(loaded, conversation, line.strip(), waiting, options)


def _turn(loaded: LoadedModel, conversation: Any, text: str, waiting: list[Path], options: dict[str, Any]) -> list[Path]:
    """One question and its answer; returns the pictures that still wait for a question that works."""
    from megavlm.cli.errors import is_user_error

    try:
        answer = _stream(loaded, conversation.prompt(text, waiting), options)
    except ValueError as error:
        if not is_user_error(error):
            raise
        _tell(str(error))  # a picture that cannot be read, a conversation that has grown too long: the talk goes on
        return waiting
    if not answer.strip():
        _tell("(no answer: the question is forgotten)")
        return waiting
    conversation.answered(answer)
    return []


def _with_picture(waiting: list[Path], file: Path) -> list[Path]:
    if not file.is_file():
        _tell(f"{file}: there is no such picture")
        return waiting
    _tell(f"{file} will be shown with the next question")
    return [*waiting, file]


def _tell(text: str) -> None:
    if _speaks():
        typer.echo(text, err=True)


def _next_line(loaded: LoadedModel) -> str | None:
    """Rank 0 reads a line and tells the others; None at the end of the input."""
    import sys

    import torch.distributed as dist

    line: list[str | None] = [None]
    if _speaks():
        if sys.stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        line = [sys.stdin.readline() or None]
    ctx = loaded.model.ctx
    if ctx.grid.tensor > 1:
        dist.broadcast_object_list(line, dist.get_global_rank(ctx.tensor_group, 0), group=ctx.tensor_group)
    return line[0]
