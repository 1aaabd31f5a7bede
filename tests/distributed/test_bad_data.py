"""Too many unreadable pictures stop every rank by itself, also a middle pipeline stage that reads none."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from megavlm.data.bad_samples import BadDataError
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage


@pytest.fixture(scope="session")
def broken_data(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every picture of one source is zeros."""
    folder = tmp_path_factory.mktemp("broken-data") / "data"
    shutil.copytree(data_dir, folder, ignore=shutil.ignore_patterns(".megavlm-index"))
    for path in (folder / "pages").glob("shard-*.tar"):
        with tarfile.open(path) as tar:
            pictures = [m for m in tar if m.name.endswith(".png")]
        with open(path, "r+b") as file:
            for member in pictures:
                file.seek(member.offset_data)
                file.write(b"\0" * member.size)
    return folder


def how_it_ends(recipe: Any) -> str:
    from megavlm.training.run import train

    try:
        train(recipe)
    except BadDataError as error:
        return str(error)
    return "trained"


def count(message: str) -> tuple[str, ...]:
    found = re.match(r"(\d+) of (\d+) samples so far could not be read, more than data.max_bad_fraction=0.01 ", message)
    assert found, message
    return found.groups()


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [pytest.param(4, {"pipeline": 4}, id="pipeline of 4"), pytest.param(4, {"pipeline": 2}, id="2 data ranks, pipeline of 2")],
)
def test_all_ranks_stop_together(pool: RankPool, tmp_path: Path, broken_data: Path, world_size: int, parallel: dict[str, Any]) -> None:
    recipe = tiny_recipe(tmp_path, broken_data, [tiny_stage(steps=50)], parallel=parallel)
    ends = pool.run(how_it_ends, recipe, world_size=world_size, timeout_s=60)
    assert len({count(message) for message in ends}) == 1, "the same global count on every rank"
    lines = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert len(lines) == int(count(ends[0])[0]), "and it is the number of lines in the log"
