"""What spares memory, on a GPU: sharded parameters, offloaded activations, an optimizer in host memory. Same numbers, and less held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.testing.recipes import make_tiny_data, tiny_recipe, tiny_stage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TRAIN = """
import json, sys, torch
from megavlm.config.load import load_recipe
from megavlm.testing.recipes import train_and_read
records = train_and_read(load_recipe(sys.argv[1]))
print("RESULT " + json.dumps([torch.cuda.max_memory_allocated(), [[r["loss"], r["grad_norm"]] for r in records]]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_data(tmp_path_factory.mktemp("data"))


def train(folder: Path, data: Path, **parallel: Any) -> tuple[int, list[list[float]]]:
    """(peak bytes, loss and gradient norm of each step) of a model of some ten million weights, in a process of its own."""
    from megavlm.config.load import dump_recipe

    language = {"num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 1024, "num_attention_heads": 8}
    run: dict[str, Any] = {"device": "cuda", "deterministic": False}
    recipe = tiny_recipe(
        folder / "run", data, [tiny_stage(packs_per_step=2)], run=run, precision={"dtype": "bf16"}, parallel=parallel,
        model={"init_std": 0.02, "language": language}, data={"seq_len_tokens": 4096},
    )  # fmt: skip
    folder.mkdir(parents=True)
    dump_recipe(recipe, folder / "recipe.yaml")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TRAIN, str(folder / "recipe.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    peak, steps = json.loads(line.removeprefix("RESULT "))
    return peak, steps


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
def test_same_steps_with_less_memory(parallel: dict[str, Any], holds_less: bool, data: Path, tmp_path: Path) -> None:
    peak, steps = train(tmp_path / "plain", data)
    own_peak, own_steps = train(tmp_path / "own", data, **parallel)
    assert [loss for loss, _ in own_steps] == pytest.approx([loss for loss, _ in steps], rel=2e-2)
    assert [norm for _, norm in own_steps] == pytest.approx([norm for _, norm in steps], rel=1e-1)
    if holds_less:
        assert own_peak < peak
