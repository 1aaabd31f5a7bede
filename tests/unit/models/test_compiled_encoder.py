"""precision.compile_encoder: the same features and gradients, one graph for all layers and any number of pictures; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.precision import PrecisionConfig
from megavlm.config.schema import ParallelConfig, VisionConfig
from megavlm.models.layers.compiled import compile_mlps
from megavlm.models.vision import VisionEncoder
from megavlm.planner.compiled import check_compiled, machine_stops
from megavlm.planner.precision import PrecisionError, precision_table
from megavlm.testing.in_rank import in_rank
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.tiny import tiny_model_config

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(machine_stops("cpu") is not None, reason="no C++ compiler")
STYLES: dict[str, dict[str, Any]] = {
    "CLIP's": {},
    "gated": {"norm": "rms_norm", "gated_mlp": True, "activation": "silu", "layer_scale": True},
}


def encoder(vision: VisionConfig, compiled: bool, parallel: ParallelConfig) -> VisionEncoder:
    found = VisionEncoder(vision, PrecisionConfig(dtype="fp32", compile_encoder=compiled), parallel, CPU)
    generator = torch.Generator().manual_seed(1)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    for parameter in found.untrained_parameters():
        parameter.requires_grad_(False)
    return found


def features_and_gradients(built: VisionEncoder, tiles: int) -> list[torch.Tensor]:
    side = built.vision.image_size_px
    pixels = torch.randint(0, 256, (tiles, 3, side, side), generator=torch.Generator().manual_seed(tiles), dtype=torch.uint8)
    out = built(pixels).x_ND
    return [out, *torch.autograd.grad(out.square().mean(), [p for p in built.parameters() if p.requires_grad])]


@needs_compiler
@pytest.mark.parametrize(
    ("style", "recompute"),
    [("CLIP's", "none"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("CLIP's", "full"), ("gated", "none")))],
)
@in_rank
def test_the_same_features_and_gradients(ctx: Any, style: str, recompute: Any) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    vision = tiny_model_config().vision.model_copy(update={"num_layers": 10, "feature_layer": -1, **STYLES[style]})
    plain, compiled = (encoder(vision, own, ParallelConfig(recompute=recompute)) for own in (False, True))
    for tiles in (2, 3, 5, 1):
        for got, want in zip(*(features_and_gradients(built, tiles) for built in (compiled, plain)), strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert counters["stats"]["unique_graphs"] == 1, "ten layers and four numbers of tiles"
    with torch.no_grad():
        assert torch.allclose(features(compiled), features(plain), atol=1e-5)


def features(built: VisionEncoder) -> torch.Tensor:
    side = built.vision.image_size_px
    found: torch.Tensor = built(torch.full((3, 3, side, side), 9, dtype=torch.uint8)).x_ND
    return found


@needs_compiler
@pytest.mark.slow
def test_the_same_training(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Losses and gradient norms of two ranks that overlap the reduction of gradients; some microbatches have no picture."""
    parallel = {"zero": 1, "overlap_grad_reduce": True}
    plain, compiled = (
        pool.run(
            train_and_read,
            tiny_recipe(
                tmp_path / str(own), data_dir, [tiny_stage(steps=3)], parallel=parallel, precision={"dtype": "fp32", "compile_encoder": own}
            ),
            world_size=2,
            timeout_s=300,
        )[0]
        for own in (False, True)
    )
    for got, want in zip(compiled, plain, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5) and got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "FP8": ({"precision": {"dtype": "bf16", "fp8": "current", "keep_bf16": []}}, "keep_bf16"),
    "tensor ranks": ({"parallel": {"tensor": 2, "encoder_data_parallel": False}}, "encoder_tensor=1"),
    "parameters gathered ahead": (
        {"parallel": {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}},
        "overlap_param_gather=false",
    ),
    "sharded": ({"parallel": {"zero": 3}}, "zero to 0 or 1"),
    "MLP again": ({"parallel": {"recompute": "selective", "recompute_modules": ["mlp"]}}, "recompute_encoder"),
    "offloaded": ({"parallel": {"offload_activations": 1}}, "offload_activations=0"),
}


def recipe_with(where: Path, data_dir: Path, **blocks: Any) -> Any:
    precision = {"dtype": "fp32", **blocks.pop("precision", {}), "compile_encoder": True}
    return tiny_recipe(where, data_dir, [tiny_stage(steps=1)], precision=precision, **blocks)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be(tmp_path: Path, data_dir: Path, case: str) -> None:
    blocks, told = REFUSED[case]
    with pytest.raises(PrecisionError, match=f"compile_encoder=true cannot be done: .*{told}"):
        check_compiled(recipe_with(tmp_path, data_dir, **blocks))


def test_the_dry_run_tells(tmp_path: Path, data_dir: Path) -> None:
    recipe = recipe_with(tmp_path, data_dir)
    check_compiled(recipe)
    assert "MLPs compiled" in precision_table(recipe)
    assert not recipe.precision.without_fp8().compile_encoder, "answers are computed as they were"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(PrecisionError, match=r"needs a C\+\+ compiler for a CPU, and /no/such/compiler is not there"):
        compile_mlps(torch.nn.Module(), CPU)
