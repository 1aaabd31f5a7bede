"""The encoder in another layout than the LLM: whole on every tensor rank, its pictures dealt to the ranks that share a microbatch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.checkpoint.hf import config_from_hf
from megavlm.config.schema import DataConfig, ModelConfig, ParallelConfig, PrecisionConfig, ProjectorConfig, StageConfig
from megavlm.config.tensor_split import check_tensor_split
from megavlm.models.weights import sharded_tensors
from megavlm.parallel.context import enter_grid
from megavlm.planner.memory import estimate_memory
from megavlm.testing.families import CASES
from megavlm.testing.families.case import hf_logits, image_token_of, make_hf, prompts_of
from megavlm.testing.families.in_ranks import loaded, logits_of_packs
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import TRAINING, assert_same_records, encoder_stage, tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.tiny import tiny_chunks, tiny_model_config
from megavlm.topology.grid import RankGrid
from megavlm.tracking.metrics import EVALUATION_FILE, read_metrics
from megavlm.training.dryrun import dry_run
from megavlm.training.layout import stage_layout
from tests.distributed.test_checkpoint_resume import load_and_go_on, save_then_go_on
from tests.distributed.test_layouts import first_plans

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "CP2": (2, {"context": 2}),
    "TP2xCP2": (4, {"tensor": 2, "context": 2}),
    "TP2xDP2": (4, {"tensor": 2}),
    "PP2xTP2": (4, {"pipeline": 2, "tensor": 2}),
}
MIXTURE = {"pages": 0.05, "multi": 0.2, "text": 0.75}
WHOLE = {"encoder_tensor": 1}
DEALT = {"encoder_data_parallel": True}


def stage_of(training: str, **changes: Any) -> dict[str, Any]:
    return tiny_stage(steps=3, **(TRAINING[training] | {"mixture": MIXTURE} | changes))


def run(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, stage: dict[str, Any], **blocks: Any) -> list[dict[str, Any]]:
    recipe = tiny_recipe(run_dir, data_dir, [stage], **blocks)
    result: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return result


@pytest.fixture(scope="session")
def one_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The reference, for each way of freezing."""
    base = tmp_path_factory.mktemp("encoder-layout")
    return {name: run(pool, base / name, data_dir, 1, stage_of(name)) for name in TRAINING}


# Every way of freezing where tensor and context ranks both share pictures; everything else with `make test-all`.
RUNS = [
    *(("dealt", "TP2xCP2", training) for training in TRAINING),
    *(("dealt", layout, "all") for layout in LAYOUTS if layout != "TP2xCP2"),
    *(("whole", layout, "all") for layout in ("TP2+SP", "TP2xDP2", "PP2xTP2")),
    *(
        pytest.param(encoder, layout, training, marks=pytest.mark.slow)
        for encoder in ("dealt", "whole")
        for layout in LAYOUTS
        for training in TRAINING
        if not (encoder == "dealt" and (training == "all" or layout == "TP2xCP2"))
        and not (encoder == "whole" and training == "all" and layout in ("TP2+SP", "TP2xDP2", "PP2xTP2"))
    ),
]


@pytest.mark.parametrize(("encoder", "layout", "training"), RUNS)
def test_layout_equals_one_rank(
    encoder: str, layout: str, training: str, pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: dict[str, list[dict[str, Any]]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    own = WHOLE if encoder == "whole" else DEALT
    assert_same_records(run(pool, tmp_path, data_dir, world_size, stage_of(training), parallel=parallel | own), one_rank[training])


def test_the_matrix_has_few_pictures_many_and_none(data_dir: Path) -> None:
    """It means something only if microbatches have no picture, fewer than ranks that share them (2 or 4), as many, and more."""
    plans = first_plans(data_dir, stage_of("all"), dp_size=1)
    pictures = {sum(pack.num_tiles for pack in microbatch) for plan in plans for microbatch in plan.assignment[0]}
    assert pictures >= {0, 1, 3, 4}


@pytest.mark.parametrize("training", ["all", pytest.param("top_layers", marks=pytest.mark.slow)])
def test_bf16_with_the_distributed_optimizer(training: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Gradients in fp32 or as they are computed; bf16 rounds what layouts add up in another order."""
    for number, precision in enumerate(({"dtype": "bf16"}, {"dtype": "bf16", "grad_reduce_in_fp32": False})):
        reference = run(pool, tmp_path / f"one{number}", data_dir, 1, stage_of(training), precision=precision)
        parallel = {"tensor": 2, "context": 2, "zero": 1} | DEALT
        records = run(pool, tmp_path / f"four{number}", data_dir, 4, stage_of(training), precision=precision, parallel=parallel)
        assert_same_records(records, reference, 2e-2, 1e-1)


ODD_VISION = {"hidden_size": 24, "num_attention_heads": 3, "ffn_hidden_size": 50}
ODD: dict[str, dict[str, Any]] = {
    # As InternViT 6B: heads that nothing even divides, and norms over all of them.
    "heads": {"vision": ODD_VISION | {"qk_norm": True, "norm": "rms_norm", "layer_scale": True, "pre_norm": False}},
    "projector": {"projector": {"hidden_size": 51}},
}


@pytest.mark.parametrize("name", ODD)
def test_what_tensor_ranks_do_not_divide_is_whole(name: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    model = ODD[name]
    with pytest.raises(
        ValueError, match=r"does not divide model\.(vision\.num_attention_heads=3|projector\.hidden_size=51).*encoder_tensor=auto"
    ):
        tiny_recipe(tmp_path, data_dir, [stage_of("all")], model=model, parallel={"tensor": 2})
    reference = run(pool, tmp_path / "one", data_dir, 1, stage_of("all"), model=model)
    parallel = {"tensor": 2, "sequence": True, "encoder_tensor": "auto"}
    assert_same_records(run(pool, tmp_path / "two", data_dir, 2, stage_of("all"), model=model, parallel=parallel), reference)


def parts_cut(layout: dict[str, Any], model: ModelConfig) -> dict[str, bool]:
    """Module -> does this rank hold a part of its matrices only?"""
    parallel = ParallelConfig(**layout)
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    tensors = list(sharded_tensors(tiny_chunks(model, ctx, parallel), ctx))
    cut = {t.key.split(".")[0] for t in tensors if t.global_shape != t.local_shape}
    return {module: module in cut for module in ("vision", "projector", "language")}


def test_auto_leaves_alone_what_divides(pool: RankPool) -> None:
    model = tiny_model_config()
    odd = model.model_copy(update={"projector": ProjectorConfig(hidden_size=51)})
    auto = {"tensor": 2, "encoder_tensor": "auto"}
    assert pool.run(parts_cut, auto, model, world_size=2)[0] == {"vision": True, "projector": True, "language": True}
    assert pool.run(parts_cut, auto, odd, world_size=2)[1] == {"vision": True, "projector": False, "language": True}
    assert pool.run(parts_cut, {"tensor": 2, **WHOLE}, model, world_size=2)[1] == {"vision": False, "projector": False, "language": True}


CHECKPOINTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "split": (2, {"tensor": 2}),
    "whole": (2, {"tensor": 2, **WHOLE}),
    "dealt": (4, {"tensor": 2, "context": 2, "zero": 1, **DEALT}),
    "dealt, data": (4, {"tensor": 2, "zero": 1, "overlap_grad_reduce": True, **DEALT}),
}


@pytest.mark.parametrize("source", ["dealt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("1", "split", "whole"))])
def test_checkpoints_go_between_encoder_layouts(source: str, pool: RankPool, tmp_path: Path) -> None:
    """Weights and the optimizer's state: training goes on as if nothing had happened; in the same layout bit for bit."""
    path = tmp_path / "00000003-s"

    def go(function: Any, layout: str) -> list[float]:
        world_size, parallel = CHECKPOINTS[layout]
        numbers: list[float] = pool.run(function, path, parallel, "all", "fp32", world_size=world_size)[0]
        return numbers

    expected = go(save_then_go_on, source)
    assert go(load_and_go_on, source) == expected
    for target in CHECKPOINTS:
        if target != source:
            torch.testing.assert_close(torch.tensor(go(load_and_go_on, target)), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def weights_of(layout: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """A folder's weights as this rank holds them."""
    (chunk,), _, ctx = loaded(folder, layout)
    return {t.key: t.data.clone() for t in sharded_tensors([chunk], ctx) if t.key.startswith(("vision.", "projector."))}


def test_hugging_face_weights_are_read_whole(pool: RankPool, tmp_path: Path) -> None:
    """And give Hugging Face's logits, dealt too."""
    case = next(case for case in CASES if case.name == "LLaVA-1.5")
    hf = make_hf(case, tmp_path)
    model, token = config_from_hf(tmp_path), image_token_of(case, hf.config)
    one = pool.run(weights_of, {}, tmp_path)[0]
    for found in pool.run(weights_of, {"tensor": 2, **WHOLE}, tmp_path, world_size=2):
        assert found.keys() == one.keys() and all(torch.equal(found[key], one[key]) for key in one)
    prompts = prompts_of(case, model, token)
    expected = torch.cat(hf_logits(case, hf, model, prompts))
    for layout in ({"tensor": 2, **WHOLE}, {"tensor": 2, **DEALT}):
        for (logits,) in pool.run(logits_of_packs, tmp_path, layout, [prompts], token, world_size=2):
            assert (logits - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_encoder_pretraining_uses_tensor_ranks_for_data(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """And the next stage finds its weights."""
    stages = [encoder_stage(), tiny_stage(steps=2)]
    held_out = {"sources": ["held_out"], "every_steps": 2, "packs": 4}
    recipe = tiny_recipe(tmp_path / "two", data_dir, stages, parallel={"tensor": 2, **DEALT}, evaluation=held_out)
    assert stage_layout(recipe.parallel, recipe.stages[0], recipe.model).tensor == 1
    reference = pool.run(train_and_read, tiny_recipe(tmp_path / "one", data_dir, stages, evaluation=held_out))[0]
    assert_same_records(pool.run(train_and_read, recipe, world_size=2)[0], reference)
    losses = [[r["loss"] for r in read_metrics(tmp_path / name, EVALUATION_FILE)] for name in ("one", "two")]
    assert losses[0] and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_dry_run_shows_it(data_dir: Path, tmp_path: Path) -> None:
    """Pictures of the first step's own microbatches, in their own size."""
    lines: list[str] = []
    native = {"model": {"vision": {"image_size_px": 24}}, "data": {"image": {"policy": "native", "max_tokens_per_sample": 60}}}
    stage = stage_of("all", mixture={"pages": 0.5, "multi": 0.5})
    dry_run(tiny_recipe(tmp_path, data_dir, [stage], parallel={"tensor": 2, **DEALT}, **native), 2, lambda text: lines.append(str(text)))
    table = next(text for text in lines if "ranks share a microbatch" in text).splitlines()
    assert "encoder whole on every rank" in table[0]
    with_pictures, dealt, in_each, busiest, _, idle, _ = table[-1].split()
    assert int(with_pictures) == int(dealt) > 0 and float(in_each) > 1
    assert 50 <= int(busiest) < 100 and 0 <= int(idle) < 50


def rank_parameters(layout: dict[str, Any], model: ModelConfig) -> int:
    parallel = ParallelConfig(**layout)
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    return sum(p.numel() for chunk in tiny_chunks(model, ctx, parallel) for p in chunk.parameters())


@pytest.mark.parametrize("layout", [{"tensor": 2, **WHOLE}, {"tensor": 2, "encoder_tensor": "auto"}, {"tensor": 2, **DEALT}], ids=str)
def test_the_planner_counts_what_a_rank_holds(layout: dict[str, Any], pool: RankPool) -> None:
    # The vocabulary is a multiple of what it is padded to: the planner's counts are of the unpadded one.
    odd = {"projector": ProjectorConfig(hidden_size=51)} if layout.get("encoder_tensor") == "auto" else {}
    model = tiny_model_config(vocab_size=112).model_copy(update=odd)
    parallel, stage = ParallelConfig(**layout), StageConfig(name="s", steps=1, mixture={"a": 1}, packs_per_step=8)
    (estimate,) = estimate_memory(model, stage, DataConfig(), RankGrid.from_config(parallel, 2), parallel, PrecisionConfig())
    assert pool.run(rank_parameters, layout, model, world_size=2) == [estimate.num_parameters] * 2


def test_dealt_pictures_leave_less_on_each_rank() -> None:
    model, stage = (
        tiny_model_config(num_layers=1),
        StageConfig(name="s", steps=1, mixture={"a": 1}, packs_per_step=8, vision={"train": "full"}),
    )
    by_layout = [
        estimate_memory(model, stage, DataConfig(), RankGrid.from_config(parallel, 2), parallel, PrecisionConfig())[0].activations_bytes
        for parallel in (ParallelConfig(tensor=2, **WHOLE), ParallelConfig(tensor=2, **DEALT))
    ]
    assert by_layout[1] < 0.8 * by_layout[0]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"parallel": DEALT}, "with tensor=1 and context=1 there are none"),
        ({"parallel": {"tensor": 2, "encoder_tensor": 2}}, "encoder_tensor"),
        ({"parallel": {"tensor": 2, "encoder_tensor": "auto", **DEALT}}, "whole on every rank, whatever divides"),
        ({"parallel": {"tensor": 2, "encoder_min_flops_per_byte": 5.0, **DEALT}}, "is for encoder_data_parallel=auto, not true"),
    ],
)
def test_refused(blocks: dict[str, Any], message: str, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_recipe(tmp_path, data_dir, [stage_of("all")], **blocks)


@pytest.mark.parametrize("field", [WHOLE, DEALT, {"encoder_tensor": "auto"}], ids=str)
def test_a_model_without_encoder_refuses_its_layout(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"text_only=true has no encoder: leave it out"):
        check_tensor_split(ModelConfig(text_only=True), ParallelConfig(tensor=2, **field))
