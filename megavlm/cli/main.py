"""Entry point: assembles the sub-commands and turns what they raise into a message and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from megavlm.cli import checkpoint, config, convert, data, doctor, evaluate, generate, jobs, launch, quickstart, track, train
from megavlm.cli.errors import DEBUG_VARIABLE, note_exit, report

app = typer.Typer(
    name="megavlm",
    help="Train large vision-language models on megatron-core, and prove that what was trained is right.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import megavlm

        typer.echo(f"megavlm {megavlm.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of user errors too; works anywhere on the line.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


app.command("train")(train.train)
app.command("launch")(launch.launch)
app.add_typer(jobs.app, name="jobs")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.add_typer(convert.app, name="convert")
app.add_typer(track.app, name="track")
app.command("generate")(generate.generate)
app.command("evaluate")(evaluate.evaluate)
app.command("doctor")(doctor.doctor)
app.command("quickstart")(quickstart.quickstart)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 2 the user's to mend (told in one message), 1 a fault (with traceback)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in arguments:
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    try:
        app(args=arguments, prog_name="megavlm")
    except SystemExit as end:
        note_exit(end.code if isinstance(end.code, int) else 0)
        raise
    except Exception as error:
        code = report(error)
        note_exit(code)
        sys.exit(code)
