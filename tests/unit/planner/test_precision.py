"""Which precision a machine and a model can have, through what, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavlm.config.precision import PrecisionConfig
from megavlm.config.schema import DataConfig, LanguageConfig, ModelConfig, ParallelConfig, StageConfig, VisionConfig
from megavlm.planner.memory import estimate_memory
from megavlm.planner.precision import PrecisionError, choose_fp8, formats_here, fp8_layers, fp8_shapes
from megavlm.topology.grid import RankGrid
from megavlm_kernels.packed_attention.selection import Machine

MODEL = ModelConfig(
    vision=VisionConfig(
        image_size_px=32, patch_size_px=8, num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, feature_layer=-1
    ),
    language=LanguageConfig(vocab_size=128, num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=96),
)
HOPPER = Machine("cuda", (9, 0), transformer_engine=(2, 5, 0))
BARE_HOPPER, ADA, AMPERE = Machine("cuda", (9, 0)), Machine("cuda", (8, 9), transformer_engine=(2, 5)), Machine("cuda", (8, 0))
CPU = Machine("cpu")


def choose(machine: Machine, parallel: ParallelConfig | None = None, model: ModelConfig = MODEL, **precision: Any) -> str | None:
    return choose_fp8(model, PrecisionConfig(**precision), parallel or ParallelConfig(), machine)


def with_language(**changes: Any) -> ModelConfig:
    return MODEL.model_copy(update={"language": LanguageConfig(**(MODEL.language.model_dump() | changes))})


@pytest.mark.parametrize(
    ("machine", "fp8", "want"),
    [
        (HOPPER, "current", "transformer_engine"),
        (HOPPER, "blockwise", "transformer_engine"),
        (HOPPER, "rowwise", "scaled_mm"),
        (BARE_HOPPER, "current", "scaled_mm"),
        (BARE_HOPPER, "rowwise", "scaled_mm"),
        (ADA, "current", "transformer_engine"),
        (CPU, "current", "scaled_mm"),
        (CPU, "rowwise", "scaled_mm"),
        (AMPERE, "none", None),
    ],
)
def test_chosen(machine: Machine, fp8: str, want: str | None) -> None:
    assert choose(machine, fp8=fp8) == want


@pytest.mark.parametrize(
    ("text_only", "precision"),
    [
        (False, {"num_layers_at_start_in_bf16": 99}),
        (False, {"keep_bf16": ["projector", "vision"], "num_layers_at_end_in_bf16": 4}),
        (True, {"keep_bf16": ["language"]}),
        (True, {"keep_bf16": ["projector", "language"]}),
    ],
)
def test_a_model_of_which_nothing_is_left_is_refused(text_only: bool, precision: dict[str, Any]) -> None:
    model = MODEL.model_copy(update={"text_only": text_only})
    with pytest.raises(PrecisionError, match="leave nothing of this model to multiply in FP8"):
        choose(HOPPER, model=model, fp8="current", **({"keep_bf16": ["projector"]} | precision))
    assert (
        choose(HOPPER, model=MODEL, fp8="current", keep_bf16=["projector", "vision"], num_layers_at_end_in_bf16=3) == "transformer_engine"
    )


@pytest.mark.parametrize(
    ("machine", "precision", "message"),
    [
        (AMPERE, {"fp8": "current"}, "transformer_engine: it needs compute capability 8.9, this GPU has 8.0; scaled_mm: it needs"),
        (
            ADA,
            {"fp8": "blockwise"},
            "transformer_engine: it needs compute capability 9.0, this GPU has 8.9; scaled_mm: blockwise scales are",
        ),
        (
            BARE_HOPPER,
            {"fp8": "delayed", "keep_bf16": ["vision", "projector"]},
            "Transformer Engine is not installed, or does not load; scaled_mm: delayed scales are only in",
        ),
        (CPU, {"fp8": "delayed", "keep_bf16": ["vision", "projector"]}, "Transformer Engine needs a CUDA device"),
        (CPU, {"fp8": "current", "fp8_backend": "transformer_engine"}, "Transformer Engine needs a CUDA device. Set precision.fp8=none"),
        (
            Machine("cuda", (9, 0), transformer_engine=(2, 1)),
            {"fp8": "current", "fp8_backend": "transformer_engine"},
            "it needs Transformer Engine 2.2, this is 2.1",
        ),
        (
            HOPPER,
            {"fp8": "delayed", "keep_bf16": []},
            "the projector is not of its layers: name projector in precision.keep_bf16",
        ),
    ],
)
def test_refused_with_the_reason_of_each(machine: Machine, precision: dict[str, Any], message: str) -> None:
    with pytest.raises(PrecisionError) as error:
        choose(machine, **precision)
    assert message in str(error.value)


def test_what_a_model_rules_out() -> None:
    with pytest.raises(PrecisionError, match="without a picture have none .* name vision in precision.keep_bf16"):
        choose(HOPPER, fp8="delayed")
    delayed: dict[str, Any] = {"fp8": "delayed", "keep_bf16": ["vision", "projector"]}
    assert choose(HOPPER, **delayed) == "transformer_engine"
    assert choose(HOPPER, fp8="current", keep_bf16=[]) == "scaled_mm"
    experts = with_language(moe={"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32})
    assert choose(HOPPER, model=experts, fp8="current") == "scaled_mm"
    assert choose(HOPPER, model=experts, fp8="current", keep_bf16=["language", "projector"]) == "transformer_engine"
    with pytest.raises(PrecisionError, match=r"recomputing whole layers .* selective"):
        choose(HOPPER, ParallelConfig(recompute="full"), **delayed)
    with pytest.raises(PrecisionError, match=r"language linear_fc2 has 24 inputs on a tensor rank \(parallel.tensor=4\)"):
        choose(HOPPER, ParallelConfig(tensor=4), fp8="current", keep_bf16=["projector", "attention", "vision"])
    with pytest.raises(PrecisionError, match="vision linear_qkv has 24 outputs"):
        choose(HOPPER, ParallelConfig(tensor=4), fp8="current")


def test_layers_at_the_ends() -> None:
    precision = PrecisionConfig(fp8="current", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2)
    assert list(fp8_layers(6, precision)) == [2, 3, 4] and not len(fp8_layers(3, precision)) and not len(fp8_layers(1, precision))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "fp32", "fp8": "current"}, "fp8=current needs dtype=bf16, and dtype is fp32"),
        ({"fp8_format": "e4m3"}, "fp8_format needs FP8: set fp8"),
        ({"num_layers_at_end_in_bf16": 1}, "num_layers_at_end_in_bf16 needs FP8"),
        ({"fp8": "rowwise", "fp8_backend": "transformer_engine"}, "fp8=rowwise is only in scaled_mm"),
        ({"fp8": "blockwise", "fp8_backend": "scaled_mm"}, "fp8=blockwise is only in transformer_engine"),
        ({"fp8": "current", "fp8_amax_history_len": 16}, "fp8_amax_history_len is for fp8=delayed"),
        ({"fp8": "current", "keep_bf16": ["attention", "mlp"]}, "leaves nothing to multiply in FP8"),
        ({"fp8": "delayed", "num_layers_at_start_in_bf16": 1}, "one history for all layers"),
        ({"dtype": "bf16", "loss_scale": {"initial": 2.0}}, "loss_scale is for dtype=fp16"),
        ({"dtype": "fp16", "loss_scale": {"initial": 2.0, "minimum": 4.0}}, "minimum=4 exceeds initial=2"),
    ],
)
def test_rules_of_the_block(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionConfig(**given)


def test_without_fp8_is_a_valid_block() -> None:
    plain = PrecisionConfig(fp8="rowwise", keep_bf16=["mlp"], fp8_format="e4m3", attention="sdpa").without_fp8()
    assert plain == PrecisionConfig.model_validate(plain.model_dump()) == PrecisionConfig(attention="sdpa")


def test_doctor_tells_every_format() -> None:
    here = formats_here(CPU)
    assert list(here) == ["fp32", "bf16", "fp16", "fp8 delayed", "fp8 current", "fp8 rowwise", "fp8 blockwise"]
    assert here["fp8 current"].startswith("scaled_mm, right but slow") and here["fp8 delayed"].startswith("not here: transformer_engine: ")
    assert formats_here(HOPPER)["fp8 current"] == "transformer_engine, scaled_mm"
    turing = formats_here(Machine("cuda", (7, 5)))
    assert "8.0, this GPU has 7.5; use fp16" in turing["bf16"] and turing["fp8 rowwise"].startswith("not here")


def memory(parallel: ParallelConfig | None = None, world: int = 1, **precision: Any) -> Any:
    parallel = parallel or ParallelConfig()
    stage = StageConfig(name="s", steps=1, mixture={"a": 1}, packs_per_step=8)
    data = DataConfig(seq_len_tokens=256, max_patches_per_pack=64)
    return estimate_memory(MODEL, stage, data, RankGrid.from_config(parallel, world), parallel, PrecisionConfig(**precision))[0]


def test_memory_of_the_copies_and_of_what_waits_for_the_backward_pass() -> None:
    plain, fp8 = memory(), memory(fp8="current")
    per_layer = {"vision": 32 * 96 + 32 * 32 + 2 * 32 * 64, "language": 64 * 128 + 64 * 64 + 3 * 64 * 96}
    copies = 2 * (2 * per_layer["vision"] + 4 * per_layer["language"])
    assert fp8.parameters_bytes - plain.parameters_bytes == copies
    assert (fp8.gradients_bytes, fp8.optimizer_bytes, fp8.head_bytes) == (plain.gradients_bytes, plain.optimizer_bytes, plain.head_bytes)
    assert 0.85 * plain.activations_bytes < fp8.activations_bytes < plain.activations_bytes
    few = memory(fp8="current", keep_bf16=["vision", "mlp", "projector"], num_layers_at_start_in_bf16=1)
    assert few.parameters_bytes - plain.parameters_bytes == 2 * 3 * (64 * 128 + 64 * 64)
    split = memory(ParallelConfig(tensor=2), 2, fp8="current", keep_bf16=["vision", "projector"])
    plain_split = memory(ParallelConfig(tensor=2), 2)
    assert split.parameters_bytes - plain_split.parameters_bytes == 2 * 4 * per_layer["language"] // 2
    fp16 = memory(dtype="fp16")
    assert fp16 == plain, "16 bits are 16 bits"


def test_shapes_are_those_of_a_rank() -> None:
    shapes = {s.name: (s.outputs, s.inputs) for s in fp8_shapes(MODEL, PrecisionConfig(fp8="current"), ParallelConfig(tensor=2))}
    assert shapes["language linear_qkv"] == (64, 64) and shapes["language linear_proj"] == (64, 32)
    assert shapes["language linear_fc1"] == (96, 64) and shapes["vision linear_fc2"] == (32, 32)


def test_what_fp16_does_not_go_with(tmp_path: Path) -> None:
    from megavlm.testing.recipes import tiny_recipe

    with pytest.raises(ValueError, match=r"fp16 with parallel\.zero=2: .* use zero=1, or bf16"):
        tiny_recipe(tmp_path, tmp_path, precision={"dtype": "fp16"}, parallel={"zero": 2})
    with pytest.raises(ValueError, match=r"fp16 with model\.language\.moe: .* use bf16"):
        moe = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32}
        tiny_recipe(tmp_path, tmp_path, precision={"dtype": "fp16"}, model={"language": {"moe": moe}})
    assert tiny_recipe(tmp_path, tmp_path, precision={"dtype": "fp16"}, parallel={"zero": 1}).precision.loss_scale.initial == 4096
