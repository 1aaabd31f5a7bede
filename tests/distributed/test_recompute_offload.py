"""Recomputed and offloaded activations, and an optimizer in host memory: the same numbers, less kept, and the planner knows how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.schema import DataConfig, ModuleTraining, ParallelConfig, PrecisionConfig, StageConfig
from megavlm.models.freezing import apply_freezing
from megavlm.models.init import initialise
from megavlm.models.layers import offload
from megavlm.parallel.context import enter_grid
from megavlm.planner.memory import estimate_memory
from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import TOP_LAYERS, TRAINING, assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.tiny import tiny_batch, tiny_chunks, tiny_model_config
from megavlm.topology.grid import RankGrid

SAVINGS: dict[str, dict[str, Any]] = {
    "attention": {"recompute": "selective"},
    "mlp": {"recompute": "selective", "recompute_modules": ["mlp"]},
    "both modules": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {"recompute": "full"},
    "one layer": {"recompute": "full", "recompute_layers": 1},
    "encoder only": {"recompute_encoder": "full"},
    "LLM only": {"recompute": "full", "recompute_encoder": "none"},
    "mixed": {"recompute": "selective", "recompute_modules": ["mlp"], "recompute_encoder": "full"},
    "offload": {"offload_activations": 3},
    "offload what recomputation keeps": {"recompute": "full", "offload_activations": 9},
    "offload beside selective": {"recompute": "selective", "recompute_modules": ["mlp"], "offload_activations": 9},
}


def stage_of(training: str) -> StageConfig:
    return StageConfig(name="s", steps=1, mixture={"a": 1.0}, **TRAINING[training])


def gradients(parallel: dict[str, Any], training: str) -> dict[str, Any]:
    offload.SMALLEST_BYTES = 0
    model, layout = tiny_model_config(), ParallelConfig(**parallel)
    ctx = enter_grid(layout, torch.device("cpu"), 1)
    (module,) = tiny_chunks(model, ctx, layout)
    initialise([module], model, 0, ctx)
    apply_freezing([module], stage_of(training))
    module(tiny_batch(model)).total.backward()
    return {name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", TRAINING)
def test_gradients_are_equal_to_the_bit(training: str, pool: RankPool) -> None:
    expected = pool.run(gradients, {}, training)[0]
    assert any(abs(g).max() > 0 for g in expected.values())
    for name, parallel in SAVINGS.items():
        got = pool.run(gradients, parallel, training)[0]
        assert got.keys() == expected.keys(), name
        for parameter, gradient in expected.items():
            assert (got[parameter] == gradient).all(), f"{name}: {parameter}"


TOKENS = 512


def kept_bytes(parallel: dict[str, Any], training: str, vision_layers: int, language_layers: int, num_images: int) -> tuple[int, int]:
    """(bytes of distinct storages, no weights, that live between forward and backward, what the planner says)."""
    model = tiny_model_config(num_layers=language_layers)
    model = model.model_copy(update={"vision": model.vision.model_copy(update={"num_layers": vision_layers, "feature_layer": -1})})
    layout, stage = ParallelConfig(**parallel), stage_of(training)
    ctx = enter_grid(layout, torch.device("cpu"), 1)
    (module,) = tiny_chunks(model, ctx, layout)
    initialise([module], model, 0, ctx)
    apply_freezing([module], stage)
    batch = tiny_batch(model, images_per_sample=(num_images,), text_tokens=(20,), seq_len_tokens=TOKENS)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: list[torch.UntypedStorage] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept.append(x.untyped_storage())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = module(batch)
    measured = sum({s._cdata: s.nbytes() for s in kept}.values())
    del output
    data = DataConfig(seq_len_tokens=TOKENS, max_patches_per_pack=num_images * model.vision.num_patches)
    (said,) = estimate_memory(model, stage, data, RankGrid.from_config(layout, 1), layout, PrecisionConfig(dtype="fp32"))
    return measured, said.activations_bytes


def two_layers(pool: RankPool, name: str, module: str) -> tuple[int, int]:
    """(bytes that two more layers keep, what the planner says of them)."""
    few, many = ((3, 2), (5, 2)) if module == "vision" else ((3, 2), (3, 4))
    sizes = [pool.run(kept_bytes, SAVINGS.get(name, {}), "all", *layers, 12)[0] for layers in (few, many)]
    return sizes[1][0] - sizes[0][0], sizes[1][1] - sizes[0][1]


@pytest.mark.parametrize("module", ["vision", "language"])
def test_two_more_layers_keep_what_the_planner_says(module: str, pool: RankPool) -> None:
    whole, again, full = (two_layers(pool, name, module) for name in ("nothing", "mlp", "full"))
    assert full[1] == full[0] > 0, "of a recomputed layer its input, to the byte"
    # The planner counts what fused operations keep. Here the encoder's activation is three, each of which keeps its own; in the LLM,
    # attention keeps key and value heads as often as query heads share them, and its result once more where segments are joined.
    least = {"vision": 0.6, "language": 0.8}[module]
    assert least < whole[1] / whole[0] <= 1.0
    assert 0.6 < (whole[1] - again[1]) / (whole[0] - again[0]) <= 1.0


@pytest.mark.parametrize("name", ["LLM only", "encoder only"])
def test_encoder_and_llm_choose_apart(name: str, pool: RankPool) -> None:
    for module in ("vision", "language"):
        chosen = (module == "language") == (name == "LLM only")
        assert two_layers(pool, name, module) == two_layers(pool, "full" if chosen else "nothing", module)


def test_each_choice_keeps_less_than_the_one_before(pool: RankPool) -> None:
    measured = [pool.run(kept_bytes, SAVINGS.get(name, {}), "all", 3, 4, 12)[0][0] for name in ("nothing", "mlp", "full")]
    assert measured == sorted(measured, reverse=True) and measured[-1] < 0.6 * measured[0]


def where_it_is_kept(parallel: dict[str, Any]) -> tuple[int, int, bool]:
    """(tensors that went to the host and came back, layers of which they are at the end, whether none is left afterwards)."""
    import gc
    import weakref

    offload.SMALLEST_BYTES = 0
    counts, alive, original = [0, 0], [], offload._Streams.fetch
    to_host = offload._Streams.to_host

    def count_out(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        counts[0] += 1
        host = to_host(self, tensor)
        alive.append(weakref.ref(host))
        return host

    def count_back(self: Any, kept: Any) -> None:
        counts[1] += kept.back is None
        original(self, kept)

    offload._Streams.to_host, offload._Streams.fetch = count_out, count_back  # type: ignore[method-assign]
    gradients(parallel, "all")
    gc.collect()
    offload._Streams.to_host, offload._Streams.fetch = to_host, original  # type: ignore[method-assign]
    return counts[0], counts[1], not any(ref() is not None for ref in alive)


def test_offloaded_tensors_go_once_and_come_back_once(pool: RankPool) -> None:
    some, everything = (pool.run(where_it_is_kept, {"offload_activations": n})[0] for n in (1, 9))
    assert 0 < some[0] < everything[0]
    for out, back, none_left in (some, everything):
        assert 0 < back <= out and none_left


@pytest.mark.parametrize(
    ("world_size", "parallel", "dtype"),
    slow_unless(
        [
            (1, {}, "fp32"),
            (1, {}, "bf16"),
            (2, {"zero": 1}, "bf16"),
            (2, {"zero": 3}, "fp32"),
            (2, {"zero": 2}, "bf16"),
            (2, {"tensor": 2}, "fp32"),
        ],
        lambda world_size, parallel, dtype: parallel.get("zero") in (1, 3),
    ),
)
def test_an_optimizer_in_host_memory_updates_as_another(
    world_size: int, parallel: dict[str, Any], dtype: str, pool: RankPool, data_dir: Path, tmp_path: Path
) -> None:
    """Losses over five updates; then both go on from the other's checkpoint."""

    def run(folder: str, max_steps: int, offloads: bool) -> list[dict[str, Any]]:
        own = parallel | {"offload_optimizer": offloads}
        stage = tiny_stage(steps=5, **TOP_LAYERS)
        recipe = tiny_recipe(tmp_path / folder, data_dir, [stage], parallel=own, precision={"dtype": dtype}, run={"max_steps": max_steps})
        records: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
        return records

    reference = run("plain", 5, False)
    assert reference[-1]["loss"] != reference[0]["loss"]
    runs = [run("host", 5, True)]
    run("there", 3, False), run("back", 3, True)
    runs += [run("there", 5, True), run("back", 5, False)]
    for records in runs:
        assert len(records) == 5
        assert_same_records(records, reference, *((1e-6, 1e-5) if dtype == "fp32" else (2e-4, 1e-2)))


def test_moments_are_in_host_memory_and_the_update_is_not_the_devices(pool: RankPool) -> None:
    pool.run(moments_of_host_adam)


def moments_of_host_adam() -> None:
    from megavlm.parallel.host_adam import HostAdam

    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 35).view(5, 7)) for _ in range(2))
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-5}
    adam, oracle = HostAdam(torch.optim.AdamW([ours], **options)), torch.optim.AdamW([theirs], **options)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(5, 7)
        adam.step()
        oracle.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert all(t.device.type == "cpu" for t in adam.state[ours].values()) and adam.state[ours]["step"] == 5


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"recompute_modules": ["mlp"]}, "recompute=selective"),
        ({"recompute": "selective", "recompute_layers": 2}, "recompute=full"),
        ({"recompute_modules": [], "recompute": "selective"}, "at least 1"),
        ({"recompute": "selective", "recompute_modules": ["softmax"]}, "core_attn"),
    ],
)
def test_what_cannot_be_is_refused(parallel: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParallelConfig.model_validate(parallel)


def test_experts_are_not_sent_their_tokens_twice() -> None:
    experts = {"language": {"moe": {"num_experts": 2, "top_k": 1, "ffn_hidden_size": 32}}}
    with pytest.raises(ValueError, match="second time"):
        tiny_recipe("unused", "unused", model=experts, parallel={"recompute": "selective", "recompute_modules": ["mlp"]})
    assert tiny_recipe("unused", "unused", model=experts, parallel={"recompute": "full"}).model.language.moe is not None


def test_the_planner_knows_what_a_gpu_does_not_hold() -> None:
    model, stage = tiny_model_config(), stage_of("all")
    assert ModuleTraining().train == "full" == stage.language.train
    data, precision = DataConfig(seq_len_tokens=TOKENS, max_patches_per_pack=64), PrecisionConfig(dtype="bf16")

    def estimate(device: str, **parallel: Any) -> Any:
        layout = ParallelConfig(**parallel)
        return estimate_memory(model, stage, data, RankGrid.from_config(layout, 4), layout, precision, device=device)[0]

    plain, moments = estimate("cuda"), estimate("cuda", offload_optimizer=True)
    assert moments.optimizer_bytes * 3 == plain.optimizer_bytes and estimate("cpu", offload_optimizer=True) == estimate("cpu")
    assert estimate("cuda", offload_activations=9).activations_bytes < plain.activations_bytes
    two, three = estimate("cuda", zero=2), estimate("cuda", zero=3)
    assert three.gathered_bytes < two.gathered_bytes and three.total_bytes < two.total_bytes
    assert two.gradients_bytes * 4 == plain.gradients_bytes and plain.gathered_bytes == 0
