"""Placeholders == features, for random mixtures of samples under every picture policy, and each takes the features of its own picture."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megavlm.config.schema import Recipe
from megavlm.data.index import build_index
from megavlm.data.materialise import Materialiser
from megavlm.data.plan import StepPlanner
from megavlm.data.resizing import make_resizing, plan_pictures
from megavlm.data.shards import ShardWriter
from megavlm.data.types import PackPlan, SampleRef
from megavlm.planner.flops import VisionWork

SIDE, PATCH = 16, 4
TOLERANCE = 2  # of 256 levels, after resizing a flat colour

fixed = st.fixed_dictionaries({"policy": st.just("fixed"), "fit": st.sampled_from(["stretch", "crop", "pad"])})
tiles = st.fixed_dictionaries({"policy": st.just("tiles"), "max_tiles": st.integers(1, 6), "thumbnail": st.booleans()})
anyres = st.fixed_dictionaries({"policy": st.just("anyres")})
native = st.fixed_dictionaries({"policy": st.just("native"), "max_tokens_per_image": st.sampled_from([None, 4, 30])})
by_edges = st.fixed_dictionaries(
    {
        "policy": st.just("native"),
        "whole_patches": st.sampled_from(["stretch", "cut"]),
        "longest_edge_px": st.sampled_from([30, 40]),
        "shortest_edge_px": st.sampled_from([None, 18]),
    }
)
split = st.fixed_dictionaries({"policy": st.just("split"), "longest_edge_px": st.sampled_from([16, 40, 64])})
caps = st.sampled_from([None, 260])
sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))
conversation = st.lists(st.lists(sizes, max_size=2), min_size=1, max_size=3)
"""A list per user turn of the pictures in it."""


def colour(number):
    return 30 + 7 * (number % 30)


def png(size, level):
    file = io.BytesIO()
    Image.new("L", size, level).save(file, "PNG")
    return file.getvalue()


def write(folder, conversations):
    number = 0
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for i, turns in enumerate(conversations):
            messages, pictures = [], []
            for turn in turns:
                places = "".join(f"see <image> {k}" for k in range(len(turn)))
                messages += [{"role": "user", "content": f"{places} what?"}, {"role": "assistant", "content": f"number {i}"}]
                for size in turn:
                    pictures.append(png(size, colour(number)))
                    number += 1
            writer.write(f"s{i}", {"task": "t", "split": "train", "messages": messages}, pictures)


def recipe_of(folder, tokenizer, image, shuffle, newline, latents=None):
    vision = {"image_size_px": SIDE, "patch_size_px": PATCH, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    vision |= {"class_token": False}
    projector = {"pixel_shuffle": shuffle, "image_newline": newline}
    if latents is not None:
        projector |= {"kind": "perceiver", "bias": False, "resampler": {"num_latents": latents}}
    return Recipe.model_validate(
        {
            "run": {"dir": str(folder / "run")},
            "model": {"vision": vision, "projector": projector},
            "data": {
                "sources": {"a": {"path": str(folder / "shards")}},
                "tokenizer": str(tokenizer.path),
                "image": image,
                "seq_len_tokens": 4096,
                "pack_window_samples": 8,
            },
            "stages": [{"name": "s", "steps": 1, "packs_per_step": 1, "mixture": {"a": {"weight": 1}}}],
        }
    )


def features_of(batch, model):
    """(rows of the projector's output, colour of each): what the model makes of the pixels, told by the brightest pixel it sees."""
    if batch.tile_grids is not None:
        areas = [3 * rows * columns * PATCH**2 for rows, columns in batch.tile_grids]
        pictures = batch.pixels_X.split(areas) if areas else []
        rows = [model.visual_tokens(r, c) for r, c in batch.tile_grids]
        return np.repeat([int(p.max()) for p in pictures], rows)
    if batch.tiles_TCHW is None:
        return np.zeros(0, dtype=int)
    return np.repeat(batch.tiles_TCHW.amax((1, 2, 3)).tolist(), model.visual_tokens_per_tile)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    image=st.one_of(fixed, tiles, anyres, native, by_edges, split),
    cap=caps,
    latents=st.sampled_from([None, None, 3]),
    shuffle=st.sampled_from([1, 2]),
    newline=st.booleans(),
    conversations=st.lists(conversation, min_size=1, max_size=4),
)
def test_placeholders_are_features_of_their_own_pictures(tokenizer, image, cap, latents, shuffle, newline, conversations):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "shards", conversations)
        if image["policy"] != "fixed":
            image = image | {"max_tokens_per_sample": cap}
        latents = None if image["policy"] == "anyres" else latents
        recipe = recipe_of(folder, tokenizer, image, shuffle, newline and image["policy"] == "anyres", latents)
        indexes = {"a": build_index(recipe.data.sources["a"], recipe.data, recipe.model, "multimodal", tokenizer, progress=False)}
        planner = StepPlanner(indexes, recipe.stages[0], recipe.data, recipe.model, seed=1, dp_size=1, num_microbatches=1)
        ((packs,),) = planner.next().assignment
        batch = Materialiser(recipe, recipe.stages[0], indexes, tokenizer, needs_tiles=True)(packs)
        bare = Materialiser(recipe, recipe.stages[0], indexes, tokenizer, needs_tiles=False)(packs)
    work, model = packs[0].vision, recipe.model
    assert batch.num_bad_samples == 0
    assert (batch.tokens_S == tokenizer.image_token_id).nonzero().ravel().tolist() == batch.image_positions_N.tolist()
    # What the plan says, the grids, the pixels and the rows that the model computes from them: one number each way.
    assert batch.num_tiles == work.tiles
    features = features_of(batch, model)
    assert len(features) == (work.patches // shuffle**2 if latents is None else work.tiles * latents)
    taken = np.arange(len(features)) if batch.feature_rows_N is None else batch.feature_rows_N.numpy()
    assert len(taken) == len(batch.image_positions_N)
    # Each placeholder takes a feature of the picture that stands there.
    first_picture = np.cumsum([0] + [sum(map(len, turns)) for turns in conversations])
    wanted, planned = [], []
    for ref in (s for s in batch.segment_samples if s is not None):
        pictures = [size for turn in conversations[ref.row] for size in turn]
        grids = plan_pictures(pictures, make_resizing(recipe.data.image, model), recipe.data.image)
        planned += [(grid.rows, grid.cols) for grid in grids]
        wanted += [colour(int(first_picture[ref.row]) + k) for k, grid in enumerate(grids) for _ in range(grid.tokens)]
    assert len(wanted) == len(taken)
    assert batch.tile_grids == (planned if image["policy"] == "native" else None)
    ends = taken < 0
    assert newline or not ends.any()
    if len(features):
        off = np.abs(np.asarray(wanted) - features[taken])[~ends]
        limit = TOLERANCE if image.get("fit") != "pad" else 130  # bright padding round a dark picture
        assert off.max(initial=0) <= limit
    # Ranks without an encoder know all but the pixels.
    assert bare.tiles_TCHW is None
    assert bare.pixels_X is None
    assert (bare.num_tiles, bare.tile_grids) == (batch.num_tiles, batch.tile_grids)
    if batch.feature_rows_N is not None:
        assert torch.equal(bare.feature_rows_N, batch.feature_rows_N)


@pytest.mark.parametrize(
    ("image", "num_values"),
    [({"policy": "tiles", "max_tiles": 6}, 6 * 3 * SIDE**2), ({"policy": "native"}, 3 * 8 * 12 * PATCH**2), ({"policy": "anyres"}, None)],
)
def test_unreadable_pictures_keep_the_shape_of_readable_ones(tokenizer, tmp_path, image, num_values):
    write(tmp_path / "shards", [[[(48, 32)]], [[(20, 20)]]])
    recipe = recipe_of(tmp_path, tokenizer, image, 1, image["policy"] == "anyres")
    indexes = {"a": build_index(recipe.data.sources["a"], recipe.data, recipe.model, "multimodal", tokenizer, progress=False)}
    index = indexes["a"]
    lengths = tuple(int(n) for n in index.length_tokens)
    work = VisionWork(*(int(column.sum()) for column in (index.num_tiles, index.num_patches, index.patch_pairs)))
    packs = [PackPlan((SampleRef("a", 0), SampleRef("a", 1)), lengths, work, int(index.num_targets.sum()), 0.0)]
    materialise = Materialiser(recipe, recipe.stages[0], indexes, tokenizer, needs_tiles=True)
    before = materialise(packs)
    path = tmp_path / "shards" / "shard-00000.tar"
    path.write_bytes(path.read_bytes().replace(png((48, 32), colour(0)), b"\0" * len(png((48, 32), colour(0)))))
    after = materialise(packs)
    assert after.num_bad_samples == 1
    pixels = ("tiles_TCHW", "pixels_X")
    for field in ("tokens_S", "image_positions_N", "feature_rows_N", *pixels):
        old, new = getattr(before, field), getattr(after, field)
        assert (old is None) == (new is None)
        assert old is None or (old.shape == new.shape and (field in pixels or torch.equal(old, new)))
    changed = next(getattr(before, f) != getattr(after, f) for f in pixels if getattr(before, f) is not None)
    assert num_values is None or int(changed.sum()) == num_values, "grey where the picture was, and nothing else"
    lost = [i for i, s in enumerate(after.segment_samples) if s is not None and s.row == 0]
    assert set(after.target_weights_Q[after.target_segments_Q == lost[0]].tolist()) == {0.0}
