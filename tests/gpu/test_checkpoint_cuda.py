"""Saves from a GPU: through pinned memory, while the next steps run. Needs a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megavlm.checkpoint import store
from megavlm.checkpoint.pieces import pieces_of
from megavlm.checkpoint.saver import Saver
from megavlm.config.schema import ParallelConfig
from megavlm.models.init import initialise
from megavlm.parallel.context import enter_grid, leave_grid, start_process_group, stop_process_group
from megavlm.testing.tiny import tiny_chunks, tiny_model_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_what_is_saved_is_what_was_there(tmp_path: Path) -> None:
    """Weights that change on the device right after the copy do not change what is written."""
    device = torch.device("cuda", 0)
    start_process_group(device, 60.0)
    try:
        model, ctx = tiny_model_config(), enter_grid(ParallelConfig(), device, seed=1)
        chunks = [chunk.to(device) for chunk in tiny_chunks(model, ctx)]
        initialise(chunks, model, 0, ctx)
        saver = Saver(chunks, None, ctx, timeout_s=60.0)
        saver.warm_up()
        assert all(memory.is_pinned() for memory in saver._memory().files.values())
        expected = {piece.key: piece.tensor.clone() for piece in pieces_of(chunks, None, ctx).model}
        saver.begin(tmp_path / "00000001-a", {})
        with torch.no_grad():
            for piece in pieces_of(chunks, None, ctx).model:
                piece.tensor.fill_(7.0)
        outcome = saver.wait()
        assert outcome is not None and outcome.error is None
        store.load(tmp_path / "00000001-a", chunks, None, ctx)
        for piece in pieces_of(chunks, None, ctx).model:
            assert torch.equal(piece.tensor, expected[piece.key])
        leave_grid()
    finally:
        stop_process_group()
