"""The layout matrix: the same recipe gives the same losses and gradient norms however it is spread over ranks."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megavlm.data.types import StepPlan
from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import TRAINING, assert_same_records, tiny_recipe, tiny_stage, train_and_read

OVERLAP = {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "PP2 encoder alone": (2, {"pipeline": 2, "layers_per_stage": [0, 4]}),
    "PP3 head alone": (3, {"pipeline": 3, "layers_per_stage": [1, 3, 0]}),
    "PP3 balanced": (3, {"pipeline": 3, "split": "balanced"}),
    "PP2xVPP2 unequal": (2, {"pipeline": 2, "virtual_pipeline": 2, "layers_per_stage": [0, 1, 3, 0]}),
    "DP2": (2, {}),
    "DP2+distopt": (2, {"zero": 1}),
    "DP2+overlap": (2, {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "PP2xVPP2xDP2+overlap": (4, {"pipeline": 2, "virtual_pipeline": 2} | OVERLAP),
    "CP2": (2, {"context": 2}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2xPP2xDP2": (8, {"tensor": 2, "pipeline": 2}),
}


PICTURES: dict[str, dict[str, Any]] = {
    # Pages of 48 px are 6 x 6 patches for an encoder trained on 3 x 3; samples of several pages get smaller ones.
    "native": {"model": {"vision": {"image_size_px": 24}}, "data": {"image": {"policy": "native", "max_tokens_per_sample": 60}}},
    # 2 x 2 tiles of a page and the whole page, with the learned end of each row.
    "anyres": {
        "model": {"vision": {"image_size_px": 24}, "projector": {"image_newline": True}},
        "data": {"image": {"policy": "anyres"}},
    },
}


def stage_of(training: str, **changes: Any) -> dict[str, Any]:
    """Five steps where everything trains; three for the other ways of freezing, which share every line of code but the freezing."""
    return tiny_stage(steps=5 if training == "all" else 3, **(TRAINING[training] | changes))


def run(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, stage: dict[str, Any], **blocks: Any) -> list[dict[str, Any]]:
    recipe = tiny_recipe(run_dir, data_dir, [stage], **blocks)
    result: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return result


def assert_same(records: list[dict[str, Any]], reference: list[dict[str, Any]], loss: float = 1e-5, gradient: float = 1e-4) -> None:
    """And the same targets, by task and in number."""
    assert_same_records(records, reference, loss, gradient)
    for record, expected in zip(records, reference, strict=True):
        where = f"step {expected['step']}"
        assert record["task_loss"] == pytest.approx(expected["task_loss"], rel=10 * loss), where
        for count in ("useful_tokens", "target_tokens", "tiles", "images", "source_samples"):
            assert record[count] == expected[count], f"{where}: {count}"


@pytest.fixture(scope="session")
def single_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The reference: one rank, for each way of freezing."""
    base = tmp_path_factory.mktemp("single")
    return {name: run(pool, base / name, data_dir, 1, stage_of(name)) for name in TRAINING}


# Each way of freezing on every axis, and frozen layers below trained ones in every layout; the rest with `make test-all`.
EVERY_TRAINING = {"TP2+SP", "PP2", "PP2xVPP2xDP2+overlap", "CP2"}


@pytest.mark.parametrize(
    ("layout", "training"),
    slow_unless(product(LAYOUTS, TRAINING), lambda layout, training: layout in EVERY_TRAINING or training in ("all", "top_layers")),
)
def test_layout_equals_single_rank(
    layout: str, training: str, pool: RankPool, data_dir: Path, tmp_path: Path, single_rank: dict[str, list[dict[str, Any]]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    records = run(pool, tmp_path, data_dir, world_size, stage_of(training), parallel=parallel)
    assert_same(records, single_rank[training])


def test_reference_learns_and_freezing_changes_it(single_rank: dict[str, list[dict[str, Any]]]) -> None:
    """Guards the matrix against comparing constants: losses fall, and each way of freezing gives other numbers."""
    for name, records in single_rank.items():
        assert len(records) == (5 if name == "all" else 3)
        assert records[-1]["loss"] != records[0]["loss"], name
    last = [records[-1]["loss"] for records in single_rank.values()]
    assert len(set(last)) == len(last)
    assert single_rank["all"][-1]["loss"] < single_rank["all"][0]["loss"]


def test_matrix_has_imageless_and_unequal_microbatches(data_dir: Path) -> None:
    """The matrix means something only if microbatches differ: some without a picture, other numbers of targets."""
    plans = first_plans(data_dir, tiny_stage(), dp_size=4)
    microbatches = [mb for plan in plans for rank in plan.assignment for mb in rank]
    tiles = [sum(pack.num_tiles for pack in mb) for mb in microbatches]
    targets = [sum(pack.num_targets for pack in mb) for mb in microbatches]
    assert min(tiles) == 0 < max(tiles)
    assert len(set(targets)) > 3


SPARSE = tiny_stage(steps=4) | {"mixture": {"pages": 0.06, "text": 0.94}}


@pytest.fixture(scope="session")
def sparse_reference(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(pool, tmp_path_factory.mktemp("sparse"), data_dir, 1, SPARSE)


@pytest.mark.parametrize("layout", ["DP2", "DP2+overlap", "PP2", "PP2 encoder alone", "PP2xVPP2xDP2+overlap", "TP2xPP2xDP2"])
def test_ranks_without_any_picture(
    layout: str, pool: RankPool, data_dir: Path, tmp_path: Path, sparse_reference: list[dict[str, Any]]
) -> None:
    """Steps in which one data-parallel rank has pictures and the other none, or nobody has: no hang, no diluted gradient."""
    per_rank = [
        [sum(pack.num_tiles for mb in rank for pack in mb) for rank in plan.assignment] for plan in first_plans(data_dir, SPARSE, dp_size=2)
    ]
    assert any(min(tiles) == 0 < max(tiles) for tiles in per_rank)
    world_size, parallel = LAYOUTS[layout]
    assert_same(run(pool, tmp_path, data_dir, world_size, SPARSE, parallel=parallel), sparse_reference)


def first_plans(data_dir: Path, stage: dict[str, Any], dp_size: int, **blocks: Any) -> list[StepPlan]:
    from megavlm.data.index import build_index
    from megavlm.data.plan import StepPlanner
    from megavlm.data.tokenizer import load_tokenizer

    recipe = tiny_recipe("unused", data_dir, [stage], **blocks)
    config, tokenizer = recipe.stages[0], load_tokenizer(recipe.data.tokenizer)
    indexes = {n: build_index(recipe.data.sources[n], recipe.data, recipe.model, "multimodal", tokenizer) for n in config.mixture}
    planner = StepPlanner(
        indexes, config, recipe.data, recipe.model, seed=1, dp_size=dp_size, num_microbatches=config.packs_per_step // dp_size
    )
    return [planner.next() for _ in range(config.steps)]


@pytest.mark.parametrize(
    ("recompute", "training"),
    [
        ("full", "top_layers"),
        ("selective", "all"),
        # Every way of freezing, to the bit: test_recompute_offload.
        *(pytest.param("full", name, marks=pytest.mark.slow) for name in TRAINING if name != "top_layers"),
        *(pytest.param("selective", name, marks=pytest.mark.slow) for name in TRAINING if name != "all"),
    ],
)
def test_recompute_changes_nothing(
    recompute: str, training: str, pool: RankPool, data_dir: Path, tmp_path: Path, single_rank: dict[str, list[dict[str, Any]]]
) -> None:
    records = run(pool, tmp_path, data_dir, 1, stage_of(training), parallel={"recompute": recompute})
    assert_same(records, single_rank[training])


@pytest.mark.parametrize("module", ["vision", "language"])
def test_full_recompute_over_a_frozen_bottom(module: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Only top layers train: their input needs no gradient, and recomputation must not lose theirs."""
    frozen: dict[str, Any] = {name: {"train": "frozen"} for name in ("vision", "projector", "language")}
    stage = tiny_stage(steps=3, **(frozen | {module: {"train": "last_layers", "last_layers": 1}}))
    reference = run(pool, tmp_path / "none", data_dir, 1, stage)
    assert all(record["grad_norm"] > 0 for record in reference)
    assert_same(run(pool, tmp_path / "full", data_dir, 1, stage, parallel={"recompute": "full"}), reference)


def test_two_packs_in_a_microbatch(pool: RankPool, data_dir: Path, tmp_path: Path, single_rank: dict[str, list[dict[str, Any]]]) -> None:
    records = run(pool, tmp_path, data_dir, 2, stage_of("all", micro_batch_packs=2), parallel={"tensor": 2})
    assert_same(records, single_rank["all"])


@pytest.fixture(scope="session")
def one_rank_pictures(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The reference of each policy."""
    base = tmp_path_factory.mktemp("pictures")
    return {name: run(pool, base / name, data_dir, 1, tiny_stage(steps=2), **blocks) for name, blocks in PICTURES.items()}


@pytest.mark.parametrize("policy", PICTURES)
@pytest.mark.parametrize("layout", ["TP2", "TP2+SP", "PP2", "PP2xVPP2 unequal", "DP2", "DP2+overlap", "CP2"])
def test_picture_policies(
    layout: str, policy: str, pool: RankPool, data_dir: Path, tmp_path: Path, one_rank_pictures: dict[str, list[dict[str, Any]]]
) -> None:
    """Native resolution and LLaVA-NeXT's grids, with microbatches that have no picture."""
    world_size, parallel = LAYOUTS[layout]
    records = run(pool, tmp_path, data_dir, world_size, tiny_stage(steps=2), parallel=parallel, **PICTURES[policy])
    assert_same(records, one_rank_pictures[policy])


@pytest.mark.parametrize("policy", ["tiles", *PICTURES])
def test_sample_pictures_are_drawn_for_every_policy(policy: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    blocks = PICTURES.get(policy, {})
    stage = tiny_stage(steps=1) | {"mixture": {"pages": 0.5, "multi": 0.5}}
    run(pool, tmp_path, data_dir, 1, stage, tracking={"num_sample_pictures": 3}, **blocks)
    found = list(tmp_path.rglob("*samples*.png"))
    assert len(found) == 1 and found[0].stat().st_size > 5000


def test_picture_policies_make_other_batches(one_rank_pictures: dict[str, list[dict[str, Any]]], data_dir: Path) -> None:
    """Guards the test above: policies differ, and some of their microbatches have no picture."""
    native, anyres = one_rank_pictures["native"], one_rank_pictures["anyres"]
    assert all(a["loss"] != b["loss"] for a, b in zip(native, anyres, strict=True))
    assert native[0]["tiles"] == native[0]["images"] > 0 and anyres[0]["tiles"] == 5 * anyres[0]["images"] > 0
    for blocks in PICTURES.values():
        plans = first_plans(data_dir, tiny_stage(steps=2), dp_size=2, **blocks)
        works = [sum(pack.num_tiles for pack in mb) for plan in plans for rank in plan.assignment for mb in rank]
        assert min(works) == 0 < max(works)


def test_untied_embeddings_and_pipeline(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    untied = {"language": {"tie_embeddings": False}}
    reference = run(pool, tmp_path / "one", data_dir, 1, tiny_stage(steps=3), model=untied)
    records = run(pool, tmp_path / "two", data_dir, 4, tiny_stage(steps=3), model=untied, parallel={"tensor": 2, "pipeline": 2})
    assert_same(records, reference)


@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2+distopt"])
def test_bf16_layouts_agree(layout: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    bf16 = {"dtype": "bf16"}
    reference = run(pool, tmp_path / "one", data_dir, 1, tiny_stage(steps=3), precision=bf16)
    records = run(pool, tmp_path / "two", data_dir, world_size, tiny_stage(steps=3), precision=bf16, parallel=parallel)
    assert_same(records, reference, loss=2e-2, gradient=1e-1)


def test_tiles_thumbnail_and_pixel_shuffle(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Pages cut into 2 x 2 tiles and a thumbnail, four patches merged into one token, in two layouts."""
    model = {"vision": {"image_size_px": 24, "patch_size_px": 4}, "projector": {"pixel_shuffle": 2, "input_norm": True}}
    data = {"image": {"policy": "tiles", "max_tiles": 4, "thumbnail": True}, "seq_len_tokens": 320}
    reference = run(pool, tmp_path / "one", data_dir, 1, tiny_stage(steps=3), model=model, data=data)
    assert reference[0]["tiles"] == 5 * reference[0]["images"] > 0
    for name, (world_size, parallel) in {"TP2": LAYOUTS["TP2"], "PP2": LAYOUTS["PP2"]}.items():
        records = run(pool, tmp_path / name, data_dir, world_size, tiny_stage(steps=3), model=model, data=data, parallel=parallel)
        assert_same(records, reference)


def test_one_linear_layer_projector_and_siglip_style_encoder(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    vision = {
        "class_token": False,
        "pre_norm": False,
        "patch_bias": True,
        "activation": "gelu_tanh",
        "feature_layer": -1,
        "final_norm": True,
    }
    model = {"vision": vision, "projector": {"num_layers": 1}, "language": {"qkv_bias": True, "qk_norm": True}}
    reference = run(pool, tmp_path / "one", data_dir, 1, tiny_stage(steps=3), model=model)
    records = run(pool, tmp_path / "two", data_dir, 4, tiny_stage(steps=3), model=model, parallel={"tensor": 2, "pipeline": 2})
    assert_same(records, reference)
