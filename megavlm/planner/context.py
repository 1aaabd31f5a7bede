"""What a context split costs: pads, how even the work is, keys that travel; for the dry run, for accounting, and to refuse what cannot be.

Counted like planner/flops.py: the LLM's linear layers by row, pads included, since ranks compute them; attention by query-key pairs under
the causal mask; the head on each rank's own targets, which are taken to be spread evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

from megavlm.config.parallel import ContextSplit
from megavlm.config.schema import ModelConfig, ParallelConfig, Recipe, StageConfig
from megavlm.planner.attention import attention_calls
from megavlm.planner.flops import FlopsModel, VisionWork
from megavlm.topology.context import ContextLayout, context_layout, rows_of_rank
from megavlm.topology.table import text_table
from megavlm_kernels.context_attention.selection import CommError, SharedCall, choose_comm, unmet_comm
from megavlm_kernels.packed_attention.selection import Machine


class Pack(Protocol):
    """A planned pack (megavlm.data.types.PackPlan)."""

    @property
    def lengths_tokens(self) -> tuple[int, ...]: ...


def segments_of(packs: Iterable[Pack], seq_len_tokens: int) -> tuple[int, ...]:
    """Lengths of the segments of a microbatch: of each pack its samples, and the padding at its end where there is some."""
    found: list[int] = []
    for pack in packs:
        found += pack.lengths_tokens
        if (rest := seq_len_tokens - sum(pack.lengths_tokens)) > 0:
            found.append(rest)
    return tuple(found)


def layout_of(lengths: tuple[int, ...], parallel: ParallelConfig) -> ContextLayout:
    """How the ranks of a `parallel` block share a microbatch of these segments."""
    return context_layout(lengths, parallel.context_split, parallel.context, parallel.tensor if parallel.sequence else 1)


def pad_rows(lengths: tuple[int, ...], parallel: ParallelConfig) -> int:
    """Rows, over all context ranks, that a microbatch has beyond its own: context ranks compute them, and they belong to no sample."""
    if parallel.context == 1:
        return 0
    rows = rows_of_rank(lengths, parallel.context_split, parallel.context, parallel.tensor if parallel.sequence else 1)
    return rows * parallel.context - sum(lengths)


@dataclass(frozen=True)
class SplitCost:
    """A context split over several microbatches."""

    split: ContextSplit
    ranks: int
    rows: int
    """Of the microbatches."""
    pads: int
    attention: float
    """Query-key pairs of each microbatch's busiest rank over the mean of its ranks, averaged over microbatches."""
    attention_at_worst: float
    language: float
    """The same of the LLM's FLOPs: every microbatch waits for its busiest rank."""
    travelling: float
    """Rows of keys and values that ranks are sent, over those of an all-gather."""


def split_cost(
    model: ModelConfig, stage: StageConfig | None, microbatches: Sequence[tuple[int, ...]], parallel: ParallelConfig
) -> SplitCost:
    """What parallel.context_split costs for microbatches, given by the lengths of their segments."""
    flops = FlopsModel(model, stage)
    a_row, a_pair = _of_rows_and_pairs(flops)
    works = [layout_of(lengths, parallel).work() for lengths in microbatches]
    busiest = [[work.num_rows * a_row + pairs * a_pair for pairs in work.pairs] for work in works]
    rows, ranks = sum(sum(work.real_rows) for work in works), parallel.context
    gathered = sum(work.num_rows * ranks * (ranks - 1) for work in works)
    return SplitCost(
        split=parallel.context_split,
        ranks=ranks,
        rows=rows,
        pads=sum(work.pads for work in works),
        attention=sum(work.imbalance for work in works) / max(len(works), 1),
        attention_at_worst=max((work.imbalance for work in works), default=1.0),
        language=sum(map(max, busiest)) * ranks / max(sum(map(sum, busiest)), 1),
        travelling=sum(sum(work.received) for work in works) / max(gathered, 1),
    )


def split_table(model: ModelConfig, stage: StageConfig | None, microbatches: Sequence[tuple[int, ...]], parallel: ParallelConfig) -> str:
    """Every split of these microbatches, for --dry-run: so that a recipe's can be compared with the others."""
    rows = []
    for split in get_args(ContextSplit):
        cost = split_cost(model, stage, microbatches, parallel.model_copy(update={"context_split": split}))
        rows.append(
            (
                split,
                f"{cost.pads} ({100 * cost.pads / max(cost.rows, 1):.2f} %)",
                f"{cost.attention:.3f} ({cost.attention_at_worst:.3f})",
                f"{cost.language:.3f}",
                f"{100 * cost.travelling:.0f} %",
                "this recipe" if split == parallel.context_split else "",
            )
        )
    header = ("split", "pads", "attention of the busiest rank / mean (worst)", "LLM of the busiest rank / mean", "keys that travel", "")
    return text_table(header, rows, f"context splits of {len(microbatches)} microbatches over {parallel.context} ranks")


def _of_rows_and_pairs(flops: FlopsModel) -> tuple[float, float]:
    """FLOPs of the LLM's layers for a row, and for a query-key pair under the causal mask (two halves of a square's pairs)."""
    nothing = VisionWork()
    one, two = (flops.total([length], nothing, 0) for length in (1, 2))
    # total(n) = n x row + n^2 x square, and a segment of n rows has n (n + 1) / 2 causal pairs.
    square = (two - 2 * one) / 2
    return one - 2 * square, 2 * square


def check_context(recipe: Recipe) -> None:
    """Raises CommError where parallel.context_comm names a way that no machine has for the recipe's model, or that a CPU lacks."""
    parallel, language = recipe.parallel, recipe.model.language
    if parallel.context == 1:
        if parallel.context_comm != "auto":
            raise CommError(
                f"parallel.context_comm={parallel.context_comm}, but parallel.context=1: there are no context ranks. Leave it out"
            )
        return
    if parallel.context_comm == "auto":
        return
    heads, key_heads = language.num_attention_heads // parallel.tensor, max(1, language.kv_heads // parallel.tensor)
    found = {
        part: SharedCall(call, parallel.context, heads, key_heads, parallel.context_split)
        for part, call in attention_calls(recipe).items()
        if part.startswith("language")
    }
    for part, shared in found.items():
        reason = unmet_comm(parallel.context_comm, shared)
        if reason is not None:
            raise CommError(f"parallel.context_comm={parallel.context_comm} cannot serve model.{part}: {reason}. Set it to auto or keys")
    if recipe.run.device == "cpu":
        for shared in found.values():
            choose_comm(shared, Machine("cpu"), parallel.context_comm, recipe.precision.attention)
