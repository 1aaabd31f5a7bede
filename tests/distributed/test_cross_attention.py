"""Cross-attention into the LLM: against a direct implementation, in every layout, with packs, without pictures, in generation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.data.prompt import Prompt, prompt_batch
from megavlm.data.types import PictureTiles
from megavlm.inference.generate import generate
from megavlm.models.init import initialise
from megavlm.models.language.cross import PICTURES, Look, picture_rows, sight_of
from megavlm.models.weights import sharded_tensors
from megavlm.parallel.context import enter_grid
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import ENCODER_FROZEN, assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.tiny import tiny_chunks, tiny_model_config
from megavlm.topology.context import context_layout

IMAGE = 3
FLAMINGO = {"layers": [0, 3]}
MLLAMA = {"layers": [1, 3], "qk_norm": True, "before_first_picture": "all", "mlp_without_picture": False}
STYLES: dict[str, dict[str, Any]] = {"flamingo": FLAMINGO, "mllama": MLLAMA}


def model_of(style: str) -> ModelConfig:
    return tiny_model_config(cross_attention=STYLES[style])


def prompts_of(model: ModelConfig) -> list[Prompt]:
    """No picture; one after some text; two side by side, then one more, of 2, 1 and 1 tiles."""
    generator = torch.Generator().manual_seed(5)
    side = model.vision.image_size_px

    def prompt(ids: list[int], tiles: list[int]) -> Prompt:
        if not tiles:
            return Prompt(ids)
        pixels = torch.randint(0, 256, (sum(tiles), 3, side, side), generator=generator, dtype=torch.uint8)
        return Prompt(ids, pixels, picture_tiles=[PictureTiles(n, 1, n) for n in tiles])

    return [
        prompt([7, 8, 9, 10, 11], []),
        prompt([20, 21, IMAGE, 22, 23, 24, 25], [1]),
        prompt([30, IMAGE, IMAGE, 31, 32, IMAGE, 33, 34, 35], [2, 1, 1]),
    ]


def built(model: ModelConfig, layout: dict[str, Any]) -> tuple[Any, Any]:
    """Chunks with large weights, gates included, the same in every layout."""
    parallel = ParallelConfig(**layout)
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    chunks: Any = tiny_chunks(model, ctx, parallel)
    initialise(chunks, model, 3, ctx)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("gate"):
                torch.nn.init.constant_(parameter, 0.7)
    return chunks, ctx


def test_looks() -> None:
    """Which rows see which pictures: the latest, pictures side by side together, nothing or everything before the first."""
    for style, before in (("flamingo", ()), ("mllama", ((4, 16),))):
        model = model_of(style)
        prompts = [Prompt([5, IMAGE, 6], torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), prompts_of(model)[2], prompts_of(model)[0]]
        each, batch = model.visual_tokens_per_tile, prompt_batch(prompts, IMAGE, model)
        assert picture_rows(model, batch) == [(each, each), (2 * each, 2 * each), (each, each), (each, each)]
        sight = sight_of(model, batch, None)
        start = each
        if before:
            before = ((start, 4 * each),)
            first: tuple[tuple[int, int], ...] = ((0, each),)
        else:
            first = ()
        two, one, last = (start, 2 * each), (start + 2 * each, each), (start + 3 * each, each)
        assert list(sight.looks) == [
            Look(1, first, False),
            Look(2, ((0, each),), True),
            Look(1, before, False),
            Look(1, (two,), True),
            Look(3, (two, one), True),
            Look(4, (last,), True),
            Look(5, (), False),
        ]
        assert [look.features for look in sight.last] == [((0, each),), (last,), ()]
        four = prompt_batch([prompts[1]] * 4, IMAGE, model)
        layout = context_layout(tuple(four.segment_lengths), "zigzag", 2)
        halves = [sight_of(model, four, (layout, rank)) for rank in (0, 1)]
        assert [sum(look.length for look in half.looks) for half in halves] == [24, 24], "of each segment 9 rows and 3 pads"


def direct_layer(
    layer: Any, x_LD: torch.Tensor, features_MD: torch.Tensor, sees_LM: torch.Tensor, after_L: torch.Tensor, style: str
) -> torch.Tensor:
    """Formulas of Flamingo (section 2.2 and figure 4) and of Mllama, written out with a mask."""
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weights[name]

    def heads(x: torch.Tensor, name: str) -> torch.Tensor:
        return (x @ weights[f"self_attention.{name}.weight"].T).unflatten(-1, (-1, 12))

    h = norm(x_LD, "input_layernorm.weight")
    q, k, v = heads(h, "linear_q"), heads(features_MD, "linear_k"), heads(features_MD, "linear_v")
    if style == "mllama":
        q, k = norm(q, "self_attention.query_norm.weight"), norm(k, "self_attention.key_norm.weight")
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.einsum("lhk,mhk->hlm", q, k) / math.sqrt(12)
    share = scores.masked_fill(~sees_LM, -torch.inf).softmax(-1).nan_to_num()
    out = torch.einsum("hlm,mhk->lhk", share, v).flatten(1) @ weights["self_attention.linear_proj.weight"].T
    x = x_LD + weights["self_attention.linear_proj.post.gate"].tanh() * out
    gate, up = (norm(x, "pre_mlp_layernorm.weight") @ weights["mlp.linear_fc1.weight"].T).chunk(2, -1)
    mlp = weights["mlp.linear_fc2.post.gate"].tanh() * ((F.silu(gate) * up) @ weights["mlp.linear_fc2.weight"].T)
    return x + (mlp * after_L[:, None] if style == "mllama" else mlp)


def compare_with_direct(style: str) -> float:
    model = model_of(style)
    (chunk,), _ = built(model, {})
    batch = prompt_batch(prompts_of(model), IMAGE, model)
    packing = chunk.packing(batch)
    x, packing.sides = chunk.merge(batch)
    features = packing.sides[PICTURES][:, 0]
    sees = torch.zeros(x.shape[0], features.shape[0], dtype=torch.bool)
    after = torch.zeros(x.shape[0], dtype=torch.bool)
    row = 0
    for look in packing.sight.looks:
        for first, number in look.features:
            sees[row : row + look.length, first : first + number] = True
        after[row : row + look.length] = look.after_picture
        row += look.length
    layer = chunk.language.decoder.layers[model.language.cross_attention.layers[0]]  # type: ignore[union-attr]
    with torch.no_grad():
        ours = layer(x, None, packed_seq_params=packing)[0][:, 0]
        theirs = direct_layer(layer, x[:, 0], features, sees, after, style)
    changed = float((ours - x[:, 0]).abs().max())
    assert changed > 0.1, "the layer does nothing"
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("style", STYLES)
def test_equals_a_direct_implementation(pool: RankPool, style: str) -> None:
    assert pool.run(compare_with_direct, style)[0] < 1e-5


def packed_and_alone(style: str) -> tuple[float, float]:
    """Largest difference between a pack and its samples alone; how much another sample's picture changes them."""
    model = model_of(style)
    (chunk,), _ = built(model, {})
    chunk.eval()
    prompts = prompts_of(model)

    def logits(p: list[Prompt]) -> torch.Tensor:
        batch = prompt_batch(p, IMAGE, model)
        with torch.no_grad():
            return chunk.language.logits(chunk.transform(batch, chunk.packing(batch)))

    together, alone = logits(prompts), torch.cat([logits([p]) for p in prompts])
    assert prompts[2].tiles_TCHW is not None
    other = Prompt(prompts[2].ids, 255 - prompts[2].tiles_TCHW, picture_tiles=prompts[2].picture_tiles)
    changed = logits([*prompts[:2], other])
    assert float((changed[12:] - together[12:]).abs().max()) > 1e-2, "the picture has no effect"
    return float((together - alone).abs().max()), float((changed[:12] - together[:12]).abs().max())


@pytest.mark.parametrize("style", STYLES)
def test_packed_equals_alone(pool: RankPool, style: str) -> None:
    difference, leak = pool.run(packed_and_alone, style)[0]
    assert difference < 1e-4 and leak == 0.0


def identity_at_start(style: str) -> float:
    model = model_of(style)
    parallel = ParallelConfig()
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    (chunk,) = tiny_chunks(model, ctx, parallel)
    initialise([chunk], model, 3, ctx)
    batch = prompt_batch(prompts_of(model), IMAGE, model)
    packing = chunk.packing(batch)
    x, packing.sides = chunk.merge(batch)
    layer: Any = chunk.language.decoder.layers[model.language.cross_attention.layers[0]]  # type: ignore[union-attr]
    assert all(parameter.numel() == 1 for name, parameter in chunk.named_parameters() if name.endswith("gate"))
    return float((layer(x, None, packed_seq_params=packing)[0] - x).abs().max())


def test_starts_as_nothing(pool: RankPool) -> None:
    assert pool.run(identity_at_start, "flamingo")[0] == 0.0


def answers(style: str, layout: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy answers with the cache, all prompts together; and by running each whole text again for every token."""
    model = model_of(style)
    (chunk,), _ = built(model, layout)
    chunk.eval()
    prompts = prompts_of(model)
    cached = generate(chunk, prompts, max_new_tokens=6, stop_ids=[], image_token_id=IMAGE)
    again = []
    for prompt in prompts:
        ids = list(prompt.ids)
        for _ in range(6):
            batch = prompt_batch([Prompt(ids, prompt.tiles_TCHW, picture_tiles=prompt.picture_tiles)], IMAGE, model)
            with torch.no_grad():
                logits = chunk.language.logits(chunk.transform(batch, chunk.packing(batch)))[-1]
            ids.append(int(logits.argmax()))
        again.append(ids[len(prompt.ids) :])
    return cached, again


@pytest.mark.parametrize("style", STYLES)
def test_generation_equals_recomputation(pool: RankPool, style: str) -> None:
    for layout, size in (({}, 1), ({"tensor": 2}, 2)):
        for cached, again in pool.run(answers, style, layout, world_size=size):
            assert cached == again


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "PP2 encoder alone": (2, {"pipeline": 2, "layers_per_stage": [0, 4]}),
    "PP3 balanced": (3, {"pipeline": 3, "split": "balanced"}),
    "PP2xVPP2 unequal+overlap": (4, {"pipeline": 2, "virtual_pipeline": 2, "layers_per_stage": [0, 2, 1, 1], "overlap_grad_reduce": True}),
    "TP2xPP2+SP": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "CP2": (2, {"context": 2}),
    "CP2xPP2": (4, {"context": 2, "pipeline": 2}),
    "DP2+overlap": (2, {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "PP2+overlap": (4, {"pipeline": 2, "zero": 1, "overlap_grad_reduce": True}),
    "recompute": (1, {"recompute": "full"}),
}


def train_with_open_gates(recipe: Any) -> list[dict[str, Any]]:
    """Gates at 0 would hide everything behind them from the first steps' gradients."""
    from unittest.mock import patch

    from megavlm.models import init

    drawn = init.random_provider

    def provider(model: ModelConfig, seed: int) -> Any:
        provide = drawn(model, seed)
        return lambda key, shape, where: torch.full(shape, 0.7)[where] if key.endswith("gate") else provide(key, shape, where)

    with patch.object(init, "random_provider", provider):
        return train_and_read(recipe)


TILES = {"model": {"vision": {"image_size_px": 24}}, "data": {"image": {"policy": "tiles", "max_tiles": 3, "thumbnail": True}}}
CANVAS = {
    "model": {
        "vision": {
            "image_size_px": 24,
            "qkv_bias": False,
            "attention_output_bias": False,
            "keep_class_token": True,
            "feature_layer": [1, 3],
            "canvas": {"max_tiles": 2, "num_global_layers": 1},
        },
        "projector": {"num_layers": 1},
    },
    "data": {"image": {"policy": "canvas"}},
}
NATIVE = {"model": {"vision": {"image_size_px": 24}}, "data": {"image": {"policy": "native", "min_tokens_per_image": 1}}}
PICTURE_KINDS: dict[str, dict[str, Any]] = {"tiles": TILES, "canvas": CANVAS, "native": NATIVE}


def run(
    pool: RankPool, where: Path, data_dir: Path, size: int, parallel: dict[str, Any], style: str, kind: str = "tiles", **stage: Any
) -> list[dict[str, Any]]:
    blocks = PICTURE_KINDS[kind]
    recipe = tiny_recipe(
        where,
        data_dir,
        [tiny_stage(steps=3, **stage)],
        parallel=parallel,
        model={**blocks["model"], "language": {"cross_attention": STYLES[style]}},
        data=blocks["data"],
        tracking={"num_sample_pictures": 2 if stage else 0},
    )
    result: list[dict[str, Any]] = pool.run(train_with_open_gates, recipe, world_size=size)[0]
    return result


@pytest.fixture(scope="session")
def one_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    base = tmp_path_factory.mktemp("cross")
    found = {style: run(pool, base / style, data_dir, 1, {}, style) for style in STYLES}
    found["frozen"] = run(pool, base / "frozen", data_dir, 1, {}, "flamingo", **ENCODER_FROZEN)
    for kind in ("canvas", "native"):
        found[kind] = run(pool, base / kind, data_dir, 1, {}, "mllama", kind)
    return found


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if size > 2 else []) for name, (size, _) in LAYOUTS.items()]
)
def test_layouts(pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: dict[str, list[dict[str, Any]]], layout: str) -> None:
    """The same losses and gradient norms however the model is spread; some microbatches have no picture."""
    size, parallel = LAYOUTS[layout]
    style = "mllama" if layout in ("TP2+SP", "PP2", "CP2xPP2", "DP2+overlap") else "flamingo"
    assert_same_records(run(pool, tmp_path, data_dir, size, parallel, style), one_rank[style])


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("TP2", "canvas"),
        ("PP2", "native"),
        *(pytest.param(layout, "canvas", marks=pytest.mark.slow) for layout in ("PP2", "DP2+overlap", "CP2", "recompute")),
        *(pytest.param(layout, "native", marks=pytest.mark.slow) for layout in ("TP2", "DP2+overlap", "CP2", "recompute")),
    ],
)
def test_other_pictures(
    pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: dict[str, list[dict[str, Any]]], layout: str, kind: str
) -> None:
    """An encoder that sees a picture's tiles together, and pictures in their own size."""
    size, parallel = LAYOUTS[layout]
    assert_same_records(run(pool, tmp_path, data_dir, size, parallel, "mllama", kind), one_rank[kind])


def test_frozen_encoder_and_pipeline(pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: dict[str, list[dict[str, Any]]]) -> None:
    assert_same_records(run(pool, tmp_path, data_dir, 2, {"pipeline": 2}, "flamingo", **ENCODER_FROZEN), one_rank["frozen"])


def test_pictures_matter(one_rank: dict[str, list[dict[str, Any]]]) -> None:
    """Guards the comparisons above: pictures are there, styles differ, and so does a frozen encoder."""
    assert one_rank["mllama"][0]["tiles"] > 0
    assert len({records[-1]["loss"] for records in one_rank.values()}) == len(one_rank)


def names(style: str) -> set[str]:
    chunks, ctx = built(model_of(style), {})
    return {tensor.key for tensor in sharded_tensors(chunks, ctx)}


def test_checkpoint_keys(pool: RankPool) -> None:
    found = {key for key in pool.run(names, "mllama")[0] if key.startswith("language.decoder.layers.1.")}
    assert {key.removeprefix("language.decoder.layers.1.") for key in found} == {
        "input_layernorm.weight",
        *(f"self_attention.linear_{x}.weight" for x in ("q", "k", "v", "proj")),
        "self_attention.query_norm.weight",
        "self_attention.key_norm.weight",
        "self_attention.linear_proj.post.gate",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
        "mlp.linear_fc2.post.gate",
    }
