"""Several encoders on the same pixels: their features side by side, in every layout, and what cannot hold them says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf import TokenIds
from megavlm.checkpoint.hf.config import config_to_hf
from megavlm.checkpoint.hf.encoders.folder import encoder_folder
from megavlm.checkpoint.hf.folder import WeightFolder
from megavlm.checkpoint.hf.tensors import to_ours
from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, StageConfig
from megavlm.models.freezing import apply_freezing
from megavlm.models.vision import SideBySide, build_encoder
from megavlm.models.weights import assign
from megavlm.parallel.context import ParallelContext, enter_grid
from megavlm.planner.flops import VisionWork, pack_flops
from megavlm.planner.parameters import params
from megavlm.testing.families.encoders import EncoderCase, hf_features, make_encoder
from megavlm.testing.in_rank import in_rank
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import ALL_TRAIN, TOP_LAYERS, assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.tiny import tiny_chunks, tiny_model_config

SMALL = {"num_hidden_layers": 3, "patch_size": 4}
SIGLIP = EncoderCase(
    "SigLIP",
    "SiglipVisionModel",
    lambda tf: tf.SiglipVisionConfig(**SMALL, hidden_size=32, num_attention_heads=4, intermediate_size=64, image_size=16),
    {"feature_layer": -2},
)
# Made for 6 x 6 patches: its positions are stretched to the tile's 4 x 4.
DINOV2 = EncoderCase(
    "DINOv2",
    "Dinov2WithRegistersModel",
    lambda tf: tf.Dinov2WithRegistersConfig(**SMALL, hidden_size=24, num_attention_heads=2, mlp_ratio=2, image_size=24),
    {"feature_layer": [-1], "final_norm": True},
)
GRIDS = [(4, 4), (3, 7), (1, 2)]


def fields(folder: Path, case: EncoderCase) -> dict[str, Any]:
    return encoder_folder(folder).fields | dict(case.features)


def model_of(root: Path) -> ModelConfig:
    blocks = {"vision": fields(root / "siglip", SIGLIP), "vision_beside": [fields(root / "dinov2", DINOV2)]}
    return ModelConfig.model_validate(tiny_model_config().model_dump() | blocks)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    root = tmp_path_factory.mktemp("encoders")
    return root, make_encoder(SIGLIP, root / "siglip"), make_encoder(DINOV2, root / "dinov2")


@torch.no_grad()
def features_in_rank(root: Path, layout: dict[str, Any], pixels: torch.Tensor, grids: list[tuple[int, int]] | None) -> torch.Tensor:
    parallel, model = ParallelConfig(**layout), model_of(root)
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    encoder = build_encoder(model, PrecisionConfig(dtype="fp32"), parallel, ctx.device)
    assert isinstance(encoder, SideBySide)
    tables = [("", root / "siglip"), ("beside_0.", root / "dinov2")]
    sources = {prefix: (encoder_folder(folder), folder) for prefix, folder in tables}

    def provide(key: str, shape: tuple[int, ...], where: tuple[slice, ...]) -> torch.Tensor:
        prefix = "beside_0." if key.startswith("beside_0.") else ""
        source, folder = sources[prefix]
        link = next(link for link in source.links if link.key == key.removeprefix(prefix))
        with WeightFolder(folder, source.disk_name) as weights:
            return to_ours(link, weights.rows, where)

    assign([encoder], provide, ctx)
    return encoder.eval()(pixels, grids).x_ND  # type: ignore[no-any-return]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("native", [False, True])
def test_features_are_those_of_each_encoder_side_by_side(
    pool: RankPool, encoders: tuple[Path, Any, Any], tensor: int, native: bool
) -> None:
    root, siglip, dinov2 = encoders
    generator = torch.Generator().manual_seed(4)
    sizes = [(4 * rows, 4 * columns) for rows, columns in GRIDS] if native else [(16, 16)] * 3
    pictures = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    model = model_of(root)
    with torch.no_grad():
        want = []
        for picture in pictures:
            parts = []
            for case, hf, vision in zip((SIGLIP, DINOV2), (siglip, dinov2), model.encoders, strict=True):
                mean, std = (torch.tensor(v).view(3, 1, 1) for v in (vision.image_mean, vision.image_std))
                alone = model.model_copy(update={"vision": vision, "vision_beside": []})
                parts.append(hf_features(case, hf, alone, ((picture / 255 - mean) / std).unsqueeze(0)))
            want.append(torch.cat(parts, dim=-1))
    expected = torch.cat(want)
    assert expected.shape[1] == model.feature_size == 32 + 24
    pixels, grids = (torch.cat([p.flatten() for p in pictures]), GRIDS) if native else (torch.stack(pictures), None)
    for got in pool.run(features_in_rank, root, {"tensor": tensor}, pixels, grids, world_size=tensor):
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


BESIDE = {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "ffn_hidden_size": 40,
    "num_layers": 3,
    "patch_size_px": 4,
    "image_size_px": 24,
    "layer_scale": True,
    "num_register_tokens": 2,
    "mask_token": True,
    "qk_norm": True,
    "pre_norm": False,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "DP2+overlap": (2, {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "CP2": (2, {"context": 2}),
}
TRAINING = {"all": ALL_TRAIN, "top_layers": TOP_LAYERS}


def records(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, training: str, **blocks: Any) -> list[dict[str, Any]]:
    model = {"vision": {"image_size_px": 24}, "vision_beside": [BESIDE | {"patch_size_px": 8}]}
    recipe = tiny_recipe(run_dir, data_dir, [tiny_stage(steps=3, **TRAINING[training])], model=model, **blocks)
    result: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return result


@pytest.fixture(scope="module")
def single_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    base = tmp_path_factory.mktemp("single")
    return {name: records(pool, base / name, data_dir, 1, name) for name in TRAINING}


@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_in_every_layout(
    layout: str, training: str, pool: RankPool, data_dir: Path, tmp_path: Path, single_rank: dict[str, list[dict[str, Any]]]
) -> None:
    """A norm over the width of query and key, which tensor ranks share, among the rest."""
    world_size, parallel = LAYOUTS[layout]
    assert_same_records(records(pool, tmp_path, data_dir, world_size, training, parallel=parallel), single_rank[training])


@in_rank
def test_the_planner_counts_all_encoders(ctx: ParallelContext) -> None:
    model = ModelConfig.model_validate(tiny_model_config().model_dump() | {"vision_beside": [BESIDE | {"image_size_px": 16}]})
    (chunk,) = tiny_chunks(model, ctx)
    counts = params(model)
    for name in ("vision", "projector"):
        assert counts[name].total == sum(p.numel() for p in getattr(chunk, name).parameters())
    alone = model.model_copy(update={"vision_beside": []})
    beside = model.model_copy(update={"vision": model.vision_beside[0], "vision_beside": []})
    work = VisionWork.uniform(3, 16)

    def of_encoders(each: ModelConfig) -> int:
        return sum(part.total for name, part in pack_flops(each, [64], work, 5).by_part.items() if name.startswith("vision."))

    assert of_encoders(model) == of_encoders(alone) + of_encoders(beside)


@in_rank
def test_the_top_of_each_encoder_trains(ctx: ParallelContext) -> None:
    model = ModelConfig.model_validate(tiny_model_config().model_dump() | {"vision_beside": [BESIDE]})
    (chunk,) = tiny_chunks(model, ctx)
    stage = StageConfig.model_validate(
        {"name": "s", "steps": 1, "mixture": {"a": 1}} | {"vision": {"train": "last_layers", "last_layers": 1}}
    )
    apply_freezing([chunk], stage)
    trained = {
        name.split("decoder.")[-1].split(".self")[0] for name, p in chunk.vision.named_parameters() if p.requires_grad and ".self" in name
    }
    assert trained == {"layers.1"}  # two of three layers run; both encoders
    assert any(name.startswith("beside_0") for name, p in chunk.vision.named_parameters() if p.requires_grad)
    assert not chunk.vision.beside[0].mask_token.requires_grad


def test_what_cannot_stand_beside_is_refused() -> None:
    plain = tiny_model_config().model_dump()
    for change, message in (
        ({"patch_size_px": 8}, r"vision_beside\[0\]\.patch_size_px=8"),
        ({"keep_class_token": True}, "set keep_class_token=false in every encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig.model_validate(plain | {"vision_beside": [BESIDE | change]})


def test_no_hugging_face_class_holds_two_encoders() -> None:
    model = ModelConfig.model_validate(tiny_model_config().model_dump() | {"vision_beside": [BESIDE]})
    with pytest.raises(HuggingFaceError, match="vision_beside"):
        config_to_hf(model, TokenIds(image=3))
