"""`megavlm checkpoint`: look at a run's checkpoints, prove that they are whole, delete those that are not needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megavlm.checkpoint.listing import Entry

app = typer.Typer(help="A run's checkpoints: list, verify, prune.", no_args_is_help=True)
RunDir = Annotated[Path, typer.Argument(help="A run's folder (run.dir).", metavar="RUN_DIR")]


@app.command("list")
def list_(run_dir: RunDir, as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of a table.")] = False) -> None:
    """List them: step, stage, size, age, what they hold, whether they are complete, and which one a start would take.

    Names and sizes are looked at; whether the bytes are those that were written is for `verify`.
    """
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from megavlm.checkpoint.listing import survey

    found = survey(run_dir)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in found], indent=1))
        return
    table = Table("checkpoint", "tier", "size", "age", "holds", "state")
    for entry in found:
        held = ", ".join([*entry.modules, *(["optimizer"] if entry.has_optimizer else [])])
        table.add_row(entry.name, entry.tier, _size(entry.size_bytes), _age(entry.age_s), held, _state(entry))
    Console().print(table if found else f"no checkpoint in {run_dir} yet")


@app.command("verify")
def verify(
    where: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint.", metavar="RUN_DIR|CHECKPOINT")],
    names: Annotated[list[str] | None, typer.Argument(help="Checkpoints of the run; not given: all of them.", metavar="[NAME]...")] = None,
) -> None:
    """Read every file again and compare its checksum; exit code 1 when one is damaged, and which."""
    from megavlm.checkpoint.listing import bytes_to_verify, chosen, damage

    paths = chosen(where, names or [])
    bad = 0
    with _progress("reading", sum(bytes_to_verify(path) for path in paths)) as read:
        found = {path: damage(path, read) for path in paths}
    for path, problems in found.items():
        typer.echo(f"{path.name}: {'damaged' if problems else 'every file is as it was written'}")
        for problem in problems:
            typer.echo(f"  {problem}")
        bad += bool(problems)
    if bad:
        typer.echo(f"{bad} of {len(found)} checkpoints cannot be loaded: a start goes on from the newest good one", err=True)
        raise typer.Exit(1)


@app.command("prune")
def prune(
    run_dir: RunDir,
    keep_last: Annotated[int, typer.Option(min=1, help="So many of the newest stay.")] = 2,
    keep_every_steps: Annotated[int | None, typer.Option(min=1, help="Those at multiples of this step stay.")] = None,
    keep_best: Annotated[int, typer.Option(min=0, help="So many of each stage with the lowest held-out loss stay.")] = 0,
    keep: Annotated[list[str] | None, typer.Option(help="Name of one that stays; can be given several times.")] = None,
    leftovers: Annotated[
        bool, typer.Option("--leftovers", help="Also what interrupted saves left. Not while the run is training: it may be saving.")
    ] = False,
    damaged: Annotated[bool, typer.Option("--damaged", help="Also what a start found damaged and put aside.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go and what would stay, and why; delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete checkpoints that no rule keeps.

    The last of every stage stays, so does any that holds modules of one that stays, and so does the newest whose checksums all hold.
    """
    import shutil

    from megavlm.checkpoint.listing import bytes_to_verify, is_set_aside, newest_good, survey
    from megavlm.checkpoint.retention import Rules, reasons_to_keep
    from megavlm.checkpoint.retention import prune as delete

    there = {entry.name: entry for entry in survey(run_dir) if entry.tier == "durable"}
    _check_names(run_dir, keep or [], there)
    with _progress("looking for the newest good one", sum(bytes_to_verify(Path(e.path)) for e in there.values() if e.resumes)) as read:
        good = newest_good(run_dir, read)
    rules = Rules(keep_last, keep_every_steps, keep_best, frozenset([*(keep or []), *([good] if good else [])]))
    reasons = reasons_to_keep(run_dir, rules)
    aside = [Path(entry.path) for entry in there.values() if damaged and is_set_aside(Path(entry.path))]
    unfinished = [name for name, entry in there.items() if leftovers and _is_leftover(entry)]
    gone = [*(name for name, why in reasons.items() if not why), *(path.name for path in aside), *unfinished]
    for name, entry in there.items():
        typer.echo(_fate(entry, name in gone, name == good, reasons.get(name, [])))
    freed = _size(sum(there[name].size_bytes for name in gone))
    if not gone or dry_run:
        typer.echo(f"{len(gone)} would be deleted, {freed}" if gone else "nothing to delete")
        return
    if not yes and not typer.confirm(f"Delete these {len(gone)}, {freed}?"):
        typer.echo("nothing was deleted")
        raise typer.Exit(1)
    number = len(delete(run_dir, rules, leftovers=leftovers)) + len(aside)
    for path in aside:
        shutil.rmtree(path)
    typer.echo(f"deleted {number}, {freed}")


def _fate(entry: Entry, goes: bool, is_good: bool, why: list[str]) -> str:
    if goes:
        return f"delete {entry.name} ({_size(entry.size_bytes)})"
    if is_good:
        return f"keep   {entry.name}: {', '.join(['newest good', *(reason for reason in why if reason != 'asked for')])}"
    return f"keep   {entry.name}: {', '.join(why) or entry.problem}"


def _check_names(run_dir: Path, names: list[str], there: dict[str, Entry]) -> None:
    from megavlm.checkpoint.errors import CheckpointError

    unknown = [name for name in names if name not in there]
    if unknown:
        raise CheckpointError(f"--keep {unknown[0]}: {run_dir} has no such checkpoint (there are: {', '.join(there) or 'none'})")


def _is_leftover(entry: Entry) -> bool:
    from megavlm.checkpoint.folders import is_leftover

    return is_leftover(Path(entry.path))


def _state(entry: Entry) -> str:
    if entry.problem is not None:
        return f"incomplete: {entry.problem}"
    words = [*(["a start resumes here"] if entry.resumes else []), *(["latest"] if entry.is_latest else [])]
    return ", ".join(["complete", *words])


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


@contextmanager
def _progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while it lasts, in bytes; silent where stderr is no terminal."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda count: bar.update(task, advance=count)
