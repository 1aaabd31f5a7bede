"""From indexes to steps: which samples, packed how, on which rank and in which microbatch.

    SampleIndex + mixture --draw--> samples --pack--> packs of the step (the same for every layout) --balance--> StepPlan

Computed from metadata alone, identically on every rank, without communication. The packs of a step are a pure function of
(indexes, seed, mixture, budgets, step); only their places depend on the data-parallel size.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megavlm.config.schema import DataConfig, ModelConfig, StageConfig
from megavlm.data.mixture import Draw, Mixture
from megavlm.data.packing import Budget, Packer, Waiting
from megavlm.data.types import PackPlan, SampleRef, StepPlan
from megavlm.planner.balance import balance
from megavlm.planner.flops import FlopsModel, VisionWork
from megavlm.topology.table import human_count, text_table

CURSOR_VERSION = 1
"""Raised whenever the same cursor would lead to other packs: order, mixture rule, packing."""


class PlanError(ValueError):
    """Data, stage and layout do not fit together."""


class CursorError(ValueError):
    """A cursor that belongs to other data or another plan."""


class Index(Protocol):
    """What planning needs of a source's SampleIndex: a row a sample, metadata only."""

    @property
    def length_tokens(self) -> npt.NDArray[np.integer]: ...
    @property
    def num_tiles(self) -> npt.NDArray[np.integer]: ...
    @property
    def num_patches(self) -> npt.NDArray[np.integer]: ...
    @property
    def patch_pairs(self) -> npt.NDArray[np.integer]: ...
    @property
    def num_targets(self) -> npt.NDArray[np.integer]: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...


class StepPlanner:
    """The endless stream of steps of one stage.

    `indexes`: source name -> index; sources of the mixture with weight 0 may be missing. `cursor`: a `StepPlan.cursor_after` of the
    same stage; the stream goes on behind that step, with any data-parallel size. For the objective vision_classification a sample
    counts 1 and the budget is `stage.images_per_pack`: `lengths_tokens` of its packs are ones.

    Each plan's `statistics`:
        pack_fill            tokens in the step's packs / their budget
        samples              samples in the step
        oldest_wait_samples  samples drawn since the oldest waiting one was
        flops_imbalance      FLOPs of the busiest rank / mean over ranks: 1 is perfect
        epochs/<source>      passes over the source so far, samples that wait included

    Raises:
        PlanError: packs_per_step is not dp_size x num_microbatches x micro_batch_packs; a source is missing; samples that break a
            budget or that the objective cannot use (how many, and which is the worst).
        CursorError: the cursor was made with other indexes, seed, budgets or mixture: all differences are named.
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
        cursor: Mapping[str, object] | None = None,
    ) -> None:
        if dp_size * num_microbatches * stage.micro_batch_packs != stage.packs_per_step:
            raise PlanError(
                f"stage {stage.name!r}: {dp_size} data-parallel ranks x {num_microbatches} microbatches x "
                f"micro_batch_packs={stage.micro_batch_packs} = {dp_size * num_microbatches * stage.micro_batch_packs} packs, "
                f"but packs_per_step={stage.packs_per_step}"
            )
        self._stage, self._dp_size, self._num_microbatches, self._seed = stage, dp_size, num_microbatches, seed
        weights = {name: float(entry.weight) for name, entry in stage.mixture_entries.items() if not isinstance(entry.weight, dict | None)}
        if missing := sorted(set(weights) - set(indexes)):
            raise PlanError(f"stage {stage.name!r}: the mixture names sources without an index: {', '.join(missing)}")
        self._columns = {name: _Columns(name, indexes[name], stage, data) for name in sorted(weights)}
        self._flops = FlopsModel(model, stage)
        self._identity = _identity(self._columns, weights, stage, data, seed)
        if cursor is not None:
            _check_cursor(cursor, self._identity)
        counters = dict(cursor["counters"]) if cursor is not None else None  # type: ignore[call-overload]
        self._step = int(cursor["step"]) if cursor is not None else 0  # type: ignore[call-overload]
        self._mixture = Mixture(weights, {name: columns.num_rows for name, columns in self._columns.items()}, seed, counters)
        self._packer: Packer[Draw] = Packer(_budget(stage, data), data.pack_window_samples, packing=data.packing)
        if cursor is not None:
            self._packer.waiting = self._restore_waiting(cursor["waiting"])  # type: ignore[arg-type]

    @property
    def step(self) -> int:
        """The step that `next` plans, counted from 0 over the stage."""
        return self._step

    def next(self) -> StepPlan:
        """Plan one step."""
        packs = [self._next_pack() for _ in range(self._stage.packs_per_step)]
        ranks = balance([pack.flops for pack in packs], self._dp_size)
        assignment = tuple(self._microbatches([packs[i] for i in items]) for items in ranks)
        step, self._step = self._step, self._step + 1
        return StepPlan(step=step, assignment=assignment, cursor_after=self.cursor(), statistics=self._statistics(packs, assignment))

    def cursor(self) -> dict[str, object]:
        """JSON-serialisable state from which `next` goes on.

        Waiting samples are stored as three lists: source (place in `sources`), draws of that source since, draws of all since.
        """
        counters, draws, waiting = self._mixture.counters, self._mixture.num_draws, self._packer.waiting
        place = {name: i for i, name in enumerate(self._mixture.sources)}
        return {
            **deepcopy(self._identity),
            "step": self._step,
            "counters": counters,
            "waiting": {
                "source": [place[w.sample.source] for w in waiting],
                "behind": [counters[w.sample.source] - w.sample.number for w in waiting],
                "age": [draws - w.sample.ordinal for w in waiting],
            },
        }

    def _restore_waiting(self, stored: Mapping[str, list[int]]) -> list[Waiting[Draw]]:
        sources, counters, draws = self._mixture.sources, self._mixture.counters, self._mixture.num_draws
        waiting = []
        for place, behind, age in zip(stored["source"], stored["behind"], stored["age"], strict=True):
            source = sources[place]
            number = counters[source] - behind
            waiting.append(self._waiting(Draw(source, number, self._mixture.row(source, number), draws - age)))
        return waiting

    def _waiting(self, draw: Draw) -> Waiting[Draw]:
        columns = self._columns[draw.source]
        return Waiting(int(columns.lengths[draw.row]), int(columns.patches[draw.row]), draw)

    def _next_pack(self) -> PackPlan:
        chosen = self._packer.next_pack(lambda: self._waiting(self._mixture.draw()))
        lengths = tuple(w.length for w in chosen)
        work = VisionWork.total(self._columns[w.sample.source].work(w.sample.row) for w in chosen)
        num_targets = sum(int(self._columns[w.sample.source].targets[w.sample.row]) for w in chosen)
        return PackPlan(
            samples=tuple(SampleRef(w.sample.source, w.sample.row) for w in chosen),
            lengths_tokens=lengths,
            vision=work,
            num_targets=num_targets,
            flops=float(self._flops.total(lengths, work, num_targets)),
        )

    def _microbatches(self, packs: list[PackPlan]) -> tuple[tuple[PackPlan, ...], ...]:
        """One rank's packs as microbatches of about equal cost, costliest first."""
        groups = [[packs[i] for i in items] for items in balance([pack.flops for pack in packs], self._num_microbatches)]
        return tuple(tuple(group) for group in sorted(groups, key=lambda group: -sum(pack.flops for pack in group)))

    def _statistics(self, packs: list[PackPlan], assignment: tuple[tuple[tuple[PackPlan, ...], ...], ...]) -> dict[str, float]:
        flops = [sum(pack.flops for group in rank for pack in group) for rank in assignment]
        draws = self._mixture.num_draws
        return {
            "pack_fill": sum(sum(pack.lengths_tokens) for pack in packs) / (len(packs) * self._packer.budget.length),
            "samples": float(sum(len(pack.samples) for pack in packs)),
            "oldest_wait_samples": float(max((draws - w.sample.ordinal for w in self._packer.waiting), default=0)),
            "flops_imbalance": max(flops) * len(flops) / sum(flops) if sum(flops) else 1.0,
            **{f"epochs/{name}": epochs for name, epochs in self._mixture.epochs.items()},
        }


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


class _Columns:
    """The columns of one source that planning reads, checked against the stage's budgets."""

    def __init__(self, name: str, index: Index, stage: StageConfig, data: DataConfig) -> None:
        self.num_rows, self.fingerprint = len(index), str(index.fingerprint)
        self.tiles, self.patches, self.pairs = (np.asarray(c) for c in (index.num_tiles, index.num_patches, index.patch_pairs))
        self.targets = np.asarray(index.num_targets)
        images_only = stage.objective == "vision_classification"
        self.lengths = np.ones(self.num_rows, dtype=np.int64) if images_only else np.asarray(index.length_tokens)
        for column in (self.lengths, self.tiles, self.patches, self.pairs, self.targets):
            assert column.shape == (self.num_rows,), f"index of {name!r}: a column has shape {column.shape}, not ({self.num_rows},)"
        where = f"stage {stage.name!r}, source {name!r}"
        if images_only:
            _refuse(
                where,
                self.tiles < 1,
                self.tiles,
                "have no image, and vision_classification trains on images",
                "filter by data.sources.*.tasks",
            )
        else:
            _refuse(where, self.lengths < 1, self.lengths, "have no token", "remove them from the shards")
            advice = "raise it, lower data.image.max_tiles, or remove them from the shards: megavlm never truncates"
            over = f"are longer than data.seq_len_tokens={data.seq_len_tokens}"
            _refuse(where, self.lengths > data.seq_len_tokens, self.lengths, over, advice)
        if stage.objective == "text":
            _refuse(where, self.tiles > 0, self.tiles, "have images, and objective text takes none", "filter by data.sources.*.tasks")
        if (most := data.max_patches_per_pack) is not None:
            over = f"have more patches than data.max_patches_per_pack={most}"
            _refuse(where, self.patches > most, self.patches, over, "raise it or lower data.image.max_tokens_per_sample")

    def work(self, row: int) -> VisionWork:
        """Of one sample's pictures."""
        return VisionWork(int(self.tiles[row]), int(self.patches[row]), int(self.pairs[row]))


def _refuse(where: str, bad: npt.NDArray[np.bool_], values: npt.NDArray[np.integer], what: str, advice: str) -> None:
    """Raise PlanError when any row is bad, naming how many there are and the worst of them."""
    if count := int(np.count_nonzero(bad)):
        rows = np.flatnonzero(bad)
        worst = int(rows[int(np.argmax(values[rows]))])
        raise PlanError(f"{where}: {count} of {len(bad)} samples {what} (row {worst} has {int(values[worst])}): {advice}")


def _budget(stage: StageConfig, data: DataConfig) -> Budget:
    """Hard budgets of one pack."""
    if stage.objective != "vision_classification":
        return Budget(data.seq_len_tokens, data.max_patches_per_pack)
    # A fixed number of equal tiles: the budget on patches says nothing that images_per_pack does not.
    return Budget(stage.images_per_pack)


def _identity(
    columns: Mapping[str, _Columns], weights: Mapping[str, float], stage: StageConfig, data: DataConfig, seed: int
) -> dict[str, object]:
    """Everything that the global packs depend on, besides the position in the stream."""
    budgets: dict[str, object] = {
        "objective": stage.objective,
        "packs_per_step": stage.packs_per_step,
        "pack_window_samples": data.pack_window_samples,
        "max_patches_per_pack": data.max_patches_per_pack,
        "packing": data.packing,
    }
    classification = stage.objective == "vision_classification"
    budgets |= {"images_per_pack": stage.images_per_pack} if classification else {"seq_len_tokens": data.seq_len_tokens}
    return {
        "version": CURSOR_VERSION,
        "seed": seed,
        "budgets": budgets,
        "mixture": {name: float(weights[name]) for name in sorted(weights)},
        "fingerprints": {name: columns[name].fingerprint for name in sorted(columns)},
    }


def _check_cursor(cursor: Mapping[str, object], identity: Mapping[str, object]) -> None:
    """Refuse a cursor that would lead to other packs than it promises, naming every difference."""
    if absent := [key for key in (*identity, "step", "counters", "waiting") if key not in cursor]:
        raise CursorError(f"this is no data cursor: it lacks {', '.join(absent)}")
    changes = []
    for key, now in identity.items():
        then = cursor[key]
        if not isinstance(now, Mapping) or not isinstance(then, Mapping):
            if then != now:
                changes.append(f"{key}: {then!r} then, {now!r} now")
            continue
        for name in sorted(set(now) | set(then)):
            if then.get(name, "absent") != now.get(name, "absent"):
                changes.append(f"{key}.{name}: {then.get(name, 'absent')!r} then, {now.get(name, 'absent')!r} now")
    if changes:
        raise CursorError(
            "cannot resume the data stream, because what it depends on has changed:\n  "
            + "\n  ".join(changes)
            + "\nset these back, or start the changed data as a new stage"
        )
