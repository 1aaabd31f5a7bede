"""What may break, each with the way to break it and what must follow: the rows of the fault matrix."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.checkpoint import folders
from megavlm.config.exits import Exit
from megavlm.config.schema import Recipe
from megavlm.testing.matrix.run import FaultyRun
from megavlm.testing.payloads import raw_pickle
from megavlm.testing.recipes import tiny_recipe, tiny_stage

STEPS, SAVE_EVERY = 14, 4
LONG = 400
"""Steps of the run that one fault after the other happens to; it is never done."""
STEP_LIMIT_S = 15.0
"""faults.watchdog.step_s of the runs here."""
SAVE_LIMIT_S = 12.0
"""checkpoint.timeout_s."""
KILL_GOAL_S, HANG_GOAL_S = 30.0, 60.0
"""From the fault to the first new step: what is asked of a killed rank, and of a hang."""
Act = Callable[[FaultyRun], None]


def recipe_of(folder: Path, data_dir: Path, steps: int = STEPS, **blocks: Any) -> Recipe:
    """A checkpoint every few steps, short limits; `blocks` as in `tiny_recipe`."""
    changes: dict[str, Any] = {
        "checkpoint": {"every_steps": SAVE_EVERY, "keep_last": 3, "timeout_s": SAVE_LIMIT_S},
        "faults": {"watchdog": {"step_s": STEP_LIMIT_S}},
        "tracking": {"log_every_steps": 5},
    }
    return tiny_recipe(folder / "run", data_dir, [tiny_stage(steps=steps)], **(changes | blocks))


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run that trains."""

    name: str
    what: str
    """In words, for the table."""
    inject: Act
    """Called when step `at_step` is recorded; what it does last is the fault."""
    codes: tuple[int, ...]
    """How the command may end."""
    at_step: int = 6
    detect_s: float = 30.0
    """The command has ended so long after the fault."""
    goal_s: float | None = None
    """From the fault to the first new step, on a quiet machine."""
    saves: bool = False
    """It ends with a checkpoint of the last step: none has to be made again."""
    says: str = ""
    """Somebody tells, in these words (a regular expression)."""
    overrides: tuple[str, ...] = ()
    bad_steps: str = ""
    """Data steps whose loss is not a number, in the first start."""
    prepare: Act | None = None
    """Before the start."""
    mend: Act | None = None
    """Before the next start."""
    mounts: bool = False
    """It needs a file system of its own."""
    hangs: bool = False
    """It needs one that hangs."""
    quick: bool = False

    @property
    def is_apart(self) -> bool:
        """It was prepared before the start: a run for it alone."""
        return bool(self.overrides or self.bad_steps or self.prepare)


@dataclass(frozen=True)
class Damage:
    """Something that happens to the newest checkpoint of a run that does not run."""

    name: str
    what: str
    harm: Callable[[Path], object]
    says: str = "goes on from|going on from|not used|is damaged|cannot be"


# ------------------------------------------------------------------------------------------------------------------- processes


def kill(rank: int) -> Act:
    def inject(run: FaultyRun) -> None:
        time.sleep(random.random() * 0.2)  # anywhere in a step
        run.rank(rank).send_signal(signal.SIGKILL)

    return inject


def kill_while_saving(rank: int) -> Act:
    def inject(run: FaultyRun) -> None:
        process = run.rank(rank)
        run.wait_until(run.is_saving, "a save", timeout_s=60, poll_s=0.0005)
        process.send_signal(signal.SIGKILL)

    return inject


def hang_disk(run: FaultyRun) -> None:
    run.hang_disk()


def kill_launcher(run: FaultyRun) -> None:
    assert run.process is not None
    run.process.send_signal(signal.SIGKILL)


def stop(rank: int) -> Act:
    return lambda run: run.rank(rank).send_signal(signal.SIGSTOP)


def ask(number: signal.Signals) -> Act:
    def inject(run: FaultyRun) -> None:
        assert run.process is not None
        run.process.send_signal(number)

    return inject


def nothing(run: FaultyRun) -> None:
    """The fault was set up at the start."""


def give_room(run: FaultyRun) -> None:
    run.give_small_disk(64 << 20)


def fill_disk(run: FaultyRun) -> None:
    """Half a checkpoint's room is left."""
    used = sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    run.give_small_disk(used * 3 // 2)


FAULTS = [
    Fault("kill -9 of rank 1", "rank 1 killed in the middle of a step", kill(1), (137,), goal_s=KILL_GOAL_S, quick=True),
    Fault("kill -9 of rank 0", "rank 0 killed in the middle of a step", kill(0), (137,), goal_s=KILL_GOAL_S),
    Fault("kill -9 of rank 1 in a save", "rank 1 killed while it saves", kill_while_saving(1), (137,), goal_s=KILL_GOAL_S),
    Fault("kill -9 of rank 0 in a save", "rank 0 killed while it saves", kill_while_saving(0), (137,), goal_s=KILL_GOAL_S),
    Fault("kill -9 of the launcher", "the launching process killed", kill_launcher, (-9,), detect_s=5, goal_s=KILL_GOAL_S),
    Fault(
        "SIGSTOP of a rank",
        f"rank 1 stopped (SIGSTOP); the limit of a step is {STEP_LIMIT_S:g} s",
        stop(1),
        (Exit.HUNG,),
        detect_s=STEP_LIMIT_S + 20,
        goal_s=HANG_GOAL_S,
        says="rank",
    ),
    Fault(
        "disk hangs",
        f"the disk hangs: nobody who looks for a file on it gets an answer; the limit of a save is {SAVE_LIMIT_S:g} s, "
        "and 15 s more for the loop that waits for it",
        hang_disk,
        (Exit.SAVE_TIMEOUT, Exit.HUNG),
        detect_s=SAVE_LIMIT_S + 15 + 20,
        goal_s=HANG_GOAL_S,
        says="does not answer",
        hangs=True,
    ),
    Fault("SIGTERM", "asked to end", ask(signal.SIGTERM), (143,), saves=True, says="signal 15: saved step"),
    Fault("SIGUSR2", "warned before the time limit", ask(signal.SIGUSR2), (140,), saves=True, says="signal 12: saved step"),
    Fault(
        "NaN",
        "a loss that is not a number in step 7",
        nothing,
        (Exit.FAULTS_EXHAUSTED,),
        at_step=5,
        bad_steps="6",
    ),
    *(
        Fault(
            f"disk full, {policy}",
            what,
            fill_disk,
            (Exit.DISK_FULL,),
            at_step=SAVE_EVERY + 1,
            says="room|full|No space",
            overrides=(f"checkpoint.on_disk_full={policy}",),
            prepare=give_room,
            mend=give_room,
            mounts=True,
        )
        for policy, what in (
            ("exit", "no room for a checkpoint, on_disk_full=exit"),
            ("continue", "the same, on_disk_full=continue: it trains on, and ends at the stage's last save"),
        )
    ),
]


# --------------------------------------------------------------------------------------------------------------------- files


def largest_shard(path: Path) -> Path:
    return max(path.glob("*.distcp"), key=lambda shard: shard.stat().st_size)


def flip_a_bit(path: Path) -> None:
    """In a place drawn anew each time, of a shard."""
    shard = largest_shard(path)
    data = bytearray(shard.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    shard.write_bytes(data)


def truncate(path: Path) -> None:
    shard = largest_shard(path)
    os.truncate(shard, shard.stat().st_size // 2)


def malicious_index(path: Path) -> None:
    """By somebody who mends the manifest too: no checksum tells it."""
    index = path / ".metadata"
    index.write_bytes(raw_pickle(canary(path)))
    manifest = path / folders.MANIFEST
    names = folders.manifest_files(path)
    folders.write_json(manifest, {"files": {name: folders.checksum(path / name) for name in names}})


def canary(path: Path) -> Path:
    """Beside the run's folder."""
    return path.parents[2] / "canary"


def cut_latest(path: Path) -> None:
    """`latest` names what is not there."""
    (path.parent / folders.LATEST).write_text("00000099-nothing\n")
    shutil.rmtree(path)


DAMAGES = [
    Damage("flipped bit", "one bit of a shard flipped", flip_a_bit),
    Damage("truncated shard", "a shard cut in half", truncate),
    Damage("removed shard", "a shard removed", lambda path: largest_shard(path).unlink()),
    Damage("removed index", "`.metadata` removed", lambda path: (path / ".metadata").unlink()),
    Damage("removed state", "`state.json` removed", lambda path: (path / folders.STATE).unlink()),
    Damage("removed manifest", "`manifest.json` removed", lambda path: (path / folders.MANIFEST).unlink()),
    Damage("garbled state", "`state.json` overwritten with zeros", lambda path: (path / folders.STATE).write_bytes(b"\0" * 500)),
    Damage("malicious index", "`.metadata` replaced by a pickle that runs a program, checksums mended", malicious_index),
    Damage("removed checkpoint", "the folder removed, `latest` names nothing", cut_latest, says=""),
]
