"""From indexes to steps: which samples, packed how, on which rank and in which microbatch.

    SampleIndex + mixture --draw--> samples --pack--> packs of the step (the same for every layout) --balance--> StepPlan

Computed from metadata alone, identically on every rank, without communication. The packs of a step are a pure function of
(indexes, seed, mixture, budgets, step); only their places depend on the data-parallel size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from fractions import Fraction
from typing import Any

from megavlm.config.schema import DataConfig, ModelConfig, StageConfig
from megavlm.data.mixture import Draw, Mixture, MixtureEnd, Source
from megavlm.data.packing import Packer, Waiting
from megavlm.data.plan_columns import Columns, EndOfData, Index, PlanError, check_tasks, expected_fill, pack_budget
from megavlm.data.plan_cursor import CursorError, Stream, check_cursor, identity, written
from megavlm.data.types import PackPlan, SampleRef, StepPlan
from megavlm.planner.balance import deal
from megavlm.planner.flops import FlopsModel, VisionWork
from megavlm.topology.table import human_count, text_table

__all__ = ["CursorError", "EndOfData", "Index", "PlanError", "StepPlanner", "check_tasks", "step_table"]

ESTIMATE_MARGIN = 1.01
"""Sources that are expected to end this much before the stage does are told before it starts."""


class StepPlanner:
    """The stream of steps of one stage.

    `indexes`: source name -> index; sources of the mixture with weight 0 may be missing. `cursor`: a `StepPlan.cursor_after` of the
    same stage; the stream goes on behind that step, with any data-parallel size. For the objective vision_classification a sample
    counts 1 and the budget is `stage.images_per_pack`: `lengths_tokens` of its packs are ones.

    Each plan's `statistics`:
        pack_fill             tokens in the step's packs / their budget
        samples               samples in the step
        oldest_wait_samples   samples drawn since the oldest waiting one was
        flops_imbalance       FLOPs of the busiest rank / mean over ranks: 1 is perfect
        vision_imbalance      the same of the FLOPs of encoder and projector, which may have pipeline stages of their own
        microbatch_imbalance  FLOPs if all ranks waited for each other at every microbatch / mean over ranks
        curriculum_lag_steps  only where weights change: how many steps later than the recipe says the shares of this step are due
                              (they are planned ahead from expected numbers of samples a step)
        epochs/<source>       passes over the source so far, samples that wait included

    Raises:
        PlanError: packs_per_step is not dp_size x num_microbatches x micro_batch_packs; a source is missing; samples that break a
            budget or that the objective cannot use (how many, and which is the worst).
        MixtureError: a mixture that cannot be drawn from.
        CursorError: the cursor was made with other indexes, tokenizer, settings, seed, budgets or mixture: all differences are named.
    """

    def __init__(
        self,
        indexes: Mapping[str, Index],
        stage: StageConfig,
        data: DataConfig,
        model: ModelConfig,
        *,
        seed: int,
        dp_size: int,
        num_microbatches: int,
        cursor: Mapping[str, Any] | None = None,
    ) -> None:
        if dp_size * num_microbatches * stage.micro_batch_packs != stage.packs_per_step:
            raise PlanError(
                f"stage {stage.name!r}: {dp_size} data-parallel ranks x {num_microbatches} microbatches x "
                f"micro_batch_packs={stage.micro_batch_packs} = {dp_size * num_microbatches * stage.micro_batch_packs} packs, "
                f"but packs_per_step={stage.packs_per_step}"
            )
        self._stage, self._data, self._dp_size, self._num_microbatches, self._seed = stage, data, dp_size, num_microbatches, seed
        if missing := sorted(set(stage.sources) - set(indexes)):
            raise PlanError(f"stage {stage.name!r}: the mixture names sources without an index: {', '.join(missing)}")
        self._columns = {name: Columns(name, indexes[name], stage, data) for name in sorted(stage.sources)}
        self._model, self._flops = model, FlopsModel(model, stage)
        depends_on = identity(self._columns, stage, data, model, seed)
        if cursor is not None:
            check_cursor(cursor, depends_on)
        self._identity = written(depends_on)
        self._step = int(cursor["step"]) if cursor is not None else 0
        self._stream = Stream(list(self._columns), self._open_mixture, cursor)
        self._mixture = self._stream.mixture
        self._end: EndOfData | None = None
        waiting = [self._waiting(draw) for draw in self._stream.held]
        self._packer: Packer[Draw] = Packer(pack_budget(stage, data), data.pack_window_samples, packing=data.packing, waiting=waiting)

    @property
    def step(self) -> int:
        """The step that `next` plans, counted from 0 over the stage."""
        return self._step

    def next(self) -> StepPlan:
        """Plan one step.

        Raises:
            EndOfData: every source has reached its max_epochs and what is left does not fill the step's packs; from then on always.
            PlanError: the same before the first step.
        """
        packs = self._next_packs()
        vision = [self._flops.total((), pack.vision._replace(looks=0), 0) for pack in packs]
        costs = [(pack.flops, float(part)) for pack, part in zip(packs, vision, strict=True)]
        dealt = deal(costs, self._dp_size, self._num_microbatches)
        assignment = tuple(tuple(tuple(packs[i] for i in items) for items in rank) for rank in dealt)
        step, self._step = self._step, self._step + 1
        return StepPlan(step=step, assignment=assignment, cursor_after=self.cursor(), statistics=self._statistics(packs, costs, dealt))

    def cursor(self) -> dict[str, object]:
        """JSON-serialisable state from which `next` goes on: what the plan depends on, `step`, and `Stream.position`."""
        return {**deepcopy(self._identity), "step": self._step, **self._stream.position(w.arrival for w in self._packer.waiting)}

    def _open_mixture(self, counters: Mapping[str, int]) -> Mixture:
        """The stage's mixture at given counters."""
        stage, data, entries = self._stage, self._data, self._stage.mixture_entries
        budget = pack_budget(stage, data)
        # Lengths only matter for when something changes.
        changes = any(isinstance(entry.weight, dict) or entry.max_epochs is not None for entry in entries.values())
        counts_tokens = changes and data.packing
        sources = {
            name: Source(columns.num_rows, columns.mean_length) if counts_tokens and columns.num_rows else Source(columns.num_rows)
            for name, columns in self._columns.items()
        }

        def tokens_per_step(shares: Mapping[str, Fraction]) -> Fraction:
            if not counts_tokens:
                return Fraction(stage.packs_per_step)
            return stage.packs_per_step * budget.length * expected_fill(self._columns, shares, budget, data.pack_window_samples)

        return Mixture(entries, sources, self._seed, counters, tokens_per_step)

    @property
    def early_end(self) -> str | None:
        """What to tell before the stage starts when its sources are expected to end before its steps do; else None."""
        end = self._mixture.target.end_step
        if end is None or end * ESTIMATE_MARGIN >= self._stage.steps:
            return None
        return (
            f"stage {self._stage.name!r}: every source reaches mixture.*.max_epochs after {self._mixture.target.end_draws} samples, about "
            f"{end:.0f} steps, before steps={self._stage.steps}: the stage will end there, with its learning rate still on the way. Set "
            f"steps={max(1, int(end))} for a schedule that ends with the data, or raise max_epochs"
        )

    def _waiting(self, draw: Draw) -> Waiting[Draw]:
        columns = self._columns[draw.source]
        return Waiting(int(columns.lengths[draw.row]), int(columns.patches[draw.row]), draw, draw.ordinal)

    def _draw(self) -> Waiting[Draw] | None:
        try:
            return self._waiting(self._stream.draw())
        except MixtureEnd:
            return None

    def _next_packs(self) -> list[PackPlan]:
        """The packs of one step."""
        packs: list[PackPlan] = []
        while self._end is None and len(packs) < self._stage.packs_per_step:
            if chosen := self._packer.next_pack(self._draw):
                packs.append(self._pack(chosen))
            else:
                self._end = EndOfData(self._stage.name, self._step, sum(len(pack.samples) for pack in packs))
        if self._end is None:
            return packs
        if not self._step:
            raise PlanError(
                f"stage {self._stage.name!r}: all samples that mixture.*.max_epochs allows, {self._mixture.num_draws}, do not fill the "
                f"{self._stage.packs_per_step} packs of one step: lower packs_per_step, or raise max_epochs"
            )
        raise self._end

    def _pack(self, chosen: Sequence[Waiting[Draw]]) -> PackPlan:
        lengths = tuple(w.length for w in chosen)
        work = VisionWork.total(self._columns[w.sample.source].work(w.sample.row) for w in chosen)
        if self._model.language.cross_attention is not None:
            work = work._replace(looks=sum(self._columns[w.sample.source].looks(w.sample.row, self._model) for w in chosen))
        num_targets = sum(int(self._columns[w.sample.source].targets[w.sample.row]) for w in chosen)
        return PackPlan(
            samples=tuple(SampleRef(w.sample.source, w.sample.row) for w in chosen),
            lengths_tokens=lengths,
            vision=work,
            num_targets=num_targets,
            flops=float(self._flops.total(lengths, work, num_targets)),
        )

    def _statistics(self, packs: list[PackPlan], costs: Sequence[tuple[float, float]], dealt: list[list[list[int]]]) -> dict[str, float]:
        draws, waiting = self._mixture.num_draws, self._packer.waiting
        # Indexed by part, rank, microbatch.
        work = [[[sum(costs[i][part] for i in items) for items in rank] for rank in dealt] for part in (0, 1)]
        statistics = {
            "pack_fill": sum(sum(pack.lengths_tokens) for pack in packs) / (len(packs) * self._packer.budget.length),
            "samples": float(sum(len(pack.samples) for pack in packs)),
            "oldest_wait_samples": float(max((draws - w.arrival for w in waiting), default=0)),
            "flops_imbalance": _over_mean([sum(rank) for rank in work[0]]),
            "vision_imbalance": _over_mean([sum(rank) for rank in work[1]]),
            "microbatch_imbalance": _lockstep(work[0]),
        }
        if self._mixture.target.has_steps:
            statistics["curriculum_lag_steps"] = self._step - self._mixture.target.step_at(draws - len(waiting))
        return statistics | {f"epochs/{name}": epochs for name, epochs in self._mixture.epochs.items()}


def _over_mean(loads: Sequence[float]) -> float:
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def _lockstep(work: Sequence[Sequence[float]]) -> float:
    """Summed cost of the costliest of each microbatch / mean over ranks of their sums; `work` is [rank][microbatch]."""
    mean = sum(map(sum, work)) / len(work)
    return sum(map(max, zip(*work, strict=True))) / mean if mean else 1.0


def step_table(plan: StepPlan) -> str:
    """One step as text for --dry-run: a line a data-parallel rank."""
    rows = []
    for rank, microbatches in enumerate(plan.assignment):
        packs = [pack for group in microbatches for pack in group]
        rows.append(
            (
                rank,
                len(microbatches),
                len(packs),
                sum(len(pack.samples) for pack in packs),
                sum(sum(pack.lengths_tokens) for pack in packs),
                sum(pack.num_tiles for pack in packs),
                sum(pack.num_targets for pack in packs),
                human_count(sum(pack.flops for pack in packs)),
            )
        )
    header = ("data rank", "microbatches", "packs", "samples", "tokens", "tiles", "targets", "FLOPs")
    statistics = ", ".join(f"{name} {value:.4g}" for name, value in plan.statistics.items())
    return text_table(header, rows, f"step {plan.step}: {statistics}")
