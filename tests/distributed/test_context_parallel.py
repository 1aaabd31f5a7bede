"""Context ranks that share packs: under every split the losses and gradients of one rank, whatever the pack and the model hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

from megavlm.config.parallel import ContextSplit
from megavlm.config.schema import ModelConfig
from megavlm.data.prompt import prompt_batch
from megavlm.data.types import PackedBatch
from megavlm.models.init import initialise
from megavlm.models.layers import context as context_module
from megavlm.models.vlm import TargetLoss
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import assert_same_records, encoder_stage, tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.tiny import tiny_batch, tiny_chunks, tiny_model_config, tiny_native_batch
from megavlm.topology.context import context_layout
from megavlm.training.dryrun import dry_run
from tests.distributed.test_cross_attention import IMAGE, prompts_of
from tests.distributed.test_cross_attention import model_of as cross_model
from tests.distributed.test_masked_layouts import tiny_model as masked_model
from tests.distributed.test_packed_equals_unpacked import alone, build, perturbed
from tests.distributed.test_qformer_layouts import QFORMER
from tests.distributed.test_qwen_layouts import GRIDS, tiny_qwen
from tests.distributed.test_side_by_side import BESIDE

SPLITS = get_args(ContextSplit)
Case = tuple[ModelConfig, PackedBatch]


def changed(model: ModelConfig, **blocks: dict[str, Any] | list[Any]) -> ModelConfig:
    """A model with some fields of its blocks replaced."""
    base = model.model_dump()
    new = {name: base[name] | block if isinstance(block, dict) else block for name, block in blocks.items()}
    return ModelConfig.model_validate(base | new)


def text(lengths: tuple[int, ...], **options: Any) -> Case:
    model = tiny_model_config(qk_norm=True)
    return model, tiny_batch(model, images_per_sample=(0,) * len(lengths), text_tokens=lengths, **options)


def pictures(model: ModelConfig, **options: Any) -> Case:
    return model, tiny_batch(model, **({"images_per_sample": (1, 0, 2, 0), "text_tokens": (9, 14, 6, 5), "num_targets": 12} | options))


def cross(style: str) -> Case:
    """Rows before the first picture, behind it and without one; targets in each sample."""
    model = cross_model(style)
    batch = prompt_batch(prompts_of(model), IMAGE, model)
    positions = torch.tensor([1, 3, 8, 10, 17, 19])
    return model, replace(
        batch,
        target_positions_Q=positions,
        target_ids_Q=batch.tokens_S[positions + 1],
        target_weights_Q=torch.ones(6),
        target_segments_Q=torch.tensor([0, 0, 1, 1, 2, 2]),
    )


CASES: dict[str, Callable[[], Case]] = {
    "tiles and padding": lambda: pictures(tiny_model_config(qk_norm=True), seq_len_tokens=99),
    "no picture": lambda: text((9, 14, 6)),
    "no pads": lambda: text((8, 16, 24)),
    "one segment": lambda: text((37,)),
    "one row": lambda: text((2, 1)),  # the second has no target
    "shorter than 2 x context": lambda: text((3, 2, 5, 4, 3)),
    "padding alone on some ranks": lambda: text((2,), seq_len_tokens=3),
    "prefix, window, soft-cap": lambda: pictures(masked_model("prefix"), seq_len_tokens=90),
    "pictures seen both ways": lambda: pictures(masked_model("pictures"), seq_len_tokens=91),
    "M-RoPE and DeepStack": lambda: (model := tiny_qwen(), tiny_native_batch(model, GRIDS, text_tokens=(9, 14, 6, 7))),
    "cross-attention, Flamingo": lambda: cross("flamingo"),
    "cross-attention, Mllama": lambda: cross("mllama"),
    "Q-Former": lambda: pictures(
        changed(
            tiny_model_config(),
            vision={"feature_layer": -1, "final_norm": True, "keep_class_token": True},
            projector={"kind": "qformer", "num_layers": 1, "qformer": QFORMER},
        )
    ),
    "encoders side by side": lambda: pictures(changed(tiny_model_config(), vision_beside=[BESIDE | {"image_size_px": 16}])),
    "learned positions": lambda: pictures(tiny_model_config(positions="learned", max_positions=128)),
    "experts": lambda: pictures(
        tiny_model_config(moe={"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32, "aux_loss": 0.1}), seq_len_tokens=93
    ),
}


Found = tuple[torch.Tensor, dict[str, torch.Tensor]]


def losses_and_gradients(parallel: dict[str, Any], names: tuple[str, ...] = tuple(CASES)) -> dict[str, Found]:
    """Of each case, over all context ranks: loss of each target, and the gradient of every weight."""
    from megavlm.config.schema import ParallelConfig
    from megavlm.parallel.context import enter_grid

    layout = ParallelConfig(**parallel)
    ctx = enter_grid(layout, torch.device("cpu"), seed=1)
    found = {}
    for name in names:
        model, batch = CASES[name]()
        chunk: Any = tiny_chunks(model, ctx, layout)[0]
        initialise([chunk], model, 0, ctx)
        for parameter_name, parameter in chunk.named_parameters():
            if parameter_name.endswith("gate"):
                torch.nn.init.constant_(parameter, 0.7)
        output = chunk(batch)
        assert isinstance(output, TargetLoss)
        output.total.backward()
        losses = torch.zeros(batch.target_ids_Q.numel())
        losses[output.mine] = output.loss_Q
        dist.all_reduce(losses, group=ctx.context_group)
        gradients = {}
        for parameter_name, parameter in chunk.named_parameters():
            # A rank whose rows reach a weight in no way has no gradient for it.
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(own, group=ctx.context_group)
            gradients[parameter_name] = own
        found[name] = losses, gradients
    return found


@pytest.fixture(scope="module")
def one_rank(pool: RankPool) -> dict[str, Found]:
    found: dict[str, Found] = pool.run(losses_and_gradients, {})[0]
    return found


@pytest.fixture(scope="module")
def shared(pool: RankPool) -> Callable[[str, int], dict[str, Found]]:
    """By split and number of context ranks; each is run once for all cases."""
    kept: dict[tuple[str, int], dict[str, Found]] = {}

    def run(split: str, size: int) -> dict[str, Found]:
        if (split, size) not in kept:
            kept[split, size] = pool.run(losses_and_gradients, {"context": size, "context_split": split}, world_size=size)[0]
        return kept[split, size]

    return run


def assert_same(found: Found, expected: Found) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert set(found[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        scale = float(gradient.abs().max())
        assert float((found[1][name] - gradient).abs().max()) <= 1e-4 * scale + 1e-6, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("split", "size"), [*((split, 2) for split in SPLITS), ("zigzag", 4)])
def test_losses_and_gradients_are_those_of_one_rank(
    split: str, size: int, case: str, one_rank: dict[str, Found], shared: Callable[[str, int], dict[str, Found]]
) -> None:
    assert_same(shared(split, size)[case], one_rank[case])
    assert any(float(gradient.abs().max()) > 0 for gradient in one_rank[case][1].values())


def test_cases_are_what_they_say() -> None:
    """Guards the matrix: segments shorter than the chunks, ranks without a row, pads in the middle of a rank's rows."""
    lengths = {name: tuple(make()[1].segment_lengths) for name, make in CASES.items()}
    assert max(lengths["shorter than 2 x context"]) < 8
    layout = context_layout(lengths["padding alone on some ranks"], "zigzag", 4)
    assert not layout.spans[2], "a rank with pads only"
    work = context_layout(lengths["tiles and padding"], "zigzag", 2).work()
    assert work.pads > 1


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "CP2 contiguous": (2, {"context": 2, "context_split": "contiguous"}),
    "CP2 zigzag": (2, {"context": 2, "context_split": "zigzag"}),
    "CP4": (4, {"context": 4}),
    "CP4 zigzag": (4, {"context": 4, "context_split": "zigzag"}),
    "CP2xTP2+SP": (4, {"context": 2, "tensor": 2, "sequence": True}),
    "CP2xTP2+SP zigzag": (4, {"context": 2, "tensor": 2, "sequence": True, "context_split": "zigzag"}),
    "CP2xTP2+SP contiguous": (4, {"context": 2, "tensor": 2, "sequence": True, "context_split": "contiguous"}),
    "CP2xPP2xVPP2": (4, {"context": 2, "pipeline": 2, "virtual_pipeline": 2}),
    "CP2xPP2xVPP2 zigzag": (4, {"context": 2, "pipeline": 2, "virtual_pipeline": 2, "context_split": "zigzag"}),
    "CP2xDP2+overlap": (
        4,
        {"context": 2, "zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "CP2 zigzag recompute": (2, {"context": 2, "recompute": "full", "context_split": "zigzag"}),
    "CP2 selective": (2, {"context": 2, "recompute": "selective"}),
}
ODD = {"seq_len_tokens": 253}
"""Divides by no number of ranks: one rank trains on it, so must all layouts."""


def train(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, **parallel: Any) -> list[dict[str, Any]]:
    recipe = tiny_recipe(run_dir, data_dir, [tiny_stage(steps=3)], data=ODD, parallel=parallel)
    records: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return records


@pytest.fixture(scope="module")
def trained_alone(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(pool, tmp_path_factory.mktemp("alone"), data_dir, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_that_of_one_rank(
    layout: str, pool: RankPool, data_dir: Path, tmp_path: Path, trained_alone: list[dict[str, Any]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    records = train(pool, tmp_path, data_dir, world_size, **parallel)
    assert len(records) == len(trained_alone) == 3
    assert_same_records(records, trained_alone)
    for record, expected in zip(records, trained_alone, strict=True):
        for count in ("useful_tokens", "target_tokens", "samples", "tiles"):
            assert record[count] == expected[count], count


def inflation(split: str) -> tuple[float, int, float]:
    """(loss of a pack over the mean loss of its samples alone, targets, the same of the gradient's length)."""
    from megavlm.parallel.reductions import sum_over_data
    from megavlm.training.step import forward_backward

    model = tiny_model_config()
    (chunk,), ctx = build(model, context=2, context_split=split)
    batch = tiny_batch(model, images_per_sample=(1, 0, 2, 0), text_tokens=(9, 14, 6, 5), num_targets=12)
    singles = [alone(batch, i, model.visual_tokens_per_tile) for i in range(4)]

    def gradient() -> torch.Tensor:
        flat = torch.cat([p.grad.flatten() for p in chunk.parameters() if p.grad is not None])
        return sum_over_data(flat, ctx)

    # A context of one rank: the plain model, which never heard of context parallelism.
    plain = tiny_chunks(model, replace(ctx, grid=replace(ctx.grid, context=1, data=2)))[0]
    plain.load_state_dict(chunk.state_dict())
    losses = torch.cat([plain(single).loss_Q for single in singles])
    together = forward_backward([chunk], [batch], ["tiny"], ctx, forward_only=True)
    for module in (chunk, plain):
        module.zero_grad()
    chunk(batch).total.backward()
    for single in singles:
        plain(single).total.backward()
    alone_flat = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    return together.loss / float(losses.mean()), together.num_targets, float((gradient() - alone_flat).norm() / alone_flat.norm())


@pytest.mark.parametrize("split", SPLITS)
def test_packing_with_context_ranks_does_not_inflate_the_loss(split: str, pool: RankPool) -> None:
    """Megatron-Bridge #1292 and #2055: with packed sequences and context parallelism the loss was three times too large."""
    for ratio, num_targets, difference in pool.run(inflation, split, world_size=2):
        assert ratio == pytest.approx(1.0, rel=1e-5)
        assert num_targets == 12
        assert difference < 1e-4


def isolation(split: str, segment: int) -> dict[str, bool]:
    """Perturb one sample and see, on this context rank, whose hidden states changed."""
    model = tiny_model_config(qkv_bias=True)
    (chunk,), _ = build(model, context=2, context_split=split)
    batch = tiny_batch(model, images_per_sample=(1, 0, 2, 0), text_tokens=(9, 14, 6, 5), seq_len_tokens=96)
    other = perturbed(batch, segment, model.visual_tokens_per_tile)
    with torch.no_grad():
        before, after = (chunk.transform(b, chunk.packing(b))[:, 0] for b in (batch, other))
    part = chunk.packing(batch).context
    start = sum(batch.segment_lengths[:segment])
    own = (part.rows_L >= start) & (part.rows_L < start + batch.segment_lengths[segment])
    real = torch.ones_like(own) if part.is_pad_L is None else ~part.is_pad_L
    return {
        "has own rows": bool((own & real).any()),
        "own changed": not torch.equal(before[own & real], after[own & real]),
        "others equal": torch.equal(before[~own & real], after[~own & real]),
    }


@pytest.mark.parametrize("segment", range(3))
@pytest.mark.parametrize("split", SPLITS)
def test_perturbing_one_sample_leaves_the_others_bit_identical(split: str, segment: int, pool: RankPool) -> None:
    results = pool.run(isolation, split, segment, world_size=2)
    assert all(result["others equal"] for result in results)
    assert any(result["own changed"] for result in results)
    if split == "zigzag":
        assert all(result["has own rows"] and result["own changed"] for result in results)


def traffic(split: str) -> tuple[int, int]:
    """(rows of keys and values that this rank was sent by others in a layer, rows that the split says)."""
    model = changed(tiny_model_config(), language={"num_layers": 1})
    (chunk,), ctx = build(model, context=2, context_split=split)
    batch = tiny_batch(model, images_per_sample=(1, 0, 2, 0), text_tokens=(9, 14, 6, 5))
    sent: list[int] = []
    real = context_module.all_to_all

    def counted(group: Any, rows: torch.Tensor, receive: list[int], send: list[int]) -> torch.Tensor:
        sent.append(sum(count for rank, count in enumerate(receive) if rank != ctx.context_rank))
        assert len(rows) == sum(send)
        return real(group, rows, receive, send)

    context_module.all_to_all = counted
    try:
        chunk(batch)
    finally:
        context_module.all_to_all = real
    assert len(sent) == 1, "keys and values travel together"
    return sent[0], context_layout(tuple(batch.segment_lengths), split, 2).work().received[ctx.context_rank]


@pytest.mark.parametrize("split", SPLITS)
def test_only_keys_that_are_seen_travel(split: str, pool: RankPool) -> None:
    results = pool.run(traffic, split, world_size=2)
    everything = sum(pictures(tiny_model_config())[1].segment_lengths) // 2
    assert all(found == expected for found, expected in results)
    assert sum(found for found, _ in results) < 2 * everything


def test_encoder_pretraining_takes_context_ranks_for_data(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """There is no sequence to share; the next stage shares it again."""
    found = {}
    for name, (world_size, parallel) in {"one": (1, {}), "two": (2, {"context": 2})}.items():
        stages = [encoder_stage(), tiny_stage("all", steps=1)]
        recipe = tiny_recipe(tmp_path / name, data_dir, stages, parallel=parallel)
        found[name] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    assert [record["stage"] for record in found["one"]] == ["encoder", "encoder", "all"]
    assert_same_records(found["two"], found["one"])


def test_physical_tokens_are_those_that_ranks_compute(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    parallel = {"context": 2, "context_split": "zigzag"}
    recipe = tiny_recipe(tmp_path, data_dir, [tiny_stage(steps=1)], data=ODD, parallel=parallel)
    (record,) = pool.run(train_and_read, recipe, world_size=2)[0]
    logical = 4 * ODD["seq_len_tokens"]
    assert record["tokens"] > logical, "pads of four packs"
    assert record["tokens"] <= logical + 4 * 3 * (record["samples"] + 4)
    assert record["pack_fill"] == pytest.approx(record["useful_tokens"] / record["tokens"])


def test_dry_run_compares_the_splits(data_dir: Path) -> None:
    recipe = tiny_recipe("unused", data_dir, [tiny_stage(steps=1)], parallel={"context": 2, "context_split": "zigzag"})
    shown: list[str] = []
    dry_run(recipe, 2, shown.append)
    table = next(text for text in shown if "context splits of 4 microbatches over 2 ranks" in text)
    assert [split for split in SPLITS if f"\n{split} " in table] == list(SPLITS)
    assert next(line for line in table.splitlines() if "this recipe" in line).startswith("zigzag")
