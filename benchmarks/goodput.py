"""Effective training time of a run of weeks on thousands of GPUs, simulated, at the failure rate that Llama 3 was trained under.

    python benchmarks/goodput.py [--seeds 20] [--detect-crash-s 2 --start-s 90 ...] [--out benchmarks/results/goodput.json]
    python benchmarks/goodput.py --tiny         (two seconds; to see that it runs)
    python benchmarks/goodput.py --real         (six minutes: a real run on two ranks, broken all the time, beside its simulation)

419 unexpected interruptions in 54 days on 16,384 H100 (The Llama 3 Herd of Models, https://arxiv.org/abs/2407.21783, section 3.3.4 and
table 5), drawn as a Poisson process with the table's causes. A failure loses the steps since the newest checkpoint that can be loaded;
then it has to be noticed, the ranks start again (on other nodes where hardware is to blame, which takes the node's own checkpoint with
it), load, and make the lost steps again. Failures during all that start it over. What a run does is played event by event: steps, saves
(asynchronous ones are of use when they are done, the stall is paid at their beginning), failures, noticing them, starts.

Times are inputs, in seconds. The defaults are those of a run of 405 billion parameters (16 million tokens a step, 6 s) whose 5.7 TB of
state lie on 16,384 GPUs, 0.35 GB on each; what does not depend on the number of GPUs was measured here, and the source says which that
is. The watchdog's default limit of 180 s is for steps of any length; with steps of 6 s it is set to 30 s.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

DAY_S = 86_400.0
INTERRUPTIONS, DAYS, GPUS = 419, 54, 16_384
Kind = Literal["crash", "hang", "silent"]


@dataclass(frozen=True)
class Cause:
    """Of interruptions."""

    number: int
    kind: Kind
    """crash: the process or its node dies. hang: it stays and does nothing. silent: it goes on and computes wrongly."""
    takes_node: bool
    """The ranks cannot start again on the same nodes."""


CAUSES = {
    "faulty GPU": Cause(148, "crash", True),
    "GPU HBM3 memory": Cause(72, "crash", True),
    "software bug": Cause(54, "crash", False),
    "network switch or cable": Cause(35, "hang", True),
    "unplanned host maintenance": Cause(32, "crash", True),
    "GPU SRAM memory": Cause(19, "crash", True),
    "GPU system processor": Cause(17, "hang", True),
    "NIC": Cause(7, "hang", True),
    "NCCL watchdog timeouts": Cause(7, "hang", False),
    "silent data corruption": Cause(6, "silent", True),
    "GPU thermal interface and sensor": Cause(6, "crash", True),
    "SSD": Cause(3, "crash", True),
    "power supply": Cause(3, "crash", True),
    "server chassis": Cause(2, "crash", True),
    "IO expansion board": Cause(2, "crash", True),
    "dependency": Cause(2, "crash", False),
    "CPU": Cause(2, "crash", True),
    "system memory": Cause(2, "crash", True),
}
assert sum(cause.number for cause in CAUSES.values()) == INTERRUPTIONS


@dataclass(frozen=True)
class Times:
    """Of the run, in seconds (steps where it says so)."""

    step_s: float = 6.0
    """One optimizer step. Llama 3 405B: 16 million tokens at 400 TFLOP/s a GPU."""
    stall_s: float = 0.1
    """What a save takes from training. Measured, by GiB on a rank: benchmarks/checkpoint.py."""
    save_s: float = 30.0
    """Until a durable checkpoint can be loaded, training beside it. Depends on the file system."""
    save_every_steps: int = 10
    local_save_s: float = 3.0
    """The same on the nodes' own disks or memory."""
    local_every_steps: int = 0
    """0: no local tier."""
    detect_crash_s: float = 3.0
    """Measured: tests/faults, kill -9 of a rank, to the end of all ranks."""
    hang_limit_s: float = 30.0
    """faults.watchdog.step_s."""
    detect_hang_s: float = 5.0
    """Behind the limit, to the end of all ranks. Measured: tests/integration/test_hangs.py."""
    hash_every_steps: int = 100
    """faults.replica_hash_every_steps; 0: silent corruption is never noticed (and not counted as lost)."""
    first_start_s: float = 0.0
    """0: as long as every other start."""
    start_s: float = 90.0
    """From the launcher to the first step, without loading: imports, NCCL over all ranks, kernels, first data. Depends on the cluster."""
    load_s: float = 30.0
    """A durable checkpoint, by all ranks at once. Depends on the file system."""
    local_load_s: float = 3.0
    replace_s: float = 40.0
    """Another node for one that is gone, from spares of the same allocation or the queue. Measured on SLURM: 38 s."""


class Failure(NamedTuple):
    """One that is given, and not drawn."""

    at_s: float
    """Since the run was started."""
    kind: Kind


@dataclass
class Outcome:
    """Where the time of one run went, in seconds."""

    elapsed: float
    kept: float
    parts: dict[str, float]
    """What is no kept step -> seconds; with `kept` they add up to `elapsed`."""
    failures: int

    @property
    def share(self) -> float:
        return self.kept / self.elapsed


class Run:
    """One run, played until its time is over."""

    def __init__(self, times: Times, days: float, rate_per_s: float, seed: int, failures: Iterable[Failure] | None = None) -> None:
        self.t, self.end, self.rate = times, days * DAY_S, rate_per_s
        self.given = None if failures is None else iter([*failures, Failure(math.inf, "crash")])
        self.coming = Failure(math.inf, "crash")
        self.random = random.Random(seed)
        self.now, self.step, self.failures = 0.0, 0, 0
        self.step_begun: float | None = None
        """None: the ranks are on their way to their first step, by `way` since `way_begun`."""
        self.way: list[tuple[str, float]] = []
        self.way_begun = 0.0
        self.durable, self.local = 0, 0
        """Step of the newest checkpoint of each tier that can be loaded."""
        self.saved = [0]
        """Steps of the last durable ones."""
        self.checked = 0
        """Last step after which all replicas were the same."""
        self.is_corrupt = False
        self.busy_until = 0.0
        """When the save that is under way is done."""
        self.start = 0
        """Number of the start; events of earlier ones are void."""
        self.events: list[tuple[float, int, str, tuple[int, ...]]] = []
        self.num_events = 0
        self.parts: Counter[str] = Counter()

    def play(self) -> Outcome:
        """Until the end."""
        self._plan_failure()
        self._go([("first start", self.t.first_start_s or self.t.start_s)])
        while self.events[0][0] < self.end:
            self.now, _, what, payload = heapq.heappop(self.events)
            getattr(self, f"_on_{what}")(*payload)
        kept = self.step * self.t.step_s
        self.parts["unfinished at the end"] = self.end - kept - sum(self.parts.values())
        return Outcome(self.end, kept, dict(self.parts), self.failures)

    def _at(self, when: float, what: str, *payload: int) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (when, self.num_events, what, payload))

    def _plan_failure(self) -> None:
        if self.given is not None:
            self.coming = next(self.given)
            self._at(self.coming.at_s, "failure")
            return
        self._at(self.now + self.random.expovariate(self.rate) if self.rate else self.end, "failure")

    def _go(self, way: list[tuple[str, float]]) -> None:
        """The ranks are down; what it takes until they make steps."""
        self.start += 1
        self.step_begun, self.way, self.way_begun, self.busy_until = None, way, self.now, 0.0
        self._at(self.now + sum(seconds for _, seconds in way), "started", self.start)

    def _on_started(self, start: int) -> None:
        if start == self.start:
            for what, seconds in self.way:
                self.parts[what] += seconds
            self._next_step(0.0)

    def _next_step(self, stall: float) -> None:
        self.parts["stalls of saves"] += stall
        self.step_begun = self.now + stall
        self._at(self.step_begun + self.t.step_s, "step", self.start)

    def _on_step(self, start: int) -> None:
        if start != self.start:
            return
        self.step += 1
        if self.t.hash_every_steps and self.step % self.t.hash_every_steps == 0:
            if self.is_corrupt:
                # Later checkpoints may hold it.
                self.durable, self.local = max(step for step in self.saved if step <= self.checked), 0
                self._go_back("lost to silent corruption", 0.0, takes_node=True)
                return
            self.checked = self.step
        self._next_step(self._save())

    def _save(self) -> float:
        """Begin the save that is due behind this step; what it stalls."""
        is_durable = self.step % self.t.save_every_steps == 0
        is_local = self.t.local_every_steps and self.step % self.t.local_every_steps == 0
        if not is_durable and not (is_local and self.now >= self.busy_until):
            return 0.0
        stall = max(0.0, self.busy_until - self.now) + self.t.stall_s
        self.busy_until = self.now + stall + (self.t.save_s if is_durable else self.t.local_save_s)
        self._at(self.busy_until, "saved", self.start, self.step, int(is_durable))
        return stall

    def _on_saved(self, start: int, step: int, is_durable: int) -> None:
        if start != self.start:
            return  # cut off
        if is_durable:
            self.durable, self.saved = step, [*self.saved[-500:], step]
        else:
            self.local = step

    def _on_failure(self) -> None:
        self.failures += 1
        kind = self.coming.kind
        self._plan_failure()
        if self.given is None:
            cause = CAUSES[self.random.choices(list(CAUSES), [cause.number for cause in CAUSES.values()])[0]]
        else:
            # What is stopped in a start is killed there: see goodput_real.py.
            cause = Cause(1, kind if self.step_begun is not None else "crash", takes_node=False)
        if cause.kind == "silent":
            self.is_corrupt = self.is_corrupt or self.step_begun is not None
            return
        if self.step_begun is None:
            left = self.now - self.way_begun
            for what, seconds in self.way:
                self.parts[what] += min(seconds, left)
                left -= min(seconds, left)
        else:
            # A stall that was not sat out had been counted in full.
            self.parts["stalls of saves"] -= max(0.0, self.step_begun - self.now)
            self.parts["steps cut off"] += max(0.0, self.now - self.step_begun)
        if cause.takes_node:
            self.local = 0
        noticed = self.t.detect_crash_s if cause.kind == "crash" else self.t.hang_limit_s + self.t.detect_hang_s
        self._go_back("steps made again", noticed, takes_node=cause.takes_node, is_hang=cause.kind == "hang")

    def _go_back(self, why: str, noticed_s: float, *, takes_node: bool, is_hang: bool = False) -> None:
        back = max(self.durable, self.local)
        self.parts[why] += (self.step - back) * self.t.step_s
        # What a checkpoint from behind the fault holds is found again at the next comparison.
        self.is_corrupt = self.is_corrupt and back > self.checked
        self.step, self.checked = back, min(self.checked, back)
        self._go(
            [
                ("noticing hangs" if is_hang else "noticing crashes", noticed_s),
                ("waiting for other nodes", self.t.replace_s if takes_node else 0.0),
                ("starting", self.t.start_s),
                ("loading", self.t.local_load_s if self.local > self.durable else self.t.load_s),
            ]
        )


def simulate(times: Times, seeds: int, days: float = DAYS, interruptions_per_day: float = INTERRUPTIONS / DAYS) -> list[Outcome]:
    """One outcome a seed."""
    return [Run(times, days, interruptions_per_day / DAY_S, seed).play() for seed in range(seeds)]


def expected_share(times: Times, interruptions_per_day: float = INTERRUPTIONS / DAYS) -> float:
    """The same without chance, to first order in the failure rate, and without silent corruption: what the simulation is checked by.

    Saves must be done before the next one is due.
    """
    total = sum(cause.number for cause in CAUSES.values())
    lost = 0.0
    for cause in CAUSES.values():
        share = cause.number / total
        if cause.kind == "silent":
            continue
        uses_local = bool(times.local_every_steps) and not cause.takes_node
        every, seconds = (times.local_every_steps, times.local_save_s) if uses_local else (times.save_every_steps, times.save_s)
        detect = times.detect_crash_s if cause.kind == "crash" else times.hang_limit_s + times.detect_hang_s
        again = every * times.step_s / 2 + seconds
        load = times.local_load_s if uses_local else times.load_s
        lost += share * (detect + again + times.start_s + load + (times.replace_s if cause.takes_node else 0.0))
    stalls = times.stall_s * max(1 / times.save_every_steps, 1 / times.local_every_steps if times.local_every_steps else 0.0) / times.step_s
    return (1 - interruptions_per_day / DAY_S * lost) / (1 + stalls)


VARIANTS: dict[str, dict[str, float | int]] = {
    "as given": {},
    "with a local tier every 2 steps": {"local_every_steps": 2},
    "a checkpoint every 10 minutes": {"save_every_steps": 100},
    "a checkpoint every hour": {"save_every_steps": 600},
    "saves that training waits for, every 10 minutes": {"stall_s": 30.0, "save_s": 0.0, "save_every_steps": 100},
    "hangs noticed after 600 s": {"hang_limit_s": 600.0},
    "starts of 300 s": {"start_s": 300.0},
    "replica hashes every 2000 steps": {"hash_every_steps": 2000},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--days", type=float, default=DAYS)
    parser.add_argument("--interruptions-per-day", type=float, default=INTERRUPTIONS / DAYS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--real", action="store_true", help="break a real run, and compare it with its simulation")
    parser.add_argument("--out", type=Path)
    for field in fields(Times):
        kind = int if isinstance(field.default, int) else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    given = parser.parse_args()
    if given.real:
        from goodput_real import compare  # beside this file

        sys.exit(compare(given.out))
    times = Times(**{field.name: getattr(given, field.name) for field in fields(Times)})
    seeds, days = (2, 3.0) if given.tiny else (given.seeds, given.days)
    results = {}
    for name, changes in VARIANTS.items():
        chosen = replace(times, **changes)  # type: ignore[arg-type]
        outcomes = simulate(chosen, seeds, days, given.interruptions_per_day)
        lost = {part: mean(o.parts.get(part, 0.0) / o.elapsed for o in outcomes) for part in {p for o in outcomes for p in o.parts}}
        ranked = dict(sorted(lost.items(), key=lambda item: -item[1]))
        shares = sorted(o.share for o in outcomes)
        results[name] = {
            "effective": mean(shares),
            "worst": shares[0],
            "best": shares[-1],
            "failures": mean(o.failures for o in outcomes),
            "lost": ranked,
        }
        print(f"{name}: {100 * mean(shares):.2f} % effective ({100 * shares[0]:.2f} to {100 * shares[-1]:.2f} % over {seeds} seeds)")
        for part, share in list(ranked.items())[: 6 if name == "as given" else 2]:
            print(f"    {100 * share:6.3f} %  {part}")
    if given.out:
        report = {"days": days, "interruptions_per_day": given.interruptions_per_day, "gpus": GPUS, "seeds": seeds}
        given.out.write_text(json.dumps(report | {"times": asdict(times), "variants": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
