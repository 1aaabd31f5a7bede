"""`megavlm data prepare`: options, the progress bar and the report on the terminal."""

from __future__ import annotations

from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from megavlm.data.prepare import PrepareReport, Progress


class FormatName(StrEnum):
    """Names of megavlm.data.prepare.FORMATS, here once more so that --help needs no torch."""

    llava = "llava"
    messages = "messages"
    captions = "captions"
    interleaved = "interleaved"
    webdataset = "webdataset"
    vqa = "vqa"
    coco = "coco"
    video = "video"
    frames = "frames"


class Answers(StrEnum):
    common = "common"
    all = "all"


class Directions(StrEnum):
    both = "both"
    to_box = "to-box"
    to_phrase = "to-phrase"


class Missing(StrEnum):
    refuse = "refuse"
    leave_out = "leave-out"


class FrameFormat(StrEnum):
    jpg = "jpg"
    png = "png"


_FORMAT_HELP = (
    "llava: conversations of human and gpt. messages: ShareGPT or OpenAI. captions: pictures with .txt, or a manifest. "
    "interleaved: OBELICS, MMC4. webdataset: tars. vqa: VQAv2 or records. coco: captions or instances. video: video files. "
    "frames: folders of frames."
)


def prepare(
    format_name: Annotated[FormatName, typer.Argument(metavar="FORMAT", help=_FORMAT_HELP)],
    input_path: Annotated[str, typer.Argument(metavar="INPUT", help="File or folder, on a disk or a URL (s3://, gs://, ...).")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder of the shards, on a disk or a URL.")],
    images: Annotated[str | None, typer.Option(help="Folder where relative names of pictures begin. Default: INPUT's folder.")] = None,
    task: Annotated[str | None, typer.Option(help="Task of every sample. Default: the format's.")] = None,
    split: Annotated[str, typer.Option(help="Split of the samples.")] = "train",
    held_out_fraction: Annotated[float, typer.Option(help="Share of samples held out, by a hash of their first picture.")] = 0.0,
    held_out_split: Annotated[str, typer.Option(help="Split of those.")] = "heldout",
    source: Annotated[str | None, typer.Option(help="Name of the origin in every sample. Default: INPUT's name.")] = None,
    columns: Annotated[
        str, typer.Option(metavar="OURS=THEIRS,...", help="Fields that INPUT calls otherwise: image=url,caption=text.")
    ] = "",
    prompt: Annotated[str | None, typer.Option(help='Question beside the picture; vqa: holds "{question}".')] = None,
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Entries of INPUT per shard. Default: 1000; video, frames: 100.")
    ] = None,
    annotations: Annotated[str | None, typer.Option(help="vqa: VQAv2's annotation file.")] = None,
    answers: Annotated[Answers, typer.Option(help="vqa: the most common answer, or a sample for each, weighted.")] = Answers.common,
    image_pattern: Annotated[
        str | None, typer.Option(help='vqa: picture of a question. Default: "COCO_{data_subtype}_{image_id:012d}.jpg".')
    ] = None,
    directions: Annotated[Directions, typer.Option(help="coco: phrase to boxes, box to phrase.")] = Directions.both,
    notation: Annotated[str | None, typer.Option(help="coco: how boxes are written. Default: megavlm.")] = None,
    missing_pictures: Annotated[Missing, typer.Option(help="interleaved: a document one of whose pictures is missing.")] = Missing.refuse,
    fps: Annotated[float, typer.Option(help="video, frames: frames kept a second.")] = 1.0,
    input_fps: Annotated[float, typer.Option(help="frames: pictures a second in the folders.")] = 1.0,
    max_frames: Annotated[int, typer.Option(min=1, help="video, frames: a clip with more is refused.")] = 64,
    frame_format: Annotated[FrameFormat, typer.Option(help="video: how frames are encoded.")] = FrameFormat.jpg,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes; 0: none beside this one. Default: one a core, at most 16.")] = None,
    max_refused_fraction: Annotated[float, typer.Option(help="Refuse to finish when more was refused than this share.")] = 0.01,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what an earlier call has done, finished or not: its shards are deleted.")
    ] = False,
) -> None:
    """Turn a data set of another format into indexed shards. Stopped half way, the same command goes on where it was."""
    import os

    from rich.console import Console

    from megavlm.data.prepare import REPORT_NAME, PrepareOptions
    from megavlm.data.prepare import prepare as run

    options = PrepareOptions(
        format=format_name.value,
        input=input_path,
        output=output,
        images=images,
        task=task,
        split=split,
        held_out_fraction=held_out_fraction,
        held_out_split=held_out_split,
        source=source,
        columns=_pairs(columns),
        prompt=prompt,
        samples_per_shard=samples_per_shard,
        annotations=annotations,
        answers=answers.value,
        image_pattern=image_pattern,
        directions=directions.value,
        notation=notation,
        missing_pictures=missing_pictures.value,
        fps=fps,
        input_fps=input_fps,
        max_frames=max_frames,
        frame_format=frame_format.value,
        workers=min(16, len(os.sched_getaffinity(0))) if workers is None else workers,
        max_refused_fraction=max_refused_fraction,
    )
    console = Console()
    with _bar(console) as progress:
        report = run(options, restart, progress)
    _show(console, report)
    shards = "1 shard" if len(report.shards) == 1 else f"{len(report.shards)} shards"
    typer.echo(f"{output}: {shards}, index.parquet and {REPORT_NAME}")


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """ "a=b,c=d" in order of name."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    for ours, equals, theirs in pairs:
        if not (ours.strip() and equals and theirs.strip()):
            raise typer.BadParameter(f"{text!r} is not of the form image=url,caption=text", param_hint="--columns")
    names = [ours.strip() for ours, _, _ in pairs]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"{text!r} names a field twice", param_hint="--columns")
    return tuple(sorted((ours.strip(), theirs.strip()) for ours, _, theirs in pairs))


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A progress bar on a terminal; nothing in a log file."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("preparing"),
        *(BarColumn(), TextColumn("{task.percentage:>5.1f} %"), TextColumn("{task.fields[counts]}")),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0, counts="")

        def show(state: Progress) -> None:
            kept = f", {state.kept_chunks} chunks of an earlier call" if state.kept_chunks else ""
            counts = f"{state.tally.written:,} written, {state.tally.num_refused:,} refused{kept}"
            bar.update(task, completed=state.share, counts=counts)

        yield show


def _show(console: Console, report: PrepareReport) -> None:
    from rich.table import Table

    tally = report.tally
    typer.echo(
        f"read {tally.read:,} samples of {tally.entries:,} entries: wrote {tally.written:,} ({tally.pictures:,} pictures, "
        f"{tally.size_bytes / 1e6:,.1f} MB), refused {tally.num_refused:,}"
    )
    typer.echo(
        "tasks: "
        + ", ".join(f"{n:,} {name}" for name, n in sorted(tally.tasks.items()))
        + "; splits: "
        + ", ".join(f"{n:,} {name}" for name, n in sorted(tally.splits.items()))
    )
    if tally.refused:
        table = Table("refused", "samples", "first examples")
        for reason, refused in sorted(tally.refused.items(), key=lambda item: -item[1].count):
            table.add_row(reason, f"{refused.count:,}", "\n".join(refused.examples[:2]))
        console.print(table, markup=False)
    for note, count in sorted(tally.notes.items()):
        examples = tally.note_examples.get(note, [])
        typer.echo(f"note: {count:,} x {note}" + (f" ({', '.join(examples[:3])}{', ...' if count > 3 else ''})" if examples else ""))
