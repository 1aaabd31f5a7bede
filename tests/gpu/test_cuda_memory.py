"""What spares memory, on a GPU: sharded parameters, offloaded activations, an optimizer in host memory. Same numbers, and less held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.testing.own_process import OwnTraining, train_apart
from megavlm.testing.recipes import tiny_recipe, tiny_stage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def train(folder: Path, data_dir: Path, **parallel: Any) -> OwnTraining:
    """A model of some ten million weights."""
    language = {"num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 1024, "num_attention_heads": 8}
    run: dict[str, Any] = {"device": "cuda", "deterministic": False}
    recipe = tiny_recipe(
        folder / "run", data_dir, [tiny_stage(packs_per_step=2)], run=run, precision={"dtype": "bf16"}, parallel=parallel,
        model={"init_std": 0.02, "language": language}, data={"seq_len_tokens": 4096},
    )  # fmt: skip
    return train_apart(recipe)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> OwnTraining:
    return train(tmp_path_factory.mktemp("plain"), data_dir)


@pytest.mark.parametrize(
    ("parallel", "holds_less"),
    [
        ({"zero": 2}, False),
        ({"zero": 3}, False),
        ({"zero": 3, "recompute": "full"}, True),
        ({"offload_activations": 99}, True),
        ({"offload_activations": 99, "recompute": "full"}, True),
        ({"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}, True),
        ({"offload_optimizer": True}, True),
        ({"offload_optimizer": True, "zero": 1}, True),
        ({"offload_optimizer": True, "zero": 3}, True),
    ],
)
def test_same_steps_with_less_memory(
    parallel: dict[str, Any], holds_less: bool, plain: OwnTraining, data_dir: Path, tmp_path: Path
) -> None:
    own = train(tmp_path, data_dir, **parallel)
    assert own.losses == pytest.approx(plain.losses, rel=2e-2)
    assert own.of("grad_norm") == pytest.approx(plain.of("grad_norm"), rel=1e-1)
    if holds_less:
        assert own.peak_bytes < plain.peak_bytes
