"""One flipped bit in one copy of a parameter is found, named, and ends the run; without it copies are equal in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.schema import Recipe
from megavlm.parallel import hashes
from megavlm.parallel.hashes import content_hash
from megavlm.testing.faults import flipped_bit
from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankError, RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read
from megavlm.tracking.metrics import read_metrics

MOE = {"model": {"language": {"moe": {"num_experts": 4, "ffn_hidden_size": 32}}}}
BF16 = {"precision": {"dtype": "bf16"}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64])
def test_any_flipped_bit_changes_the_hash(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    tensor = torch.randn(61).mul(50).to(dtype)
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    whole = content_hash(tensor).item()
    seen = {whole}
    for place in range(0, 61, 7):
        for bit in range(8 * tensor.element_size()):
            other = tensor.clone()
            other.view(kind)[place] ^= (1 << bit) if bit < 8 * tensor.element_size() - 1 else -(1 << bit)
            seen.add(content_hash(other).item())
    assert len(seen) == 1 + 9 * 8 * tensor.element_size()
    monkeypatch.setattr(hashes, "CHUNK_ELEMENTS", 7)
    assert content_hash(tensor).item() == whole
    assert content_hash(tensor.repeat(2, 1).T[:, 1]).item() == whole, "a strided view of the same values"
    assert content_hash(tensor.flip(0)).item() != whole
    assert content_hash(torch.cat([tensor, tensor.new_zeros(1)])).item() != whole


def test_elements_that_change_places_change_the_hash() -> None:
    tensor = torch.arange(1000.0)
    swapped = tensor.clone()
    swapped[3], swapped[500] = tensor[500], tensor[3]
    assert content_hash(tensor).item() != content_hash(swapped).item()
    assert content_hash(torch.zeros(0)).item() == 0


def train_flipped(recipe: Recipe, rank: int, key: str, of_optimizer: bool) -> None:
    with flipped_bit(2, rank, key, of_optimizer=of_optimizer):
        train_and_read(recipe)


LAYOUTS: list[tuple[int, dict[str, Any], dict[str, Any], int, str, bool]] = [
    (2, {}, {}, 1, "language.decoder.layers.1.mlp.linear_fc2.weight", False),
    (2, {"tensor": 2, "sequence": True}, {}, 0, "language.decoder.final_layernorm.weight", False),
    (2, {}, BF16, 1, "projector", True),
    (2, {"zero": 1}, {}, 0, "projector", False),
    (2, {"pipeline": 2}, {}, 1, "language.embedding.word_embeddings.weight", False),
    (4, {"expert": 2}, MOE, 3, "experts", False),
    (4, {"zero": 3, "tensor": 2}, BF16, 2, "final_layernorm", False),
    (2, {"tensor": 2, "encoder_tensor": 1}, {}, 1, "vision.decoder.layers.0.self_attention.linear_proj.weight", False),
]


@pytest.mark.parametrize(
    ("world_size", "parallel", "blocks", "rank", "key", "of_optimizer"),
    slow_unless(LAYOUTS, lambda w, parallel, *rest: "sequence" in parallel),
)
def test_a_flipped_bit_ends_the_run(
    world_size: int,
    parallel: dict[str, Any],
    blocks: dict[str, Any],
    rank: int,
    key: str,
    of_optimizer: bool,
    pool: RankPool,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    every: dict[str, Any] = {"faults": {"replica_hash_every_steps": 1}, "parallel": parallel, **blocks}
    clean = tiny_recipe(tmp_path / "clean", data_dir, [tiny_stage(steps=2)], **every)
    assert len(pool.run(train_and_read, clean, world_size=world_size)[0]) == 2
    assert not (tmp_path / "clean" / "incidents.jsonl").exists()
    recipe = tiny_recipe(tmp_path / "bad", data_dir, [tiny_stage(steps=3)], **every)
    with pytest.raises(RankError, match=rf"copies of parameters differ after step 2 .*{key}.* on rank"):
        pool.run(train_flipped, recipe, rank, key, of_optimizer, world_size=world_size)
    (incident,) = read_metrics(tmp_path / "bad", "incidents.jsonl")
    assert incident["kind"] == "divergence"
    for name, groups in incident["tensors"].items():
        assert key in name and len(groups) == 2 and any(rank in group for group in groups)
    # With ZeRO-3 a parameter is its own master.
    assert any(name.startswith("optimizer.") == of_optimizer for name in incident["tensors"])
    assert not (tmp_path / "bad" / "checkpoints" / "latest").exists()


def test_report_goes_on(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Every comparison from then on tells of it; the stage is finished."""
    recipe = tiny_recipe(tmp_path, data_dir, [tiny_stage(steps=4)], faults={"replica_hash_every_steps": 2, "on_divergence": "report"})
    pool.run(train_flipped, recipe, 1, "projector", False, world_size=2)
    assert [i["step"] for i in read_metrics(tmp_path, "incidents.jsonl")] == [2, 4]
    assert (tmp_path / "checkpoints" / "latest").exists()
