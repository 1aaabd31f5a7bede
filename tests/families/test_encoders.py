"""Every vision encoder computes what its Hugging Face class computes, alone: features, gradients, packing, weights there and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megavlm.checkpoint.hf.encoders import encoder_of
from megavlm.checkpoint.hf.encoders.folder import encoder_folder
from megavlm.checkpoint.hf.folder import WeightFolder
from megavlm.checkpoint.hf.tensors import to_ours, to_theirs
from megavlm.config.schema import LanguageConfig, ModelConfig, VisionConfig
from megavlm.models.weights import sharded_tensors
from megavlm.planner.parameters import parameter_blocks
from megavlm.testing.families.encoders import ENCODER_CASES, EncoderCase, hf_features, loaded_encoder, make_encoder, vision_config
from megavlm.testing.pool import RankPool

GRIDS = [(4, 4), (3, 7), (1, 2), (9, 2), (2, 8)]
"""(rows, columns) of patches of pictures; the tiny encoders were made for 4 x 4."""


@dataclass
class Oracle:
    case: EncoderCase
    folder: Path
    hf: Any
    vision: VisionConfig

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(vision=self.vision, language=LanguageConfig(hidden_size=32, num_attention_heads=4))


@pytest.fixture(scope="module", params=[pytest.param(c, id=c.name) for c in ENCODER_CASES])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("encoder") / "hf"
    hf = make_encoder(request.param, folder)
    return Oracle(request.param, folder, hf, vision_config(request.param, folder))


def pictures(grids: list[tuple[int, int]], side: int = 0, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(side, side)] * 3 if side else [(4 * rows, 4 * columns) for rows, columns in grids]
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def normalised(oracle: Oracle, picture: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (oracle.vision.image_mean, oracle.vision.image_std))
    return ((picture / 255 - mean) / std).unsqueeze(0)


def theirs(oracle: Oracle, picture: torch.Tensor) -> torch.Tensor:
    return hf_features(oracle.case, oracle.hf, oracle.model, normalised(oracle, picture))


@torch.no_grad()
def features_in_rank(
    case: EncoderCase, folder: Path, layout: dict[str, Any], pixels: torch.Tensor, grids: list[tuple[int, int]] | None
) -> list[torch.Tensor]:
    encoder, _ = loaded_encoder(case, folder, layout)
    features = encoder.eval()(pixels, grids)
    return list(features.x_ND.split(features.lengths))


def assert_close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    assert got.shape == want.shape, what
    assert float((got - want).abs().max()) <= 1e-4 * max(1.0, float(want.abs().max())), what


@pytest.mark.parametrize("tensor", [1, 2])
def test_features_of_tiles(pool: RankPool, oracle: Oracle, tensor: int) -> None:
    tiles = pictures([], side=oracle.vision.image_size_px)
    with torch.no_grad():
        want = [theirs(oracle, tile) for tile in tiles]
    for ours in pool.run(features_in_rank, oracle.case, oracle.folder, {"tensor": tensor}, torch.stack(tiles), None, world_size=tensor):
        for i, (got, expected) in enumerate(zip(ours, want, strict=True)):
            assert_close(got, expected, f"tile {i}")


@pytest.mark.parametrize("tensor", [1, 2])
def test_pictures_of_unequal_sizes_in_one_pack(pool: RankPool, oracle: Oracle, tensor: int) -> None:
    """Each is what Hugging Face makes of it alone."""
    several = pictures(GRIDS)
    with torch.no_grad():
        want = [theirs(oracle, picture) for picture in several]
    flat = torch.cat([picture.flatten() for picture in several])
    for ours in pool.run(features_in_rank, oracle.case, oracle.folder, {"tensor": tensor}, flat, GRIDS, world_size=tensor):
        for got, expected, grid in zip(ours, want, GRIDS, strict=True):
            assert_close(got, expected, f"picture of {grid}")


def gradients_in_rank(
    case: EncoderCase, folder: Path, layout: dict[str, Any], pixels: torch.Tensor, direction: torch.Tensor
) -> dict[str, tuple[tuple[slice, ...], torch.Tensor]]:
    """Checkpoint key -> (slice, gradient) of this rank's parts that have one."""
    encoder, ctx = loaded_encoder(case, folder, layout)
    features = encoder.eval()(pixels, GRIDS)
    (features.x_ND * direction).sum().backward()
    owners = {p.data_ptr(): p for p in encoder.parameters()}
    found = {}
    for tensor in sharded_tensors([encoder], ctx):
        where = tuple(slice(o, o + n) for o, n in zip(tensor.global_offset, tensor.local_shape, strict=True))
        owner = next(p for p in owners.values() if p.data_ptr() <= tensor.data.data_ptr() < p.data_ptr() + p.numel() * 4)
        if owner.grad is not None:
            start = (tensor.data.data_ptr() - owner.data_ptr()) // 4
            found[f"{tensor.key}/{start if owner.shape != tensor.data.shape else 0}"] = (
                where,
                owner.grad.flatten()[start : start + tensor.data.numel()].view(tensor.data.shape).clone(),
            )
    return found


@pytest.mark.parametrize("tensor", [1, 2])
def test_gradients(pool: RankPool, oracle: Oracle, tensor: int) -> None:
    """Of every weight, on every tensor rank, against autograd through the Hugging Face encoder."""
    several = pictures(GRIDS, seed=3)
    oracle.hf.zero_grad()
    outputs = torch.cat([theirs(oracle, picture) for picture in several])
    direction = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    (outputs * direction).sum().backward()
    source = encoder_folder(oracle.folder)
    named = {source.disk_name(n): torch.zeros_like(p) if p.grad is None else p.grad for n, p in oracle.hf.named_parameters()}
    for layer in range(oracle.vision.num_layers):  # gate and up are one tensor on the disk
        mlp = f"encoder.layer.{layer}.mlp."
        for part in ("weight", "bias"):
            if f"{mlp}gate_proj.{part}" in named:
                named[f"{mlp}weights_in.{part}"] = torch.cat([named.pop(f"{mlp}{x}_proj.{part}") for x in ("gate", "up")])
    table = {link.key: link for link in source.links}
    flat = torch.cat([picture.flatten() for picture in several])
    largest = max(float(g.abs().max()) for g in named.values())
    results = pool.run(gradients_in_rank, oracle.case, oracle.folder, {"tensor": tensor}, flat, direction, world_size=tensor)
    for found in results:
        seen = {key.split("/")[0] for key in found}
        for key, (where, got) in found.items():
            link = table[key.split("/")[0]]
            want = to_ours(link, lambda name, a, b: named[name][a:b], where)
            assert float((got - want).abs().max()) <= 1e-4 * largest, key
        for key, link in table.items():  # what has no gradient here has none there
            if key not in seen:
                assert not any(named[name].any() for name in link.names), key


def weights_there_and_back(case: EncoderCase, folder: Path) -> dict[str, torch.Tensor]:
    encoder, ctx = loaded_encoder(case, folder, {})
    ours = {p: t.detach() for p, t in encoder.state_dict().items() if t is not None}
    keys = {tensor.key for tensor in sharded_tensors([encoder], ctx)}
    source = encoder_folder(folder)
    assert keys == {link.key for link in source.links}
    named = {
        key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
            "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
        ): t
        for key, t in ours.items()
    }
    return {name: t for link in source.links for name, t in zip(link.names, to_theirs(link, named[link.key]), strict=True)}


def test_weights_there_and_back(pool: RankPool, oracle: Oracle) -> None:
    """Bit for bit, the mask token and all that no feature reads too; and the config is the one that it came from."""
    before = load_file(oracle.folder / "model.safetensors")
    after = pool.run(weights_there_and_back, oracle.case, oracle.folder)[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert encoder_of(oracle.vision, (oracle.hf.config.model_type,)).mean == encoder_folder(oracle.folder).fields["image_mean"]


def untrained_in_rank(case: EncoderCase, folder: Path) -> set[str]:
    encoder, _ = loaded_encoder(case, folder, {})
    frozen = encoder.untrained_parameters()
    return {name for name, parameter in encoder.named_parameters() if parameter in frozen}


def test_the_planner_counts_what_hugging_face_has(oracle: Oracle) -> None:
    blocks = [b for b in parameter_blocks(oracle.model) if b.module == "vision"]
    assert sum(b.total for b in blocks) == sum(p.numel() for p in oracle.hf.parameters())


def test_a_mask_token_never_trains(pool: RankPool, oracle: Oracle) -> None:
    assert ("mask_token" in pool.run(untrained_in_rank, oracle.case, oracle.folder)[0]) == oracle.vision.mask_token


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_folder_with_a_text_tower(kind: str, tmp_path: Path) -> None:
    """Its encoder is taken, everything else left."""
    from megavlm.checkpoint.hf.reading import quiet_transformers
    from megavlm.testing.families.encoders import SMALL

    tf = quiet_transformers()
    vision = SMALL | {"intermediate_size": 64}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 90}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    whole = getattr(tf, f"{kind}Model")(getattr(tf, f"{kind}Config")(vision_config=vision, text_config=text))
    whole.save_pretrained(str(tmp_path))
    source = encoder_folder(tmp_path)
    with WeightFolder(tmp_path, source.disk_name) as weights:
        assert set(weights.names) == {name for link in source.links for name in link.names}
        for link in source.links:
            for name, part in zip(link.names, link.parts, strict=True):
                assert weights.shape(name) == part.shape
    assert source.fields["num_layers"] == 3
