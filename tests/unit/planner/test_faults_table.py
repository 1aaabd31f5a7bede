"""What --dry-run says of a recipe's faults block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavlm.config.schema import Recipe
from megavlm.planner.faults import faults_table
from megavlm.testing.recipes import tiny_recipe


def said(tmp_path: Path, faults: dict[str, Any], world_size: int = 8, **blocks: Any) -> str:
    recipe: Recipe = tiny_recipe(tmp_path, tmp_path, faults=faults, **blocks)
    return faults_table(recipe, world_size)


def test_the_defaults(tmp_path: Path) -> None:
    text = said(tmp_path, {})
    assert "not a number: stop\n" in text and "spikes: not looked for\n" in text
    assert "step 180 s" in text and "save 600 s" in text
    assert "slow ranks: from 1.5 x" in text and "copies of parameters: never compared" in text


def test_what_is_chosen(tmp_path: Path) -> None:
    faults = {
        "on_nonfinite": "skip",
        "max_skips": 3,
        "on_spike": "rollback",
        "grad_norm_spike_factor": None,
        "watchdog": {"step_s": None},
        "replica_hash_every_steps": 100,
        "on_divergence": "report",
    }
    text = said(tmp_path, faults)
    assert "not a number: skip, at most 3 within 1000 steps" in text
    assert "spikes: loss above 2 x the median of 50 steps: rollback, at most 2 within 1000 steps" in text
    assert " step no limit" in text and "compared every 100 steps, then report" in text
    assert "copies of parameters: one rank has none" in said(tmp_path, faults, 1)
    assert "tracking.step_parts=false" in said(tmp_path, faults, tracking={"step_parts": False})


def test_a_spike_policy_without_a_factor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"on_spike=skip without loss_spike_factor and grad_norm_spike_factor"):
        said(tmp_path, {"on_spike": "skip", "loss_spike_factor": None, "grad_norm_spike_factor": None})
