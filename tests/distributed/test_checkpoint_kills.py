"""kill -9 while a checkpoint is being saved: whatever has a checkpoint's name is whole, and is what was saved.

A rank's writer is a thread of it, so a rank that is killed is a writer that is killed.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from megavlm.checkpoint import folders, random_states
from megavlm.checkpoint.pieces import pieces_of
from megavlm.checkpoint.reader import CheckpointReader
from megavlm.checkpoint.retention import Rules, prune
from megavlm.checkpoint.saver import Saver
from megavlm.config.schema import ParallelConfig
from megavlm.parallel.context import enter_grid, start_process_group
from megavlm.testing.tiny import tiny_chunks, tiny_model_config
from megavlm_launchers.environment import held_port

RANKS = 2
CPU = torch.device("cpu")


def save_for_ever(rank: int, port: int, run_dir: Path) -> None:
    """Save one checkpoint after the other; every value of the n-th is n."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    start_process_group(CPU, 30.0)
    ctx = enter_grid(ParallelConfig(), CPU, seed=1)
    chunks = tiny_chunks(tiny_model_config(), ctx, ParallelConfig())
    saver = Saver(chunks, None, ctx, timeout_s=30.0)

    def tidy_up(path: Path, is_local: bool) -> None:
        prune(run_dir, Rules(keep_last=2))

    saver.after = tidy_up
    last = folders.newest(run_dir)
    step = 0 if last is None else folders.step_and_stage(last.name)[0]
    while True:
        step += 1
        with torch.no_grad():
            for piece in pieces_of(chunks, None, ctx).model:
                piece.tensor.fill_(step)
        saver.begin(run_dir / "checkpoints" / f"{step:08d}-all", {"step": step})
        while saver.is_busy:
            outcome = saver.advance(saver._agree())
            assert outcome is None or outcome.error is None, outcome


def kill_while_saving(run_dir: Path, dice: random.Random) -> int:
    """Start the ranks, kill one at a random moment, and see the other end by itself. Returns the step that was saved last."""
    with held_port() as port:
        return _kill_while_saving(run_dir, dice, port)


def _kill_while_saving(run_dir: Path, dice: random.Random, port: int) -> int:
    context = mp.get_context("fork")
    ranks = [context.Process(target=save_for_ever, args=(rank, port, run_dir), daemon=True) for rank in range(RANKS)]
    before = folders.latest(run_dir)
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 60
    while folders.latest(run_dir) == before:
        assert time.monotonic() < deadline and all(p.is_alive() for p in ranks), "no checkpoint is ever saved"
        time.sleep(0.01)
    time.sleep(dice.uniform(0.0, 0.4))
    victim = dice.randrange(RANKS)
    pid = ranks[victim].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for process in ranks:
        process.join(20)
        alive = process.is_alive()
        process.kill()
        process.join()
        assert not alive, "the other rank hangs"
    latest = folders.latest(run_dir)
    assert latest is not None
    return folders.step_and_stage(latest)[0]


def check_everything(run_dir: Path, latest: int) -> None:
    """Each folder that is named as a checkpoint is one, whole, with values of one step; and none is lost that `latest` named."""
    found = folders.named(run_dir)
    assert found and folders.step_and_stage(found[-1].name)[0] in (latest, latest + 1), "renamed, but `latest` not moved yet, at most"
    assert any(folders.step_and_stage(path.name)[0] == latest for path in found)
    for path in found:
        assert folders.problem(path) is None
        folders.verify(path)
        step, reader = folders.read_state(path)["step"], CheckpointReader(path)
        assert step == folders.step_and_stage(path.name)[0]
        values = [reader.tensor(key) for key in reader.entries if not key.startswith(random_states.PREFIX)]
        assert values and all(torch.equal(t, torch.full_like(t, step)) for t in values)


@pytest.mark.parametrize("num_points, seed", [(4, 1), pytest.param(100, 2, marks=pytest.mark.slow)])
def test_kills_at_random_points(num_points: int, seed: int, tmp_path: Path) -> None:
    dice, last = random.Random(seed), 0
    unfinished = 0
    for _ in range(num_points):
        latest = kill_while_saving(tmp_path, dice)
        assert latest > last, "what was saved stays saved"
        unfinished += any(folders.is_leftover(p) for p in (tmp_path / "checkpoints").iterdir())
        check_everything(tmp_path, latest)
        last = latest
    assert unfinished, "no kill came in the middle of a save: this tests nothing"
