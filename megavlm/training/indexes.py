"""Indexes of a run's sources: built once a machine, the same on every rank, or refused by all ranks together."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megavlm.config.schema import Recipe, StageConfig
from megavlm.data.index import SampleIndex, build_index
from megavlm.data.tokenizer import Tokenizer


class IndexMismatch(ValueError):
    """Ranks that see different data, or of which some cannot read them."""


def build_on_rank_zero_first(recipe: Recipe, stage: StageConfig, names: Sequence[str], tokenizer: Tokenizer) -> dict[str, SampleIndex]:
    """Index each named source, in three turns: rank 0, then the first rank of every other machine, then the rest.

    So a cache that machines share is written once, and machines that share none write their own. All ranks call this together.

    Raises:
        IndexMismatch: an index is not the same on all ranks, or only some ranks other than 0 could be served; on every rank alike.
        ValueError, OSError, ...: what rank 0 met, on every rank alike.
    """
    indexes: dict[str, SampleIndex] = {}
    problem: Exception | None = None
    rank, sources = dist.get_rank(), recipe.data.sources
    is_first_here = int(os.environ.get("LOCAL_RANK", rank)) == 0
    own_turn = 0 if rank == 0 else 1 if is_first_here else 2
    for turn in range(3):
        if turn == own_turn:
            try:
                for name in names:
                    indexes[name] = build_index(sources[name], recipe.data, recipe.model, stage.objective, tokenizer, progress=rank == 0)
            except Exception as error:
                problem = _portable(error)
        # Told, not left to be found out: ranks that waited for another would end with a lost connection instead of the reason.
        _raise_together(_gather(problem))
    _compare(_gather({name: str(index.fingerprint) for name, index in indexes.items()}))
    return indexes


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _portable(error: Exception) -> Exception:
    """The error itself where it can travel, else its text."""
    try:
        return error if type(pickle.loads(pickle.dumps(error))) is type(error) else ValueError(f"{type(error).__name__}: {error}")
    except Exception:
        return ValueError(f"{type(error).__name__}: {error}")


def _raise_together(problems: Sequence[Exception | None]) -> None:
    """Raise the same on every rank when any rank has a problem: rank 0's own, else one that names the ranks."""
    if problems[0] is not None:
        raise problems[0]
    ranks: dict[str, list[int]] = {}
    for rank, problem in enumerate(problems):
        if problem is not None:
            ranks.setdefault(f"{type(problem).__name__}: {problem}", []).append(rank)
    if ranks:
        told = "\n  ".join(f"{_named(where)}: {text}" for text, where in ranks.items())
        raise IndexMismatch(
            f"rank 0 has read the data of this stage, but other ranks have not:\n  {told}\nevery machine needs the same shards"
        )


def _compare(fingerprints: Sequence[dict[str, str]]) -> None:
    """Raise IndexMismatch on every rank when a source's index is not the same on all: they would plan different steps."""
    differing = []
    for name in fingerprints[0]:
        ranks: dict[str, list[int]] = {}
        for rank, found in enumerate(fingerprints):
            ranks.setdefault(found[name], []).append(rank)
        if len(ranks) > 1:
            differing.append(f"{name}: " + ", ".join(f"{_named(where)} {mark[:16]}" for mark, where in ranks.items()))
    if differing:
        raise IndexMismatch(
            "these sources are not the same on every rank (ranks and the fingerprints of what they read):\n  "
            + "\n  ".join(differing)
            + "\ngive every machine the same shards, tokenizer and template, or a path that all of them share"
        )


def _named(ranks: Sequence[int]) -> str:
    """ "rank 3", or "ranks 0-3, 8", for ascending numbers."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
