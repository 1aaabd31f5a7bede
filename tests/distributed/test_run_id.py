"""The name that a run gives itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.checkpoint.folders import CHECKPOINTS
from megavlm.checkpoint.resume import RUN_ID, run_id
from megavlm.testing.pool import RankPool


@pytest.mark.parametrize("damage", [b"", b"\0" * 32, b"\x80\x04K\x01.", b"!!python/object:os.system x"])
def test_a_damaged_one_is_replaced_on_all_ranks(damage: bytes, pool: RankPool, tmp_path: Path) -> None:
    first = pool.run(run_id, tmp_path, world_size=2)
    assert first[0] == first[1] == pool.run(run_id, tmp_path, world_size=2)[0]
    file = tmp_path / CHECKPOINTS / RUN_ID
    assert file.read_text() == first[0]
    file.write_bytes(damage)
    second = pool.run(run_id, tmp_path, world_size=2)
    assert second[0] == second[1] == file.read_text() != first[0]
