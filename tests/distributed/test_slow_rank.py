"""A rank whose forward passes take longer is named, with its host, in the log, incidents.jsonl and metrics."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megavlm.config.schema import Recipe
from megavlm.testing.faults import slow_rank
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read
from megavlm.tracking.metrics import read_metrics
from megavlm.training.incidents import IncidentLog


def train_slowly(recipe: Recipe) -> list[dict[str, Any]]:
    """What this rank decides by afterwards."""
    logs, begin = [], IncidentLog.__init__

    def begin_and_keep(self: IncidentLog, run_dir: str, *, has_resumed: bool) -> None:
        begin(self, run_dir, has_resumed=has_resumed)
        logs.append(self)

    with slow_rank(1, 2.0), patch.object(IncidentLog, "__init__", begin_and_keep):
        train_and_read(recipe)
    (log,) = logs
    return log.incidents


def test_a_slow_rank_is_named(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        data_dir,
        [tiny_stage(steps=4)],
        faults={"straggler_factor": 1.5, "straggler_reports": 2},
        tracking={"log_every_steps": 1},
    )
    first, second = pool.run(train_slowly, recipe, world_size=2)
    assert first == second, "ranks decide by the same incidents"
    (incident,) = read_metrics(tmp_path, "incidents.jsonl")
    assert (incident["kind"], incident["rank"]) == ("straggler", 1) and incident["time_s"] > 0
    assert f"rank 1 ({socket.gethostname()}, process " in incident["text"] and "in language" in incident["text"]
    last = read_metrics(tmp_path)[-1]["straggler"]
    assert last["rank"] == 1 and last["skew"] > 1.5
