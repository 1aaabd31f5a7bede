"""Page-locked batches: what a GPU copies while the host goes on. Needs a CUDA device."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from megavlm.data.loader import pinned
from megavlm.testing.tiny import tiny_batch, tiny_model_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_pinned_batches_arrive_unchanged() -> None:
    batch = tiny_batch(tiny_model_config())
    locked = pinned(batch)
    there = locked.to("cuda")
    torch.cuda.synchronize()
    names = [f.name for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)]
    assert len(names) >= 7
    for name in names:
        assert getattr(locked, name).is_pinned()
        assert torch.equal(getattr(there, name).cpu(), getattr(batch, name))
