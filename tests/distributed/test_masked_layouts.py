"""Windows, soft-caps, prefixes and pictures seen both ways: the same training in every layout, and no sample sees another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.checkpoint.folders import newest
from megavlm.checkpoint.reader import CheckpointReader
from megavlm.config.schema import ModelConfig
from megavlm.models.layers.masks import Groups
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.tiny import tiny_batch, tiny_model_config
from tests.distributed.test_packed_equals_unpacked import _through_pipeline, alone, build, perturbed

GEMMA = {"zero_centered_norm": True, "sandwich_norm": True, "embedding_scale": 6.9, "activation": "gelu_tanh", "attention_scale": 0.3}
# Windows are shorter than a page's 36 (averaged: 4) visual tokens, and cut by context parallelism's chunks.
WINDOW = {"sliding_window_tokens": 7, "sliding_layers": [0, 1, 3]}
MODELS: dict[str, dict[str, Any]] = {
    # As PaliGemma 2.
    "prefix": {"language": GEMMA | WINDOW | {"bidirectional": "prefix", "attention_softcap": 4.0, "logit_softcap": 5.0}},
    # As Gemma 3.
    "pictures": {
        "projector": {"kind": "average_pool", "num_layers": 1, "bias": False, "pixel_shuffle": 2},
        "language": GEMMA | WINDOW | {"bidirectional": "pictures", "qk_norm": True, "rope_local_theta": 100.0},
    },
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "CP2xTP2+SP": (4, {"context": 2, "tensor": 2, "sequence": True}),
    "DP2+overlap": (2, {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "recompute": (1, {"recompute": "full"}),
    "selective": (1, {"recompute": "selective"}),
}


def run(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, **blocks: Any) -> list[dict[str, Any]]:
    recipe = tiny_recipe(run_dir, data_dir, [tiny_stage(steps=2)], **blocks)
    result: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return result


@pytest.fixture(scope="module")
def single_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    base = tmp_path_factory.mktemp("masked")
    plain = {"pictures, seen in order": MODELS["pictures"] | {"language": MODELS["pictures"]["language"] | {"bidirectional": "none"}}}
    return {name: run(pool, base / name, data_dir, 1, model=model) for name, model in (MODELS | plain).items()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_single_rank(
    layout: str, kind: str, pool: RankPool, data_dir: Path, tmp_path: Path, single_rank: dict[str, list[dict[str, Any]]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    assert_same_records(run(pool, tmp_path, data_dir, world_size, model=MODELS[kind], parallel=parallel), single_rank[kind])


def trained_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest(run_dir)
    assert checkpoint is not None
    reader = CheckpointReader(checkpoint)
    return {key: reader.tensor(key).float() for key in reader.entries if key.split(".")[0] in ("vision", "projector", "language")}


@pytest.mark.parametrize("layout", ["TP2", "TP2+SP", "CP2"])
def test_every_weight_learns_the_same(layout: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """The gradient norm would not show a norm of queries and keys whose gradient is not summed over tensor ranks."""
    weights = []
    for name, (world_size, parallel) in {"one": (1, {}), layout: LAYOUTS[layout]}.items():
        run(pool, tmp_path / name, data_dir, world_size, model=MODELS["pictures"], parallel=parallel)
        weights.append(trained_weights(tmp_path / name))
    one, other = weights
    assert set(one) == set(other) and any("q_layernorm" in key for key in one) and any("projector.norm" in key for key in one)
    for key, weight in one.items():
        rows = min(len(weight), len(other[key]))  # padding of the vocabulary depends on the layout
        # A step of Adam is up to 1e-3 long.
        assert (weight[:rows] - other[key][:rows]).abs().max() <= 3e-5, key


def test_pictures_seen_both_ways_change_the_loss(single_rank: dict[str, list[dict[str, Any]]]) -> None:
    assert single_rank["pictures"][0]["loss"] != single_rank["pictures, seen in order"][0]["loss"]


def tiny_model(kind: str) -> ModelConfig:
    model = tiny_model_config(**MODELS[kind]["language"])
    return ModelConfig.model_validate(model.model_dump() | {"projector": MODELS[kind].get("projector", {})})


def isolation(kind: str, parallel: dict[str, Any], segment: int) -> dict[str, bool]:
    """Perturb one sample and see, on this pipeline stage, whose hidden states and losses changed."""
    model = tiny_model(kind)
    chunks, ctx = build(model, **parallel)
    batch = tiny_batch(model, images_per_sample=(1, 0, 2, 0), text_tokens=(9, 14, 6, 5), seq_len_tokens=96, num_targets=12)
    other = perturbed(batch, segment, model.visual_tokens_per_tile)
    (before, losses), (after, other_losses) = (_through_pipeline(chunks[0], b, ctx) for b in (batch, other))
    start = sum(batch.segment_lengths[:segment])
    own = torch.zeros(batch.num_tokens, dtype=torch.bool)
    own[start : start + batch.segment_lengths[segment]] = True
    found = {"own changed": not torch.equal(before[own], after[own]), "others equal": torch.equal(before[~own], after[~own])}
    if losses is not None and other_losses is not None:
        others = batch.target_segments_Q != segment
        found["other losses equal"] = torch.equal(losses[others], other_losses[others])
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("segment", range(3))
@pytest.mark.parametrize(("parallel", "world_size"), [({}, 1), ({"pipeline": 2}, 2)])
def test_perturbing_one_sample_leaves_the_others_bit_identical(
    parallel: dict[str, Any], world_size: int, segment: int, kind: str, pool: RankPool
) -> None:
    for result in pool.run(isolation, kind, parallel, segment, world_size=world_size):
        assert all(result.values()), result


def packed_and_alone(kind: str) -> tuple[float, float, set[bool]]:
    model = tiny_model(kind)
    (vlm,), _ = build(model)
    batch = tiny_batch(model, images_per_sample=(1, 0, 2, 0), text_tokens=(9, 14, 6, 5))
    singles = [alone(batch, i, model.visual_tokens_per_tile) for i in range(4)]

    def gradients(batches: list[Any]) -> dict[str, torch.Tensor]:
        vlm.zero_grad()
        for b in batches:
            vlm(b).total.backward()
        return {n: p.grad.clone() for n, p in vlm.named_parameters() if p.grad is not None}

    together, apart = gradients([batch]), gradients(singles)
    worst = max(float((together[n] - apart[n]).abs().max() / (apart[n].abs().max() + 1e-6)) for n in apart)
    with torch.no_grad():
        losses = float((vlm(batch).loss_Q - torch.cat([vlm(b).loss_Q for b in singles])).abs().max())
    masks = vlm.packing(batch).masks
    assert masks is not None
    return losses, worst, {isinstance(masks.groups, Groups)}


@pytest.mark.parametrize("kind", MODELS)
def test_pack_equals_its_samples_alone(kind: str, pool: RankPool) -> None:
    losses, gradients, grouped = pool.run(packed_and_alone, kind)[0]
    assert losses < 1e-5 and gradients < 1e-4 and grouped == {True}
