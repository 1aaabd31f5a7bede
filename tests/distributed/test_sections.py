"""Which section of the watchdog a run is in, from its start to its end."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from megavlm.parallel.watchdog import Watchdog
from megavlm.testing.in_rank import in_rank
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read


@in_rank
def test_every_part_of_a_run_has_its_limit(tmp_path: Path, data_dir: Path) -> None:
    entered: list[tuple[str, float | None, str]] = []
    enter = Watchdog.enter

    def note(self: Watchdog, name: str, limit_s: float | None, setting: str, *code: int) -> None:
        entered.append((name, limit_s, setting))
        enter(self, name, limit_s, setting, *code)

    recipe = tiny_recipe(
        tmp_path,
        data_dir,
        [tiny_stage("one", steps=2), tiny_stage("two", steps=1)],
        evaluation={"sources": ["held_out"], "every_steps": 2, "packs": 4},
        checkpoint={"timeout_s": 300.0},
        faults={"watchdog": {"step_s": 100.0, "first_step_s": None}},
    )
    with patch.object(Watchdog, "enter", note):
        train_and_read(recipe)
    setup = ("setup", 600.0, "faults.watchdog.setup_s")
    first = ("the first step", None, "faults.watchdog.first_step_s")
    step = ("a step", 100.0, "faults.watchdog.step_s")
    evaluation = ("an evaluation", 600.0, "faults.watchdog.evaluation_s")
    save = ("a checkpoint", 315.0, "checkpoint.timeout_s")
    assert entered == [setup, setup, first, step, evaluation, step, save, step, setup, first, evaluation, first, save, first, setup]
