"""A real run that is broken again and again, beside the simulation of benchmarks/goodput.py: `python benchmarks/goodput.py --real`.

`megavlm train` on two ranks, gloo, a checkpoint every ten steps. First the inputs of the simulation are measured on a run that is broken
three times by a kill and once by a stop, behind a start that only warms the disk's cache up: step, stall, save, noticing, starts. Then
another run is broken at times drawn as a Poisson process, by SIGKILL (84 in 100, Llama 3's share of crashes) or SIGSTOP of a rank, which
its watchdog notices; it is started again each time at once. Its own figure of effective training time (`goodput` of metrics.jsonl) is
compared with the simulation, played with those inputs and the same failures, each moved by about a second in many plays. They must agree
within TOLERANCE. Most of what is lost is seconds, so that the share says little about the time of a step: the steps that are left stand
beside it.

What is scaled as on 16,384 GPUs: steps between checkpoints (10), and roughly the time of a restart in steps (20 to 30). What is not: the
failure rate. There 68 restarts fit between two failures, here about three, or a run of hours would be needed; so the share itself is
much lower than Llama 3's, and only the agreement counts. Silent corruption and waiting for other nodes are left out.
"""

from __future__ import annotations

import json
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from goodput import DAY_S, DAYS, INTERRUPTIONS, Failure, Run, Times

from megavlm.testing.matrix.run import FaultyRun
from megavlm.testing.recipes import make_tiny_data, tiny_recipe, tiny_stage
from megavlm.tracking.environment import environment_report
from megavlm.tracking.goodput import first_start

TOLERANCE = 0.05
"""Of the share of time."""
LEAST_SHARE = 0.2
"""Where a busy machine spends all its time on starts, any two runs agree."""
SAVE_EVERY, PACKS_PER_STEP = 10, 24
HANG_LIMIT_S = 6.0
MEAN_BETWEEN_S, SECONDS, SEED = 32.0, 240.0, 4
PLAYS, MOVED_S = 200, 1.0
"""The simulation is played so often, each failure moved by so much (standard deviation): whether one comes just before or just behind the
end of a save decides about ten steps, and its time is not known better than that."""
CRASHES = 3
"""Before the simulation: noticing one, and a start, are means of them."""
HANGS = 0.16
"""Of failures: Llama 3's share of those that hang."""
_SAVED = re.compile(r"saved \S+ in ([\d.]+) s")


class Watched:
    """A run, and when things happened to it, in seconds since 1970."""

    def __init__(self, folder: Path, data: Path) -> None:
        stage = tiny_stage(steps=100_000, packs_per_step=PACKS_PER_STEP)
        changes: dict[str, Any] = {
            "checkpoint": {"every_steps": SAVE_EVERY, "keep_last": 2},
            "faults": {"watchdog": {"step_s": HANG_LIMIT_S}},
            "tracking": {"log_every_steps": 1},
        }
        self.run = FaultyRun(folder, tiny_recipe(folder / "run", data, [stage], **changes))
        self.begun = self.started = 0.0

    def start(self) -> None:
        self.started = time.time()
        self.begun = self.begun or self.started
        self.run.start()

    def last(self) -> tuple[float, dict[str, Any]] | None:
        """When the last step was recorded, and its record."""
        first, records = first_start(self.run.dir), self.run.records() if self.run.step else []
        return (first + records[-1]["goodput"]["elapsed_s"], records[-1]) if records and first is not None else None

    @property
    def trains(self) -> bool:
        """A step of this start was recorded."""
        last = self.last()
        return last is not None and last[0] > self.started

    def first_step(self) -> float:
        """Wait for it. Returns seconds from the start to its beginning."""
        self.run.wait_until(lambda: self.trains, "a step", poll_s=0.1)
        first = first_start(self.run.dir)
        assert first is not None
        ends = [(first + record["goodput"]["elapsed_s"], record["step_time_s"]) for record in self.run.records()]
        end, seconds = next(found for found in ends if found[0] > self.started)
        return end - seconds - self.started

    def fail(self, kind: str) -> None:
        """One rank is killed or stopped; the launcher where there is no rank yet."""
        assert self.run.process is not None
        try:
            self.run.rank(1).send_signal(signal.SIGSTOP if kind == "hang" and self.trains else signal.SIGKILL)
        except (AssertionError, ProcessLookupError):
            self.run.process.kill()

    def ended(self) -> float:
        """Wait until the command has ended. Returns how long that took."""
        start = time.time()
        self.run.wait(120)
        return time.time() - start


def inputs(folder: Path, data: Path) -> Times:
    """Those of the simulation, measured."""
    # The first start of all reads everything from the disk, which the broken run's first does not.
    with (cold := Watched(folder / "cold", data)).run:
        cold.start()
        cold.first_step()
    watched = Watched(folder / "calm", data)
    crashes, starts = [], []
    with watched.run as run:
        watched.start()
        first_start_s = watched.first_step()
        run.wait_for_step(3 * SAVE_EVERY + 2)
        records = run.records()[SAVE_EVERY : 3 * SAVE_EVERY]  # two saves
        steps = [record["step_time_s"] for record in records]
        wall = records[-1]["goodput"]["elapsed_s"] - records[0]["goodput"]["elapsed_s"]
        stall_s = max(0.0, wall - sum(steps[1:])) * SAVE_EVERY / (len(steps) - 1)
        for _ in range(CRASHES):
            watched.fail("crash")
            crashes.append(watched.ended())
            watched.start()
            starts.append(watched.first_step())
            run.wait_for_step(run.step + 2)
        watched.fail("hang")
        detect_hang_s = max(0.0, watched.ended() - HANG_LIMIT_S)
        watched.start()
        starts.append(watched.first_step())
        run.wait_for_step(run.step + 2 * SAVE_EVERY)
        saves = [float(seconds) for seconds in _SAVED.findall(run.log.read_text(errors="replace"))]
        step_s = median(record["step_time_s"] for record in run.records()[SAVE_EVERY:])
    measured = {"step_s": step_s, "stall_s": stall_s, "save_s": mean(saves), "first_start_s": first_start_s, "start_s": mean(starts)}
    fixed: dict[str, Any] = {"save_every_steps": SAVE_EVERY, "hash_every_steps": 0, "load_s": 0.0, "replace_s": 0.0}
    noticed = {"detect_crash_s": mean(crashes), "hang_limit_s": HANG_LIMIT_S, "detect_hang_s": detect_hang_s}
    return replace(Times(), **measured, **noticed, **fixed)


def schedule() -> list[Failure]:
    """When the run is broken, and how."""
    chance, failures = random.Random(SEED), []
    at = chance.expovariate(1 / MEAN_BETWEEN_S)
    while at < SECONDS:
        failures.append(Failure(at, "hang" if chance.random() < HANGS else "crash"))
        at += chance.expovariate(1 / MEAN_BETWEEN_S)
    return failures


def moved(failures: list[Failure], seed: int) -> list[Failure]:
    """The same, a little earlier or later each."""
    chance = random.Random(seed)
    return sorted(Failure(max(0.1, failure.at_s + chance.gauss(0.0, MOVED_S)), failure.kind) for failure in failures)


def broken_run(folder: Path, data: Path, failures: list[Failure]) -> dict[str, float]:
    """What a run that all that happens to says of itself at its first step behind SECONDS."""
    watched = Watched(folder, data)
    with watched.run as run:
        watched.start()

        def until(end: float) -> None:
            while time.time() < end:
                assert run.process is not None
                if run.process.poll() is not None:
                    run.wait(1)
                    watched.start()
                time.sleep(0.005)

        for failure in failures:
            until(watched.begun + failure.at_s)
            watched.fail(failure.kind)
        until(watched.begun + SECONDS)
        while not (watched.trains and (last := watched.last()) and last[0] > watched.begun + SECONDS):
            until(time.time() + 0.05)
        at, record = last
    own = record["goodput"]
    return {"kept_s": own["kept_s"], "elapsed_s": at - watched.begun, "steps": record["step"], "own_share": own["share"]}


def compare(out: Path | None) -> int:
    """Print both shares, and write them. Returns 1 where they differ by more than TOLERANCE, or are too low to say anything."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_tiny_data(folder / "data")
        times, failures = inputs(folder, data), schedule()
        real = broken_run(folder / "broken", data, failures)
    as_long = partial(Run, times, real["elapsed_s"] / DAY_S, 0.0, 0)
    plays = [as_long(moved(failures, number)).play() for number in range(PLAYS)]
    simulated = mean(play.share for play in plays)
    unmoved = as_long(failures).play().share
    steps = mean(play.kept for play in plays) / times.step_s
    parts = {part: mean(play.parts.get(part, 0.0) for play in plays) for part in sorted({part for play in plays for part in play.parts})}
    real["effective"] = real["kept_s"] / real["elapsed_s"]
    difference = real["effective"] - simulated
    restart_s = times.detect_crash_s + times.start_s
    theirs = Times()
    scale = {
        "steps between checkpoints": [SAVE_EVERY, theirs.save_every_steps],
        "restart, in steps": [
            restart_s / times.step_s,
            (theirs.detect_crash_s + theirs.start_s + theirs.load_s + theirs.replace_s) / theirs.step_s,
        ],
        "mean time between failures, in restarts": [
            MEAN_BETWEEN_S / restart_s,
            DAYS * DAY_S / INTERRUPTIONS / (theirs.detect_crash_s + theirs.start_s + theirs.load_s + theirs.replace_s),
        ],
    }
    say = sys.stdout.write
    for failure in failures:
        say(f"{failure.at_s:6.1f} s  {failure.kind}\n")
    say(f"inputs: {json.dumps({key: value for key, value in asdict(times).items() if value})}\n")
    for key, (here, there) in scale.items():
        say(f"{key}: {here:.1f} here, {there:.1f} on 16,384 GPUs\n")
    say(f"effective: {100 * real['effective']:.1f} % of {real['elapsed_s']:.0f} s with {len(failures)} failures, real; ")
    deviation = stdev(play.share for play in plays)
    say(f"{100 * simulated:.1f} % simulated (standard deviation {100 * deviation:.1f}): ")
    say(f"{100 * difference:+.1f} points (allowed: {100 * TOLERANCE:g})\nsteps: {real['steps']} real, {steps:.0f} simulated\n")
    if out is not None:
        report = {
            "real": real,
            "simulated": {
                "effective": simulated,
                "plays": PLAYS,
                "deviation": deviation,
                "unmoved": unmoved,
                "steps": steps,
                "parts_s": parts,
            },
        }
        report |= {"difference": difference, "tolerance": TOLERANCE, "failures": failures, "times": asdict(times), "scale": scale}
        out.write_text(json.dumps(report | {"environment": environment_report()}, indent=1) + "\n", encoding="utf-8")
    if simulated < LEAST_SHARE:
        say(f"restarts leave less than {100 * LEAST_SHARE:g} % of this machine's time, which is too little to compare: quieten it\n")
        return 1
    return int(abs(difference) > TOLERANCE)
