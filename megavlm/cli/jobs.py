"""`megavlm jobs`: the runs that were launched from here."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="The runs that were launched from here: list, read their logs, stop, resume.")
Id = Annotated[str, typer.Argument(help="SLURM's number, local-<process id>, or the run's name.", metavar="ID")]


@app.callback(invoke_without_command=True)
def list_jobs(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of a table.")] = False
) -> None:
    """List them: state, step, newest checkpoint, share of the time that went into steps."""
    if context.invoked_subcommand is not None:
        return
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from megavlm_launchers.jobs import folder, known, progress, state

    found = [(job, state(job), progress(job)) for job in known()]
    if as_json:
        typer.echo(json.dumps([{**asdict(job), "state": word, **asdict(how)} for job, word, how in found], indent=1))
        return
    if not found:
        typer.echo(f"nothing was launched from here yet (no files in {folder()}): megavlm launch RECIPE.yaml")
        return
    table = Table("job", "run", "state", "step", "newest checkpoint", "effective time", "folder")
    for job, word, how in found:
        effective = "-" if how.effective is None else f"{how.effective:.0%}"
        table.add_row(job.id, job.name, word, f"{how.step}/{how.steps or '?'}", how.checkpoint or "-", effective, job.run_dir)
    Console().print(table)


@app.command("logs")
def logs(
    id: Id,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="So many of the last.")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as more is written, until Ctrl-C.")] = False,
) -> None:
    """Show the end of a job's log."""
    import subprocess

    from megavlm_launchers.jobs import find

    path = find(id).log
    typer.echo(f"{path}:")
    raise typer.Exit(subprocess.call(["tail", f"--lines={lines}", *(["--follow=name", "--retry"] if follow else []), "--", str(path)]))


@app.command("stop")
def stop(
    id: Id, now: Annotated[bool, typer.Option("--now", help="Without a checkpoint: what was learned since the last is lost.")] = False
) -> None:
    """Save a checkpoint and end; nothing starts again."""
    from megavlm_launchers.jobs import find, stop

    typer.echo(f"job {id}: {stop(find(id), now=now)}")


@app.command("resume")
def resume(id: Id) -> None:
    """Submit a SLURM job once more, as it was; it goes on from the newest checkpoint."""
    import time
    from dataclasses import replace
    from pathlib import Path

    from megavlm_launchers.errors import LaunchError
    from megavlm_launchers.jobs import find, is_there, remember, state
    from megavlm_launchers.sbatch import submit

    job = find(id)
    if job.script is None:
        raise LaunchError(f"job {job.id} ran here: give its command again, and it resumes")
    word = state(job)
    if is_there(word):
        raise LaunchError(f"job {job.id} is {word}: stop it first (megavlm jobs stop {job.id})")
    number = submit(Path(job.script))
    remember(replace(job, id=number, launched_at=time.time()))
    typer.echo(f"job {number}: goes on where job {job.id} stopped")
