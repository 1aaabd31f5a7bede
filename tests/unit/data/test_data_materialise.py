"""Packs become tensors: layout, targets, tiles, unreadable pictures, patch labels."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.data.index import build_index
from megavlm.data.materialise import MaterialiseError, Materialiser, patch_labels
from megavlm.data.shards import Sample, ShardWriter
from megavlm.data.types import PackPlan, SampleRef
from megavlm.planner.flops import VisionWork


def indexes_of(recipe, tokenizer, objective="multimodal"):
    return {n: build_index(s, recipe.data, recipe.model, objective, tokenizer, progress=False) for n, s in recipe.data.sources.items()}


def pack(indexes, *rows):
    index = indexes["a"]
    lengths = tuple(int(index.length_tokens[r]) for r in rows)
    columns = (index.num_tiles, index.num_patches, index.patch_pairs, index.num_targets)
    *work, targets = (int(column[list(rows)].sum()) for column in columns)
    return PackPlan(tuple(SampleRef("a", r) for r in rows), lengths, VisionWork(*work), targets, 0.0)


@pytest.fixture
def setup(make_recipe, tokenizer):
    recipe = make_recipe()
    indexes = indexes_of(recipe, tokenizer)
    return recipe, indexes, Materialiser(recipe, recipe.stages[0], indexes, tokenizer, needs_tiles=True)


def damage(shards, name):
    """Overwrite a member's bytes behind its header, size unchanged: what a bad disk does."""
    for path in sorted(shards.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            found = [m for m in tar if m.name == name]
        if found:
            with open(path, "r+b") as file:
                file.seek(found[0].offset_data)
                file.write(b"\0" * found[0].size)
            return
    raise AssertionError(name)


def test_layout_of_two_packs(setup, tokenizer):
    _, indexes, materialise = setup
    batch = materialise([pack(indexes, 0, 1), pack(indexes, 2)])
    n0, n1, n2 = (int(indexes["a"].length_tokens[r]) for r in (0, 1, 2))
    assert batch.segment_lengths == [n0, n1, 96 - n0 - n1, n2, 96 - n2]
    assert batch.segment_samples == [SampleRef("a", 0), SampleRef("a", 1), None, SampleRef("a", 2), None]
    assert batch.segment_tasks == ["text", "read", "", "compare", ""]
    assert batch.num_tokens == 192
    assert batch.num_useful_tokens == n0 + n1 + n2
    assert batch.positions_S.tolist() == [p for n in batch.segment_lengths for p in range(n)]
    assert batch.tokens_S[n0 + n1 : 96].tolist() == [tokenizer.pad_id] * (96 - n0 - n1)
    assert batch.num_tiles == 3
    assert batch.tiles_TCHW.shape == (3, 3, 16, 16)
    assert batch.metadata["keys"] == ["s000", "s001", "s002"]
    assert (batch.num_bad_samples, batch.metadata["bad_samples"]) == (0, [])


def test_targets_are_the_next_tokens_of_their_segment_and_decode_to_the_answers(setup, tokenizer):
    _, indexes, materialise = setup
    rows = (4, 1, 2, 8)
    batch = materialise([pack(indexes, 4, 1), pack(indexes, 2, 8)])
    starts = np.concatenate([[0], np.cumsum(batch.segment_lengths)])
    at, segment = batch.target_positions_Q, batch.target_segments_Q
    assert (at.diff() > 0).all()
    assert torch.equal(batch.tokens_S[at + 1], batch.target_ids_Q)
    owner = torch.from_numpy(np.searchsorted(starts, (at + 1).numpy(), side="right") - 1)
    assert torch.equal(owner, segment), "row and predicted token lie in the segment that is named"
    assert torch.equal(torch.from_numpy(np.searchsorted(starts, at.numpy(), side="right") - 1), segment)
    samples = [i for i, s in enumerate(batch.segment_samples) if s is not None]
    for number, row in zip(samples, rows, strict=True):
        wanted = "".join(m.content + "<|end|>" for m in indexes["a"].sample(row).messages if m.role == "assistant")
        assert tokenizer.decode(batch.target_ids_Q[segment == number].tolist()) == wanted
    weights = {number: set(batch.target_weights_Q[segment == number].tolist()) for number in samples}
    assert list(weights.values()) == [{1.0}, {0.5}, {1.0}, {1.0}]
    assert batch.target_weights_Q.dtype == torch.float32


def test_image_rows_hold_the_pictures_of_the_samples_in_order(setup, tokenizer, png):
    _, indexes, materialise = setup
    batch = materialise([pack(indexes, 2, 0), pack(indexes, 4)])
    assert torch.equal(batch.image_positions_N, (batch.tokens_S == tokenizer.image_token_id).nonzero().ravel())
    assert len(batch.image_positions_N) == 4 * batch.num_tiles
    for tile, seed in zip(batch.tiles_TCHW, (200, 201, 400), strict=True):
        original = np.asarray(Image.open(io.BytesIO(png(16, 16, seed=seed))))
        np.testing.assert_array_equal(tile.permute(1, 2, 0).numpy(), original)


@pytest.mark.parametrize(("averaging", "power"), [("token", 0), ("square", -0.5), ("sample", -1)])
def test_a_targets_weight_is_the_samples_times_sources_times_tasks(make_recipe, tokenizer, averaging, power):
    loss = {"averaging": averaging, "task_weights": {"read": 0.25, "absent": 9.0}}
    recipe = make_recipe(stage={"loss": loss}, source={"loss_weight": 3.0})
    indexes = indexes_of(recipe, tokenizer)
    batch = Materialiser(recipe, recipe.stages[0], indexes, tokenizer, needs_tiles=True)([pack(indexes, 0, 1, 2)])
    for segment, weight in enumerate((3.0, 0.5 * 3.0 * 0.25, 3.0)):  # s001 has weight 0.5 and task "read"
        found = batch.target_weights_Q[batch.target_segments_Q == segment]
        torch.testing.assert_close(found, torch.full_like(found, weight * len(found) ** power))


def test_targets_of_a_picture_cut_short_do_not_count(make_recipe, tokenizer, tmp_path, png):
    """Its header is whole, so it is indexed; a decoder may fill the rest with grey, and the text would be learned without its picture."""
    whole, other = png(64, 48, fmt="JPEG"), png(16, 16)
    talk = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]
    with ShardWriter(tmp_path / "b") as writer:
        writer.write("cut", {"task": "t", "split": "train", "messages": talk}, [whole[: len(whole) * 2 // 3]])
        writer.write("whole", {"task": "t", "split": "train", "messages": talk}, [other])
    recipe = make_recipe(source={"path": str(tmp_path / "b")})
    indexes = indexes_of(recipe, tokenizer)
    batch = Materialiser(recipe, recipe.stages[0], indexes, tokenizer, needs_tiles=True)([pack(indexes, 0, 1)])
    assert [r["key"] for r in batch.metadata["bad_samples"]] == ["cut"]
    assert (batch.target_weights_Q > 0).tolist() == (batch.target_segments_Q == 1).tolist()
    assert set(batch.target_segments_Q.tolist()) == {0, 1}


def test_ranks_without_encoder_get_everything_but_tiles(setup, tokenizer):
    recipe, indexes, with_tiles = setup
    plan = [pack(indexes, 2, 1)]
    for check in (True, False):
        bare = Materialiser(recipe, recipe.stages[0], indexes, tokenizer, needs_tiles=False, check_images=check)(plan)
        full = with_tiles(plan)
        assert bare.tiles_TCHW is None
        assert bare.num_tiles == full.num_tiles == 3
        for name in ("tokens_S", "target_positions_Q", "target_ids_Q", "target_weights_Q", "image_positions_N"):
            assert torch.equal(getattr(bare, name), getattr(full, name))


def test_text_only_batch_has_no_tiles(setup):
    _, indexes, materialise = setup
    batch = materialise([pack(indexes, 0, 3)])
    assert batch.num_tiles == 0
    assert batch.tiles_TCHW is None
    assert len(batch.image_positions_N) == 0


def test_unreadable_picture_costs_its_sample_and_nothing_else(setup, shards, tokenizer):
    recipe, indexes, materialise = setup
    plan = [pack(indexes, 1, 2, 4)]
    before = materialise(plan)
    damage(shards, "s002.1.png")
    after = materialise(plan)
    assert torch.equal(after.tokens_S, before.tokens_S)
    assert torch.equal(after.target_positions_Q, before.target_positions_Q)
    lost = after.target_segments_Q == 1
    assert (after.target_weights_Q[lost] == 0).all()
    assert torch.equal(after.target_weights_Q[~lost], before.target_weights_Q[~lost])
    assert (after.tiles_TCHW[1:3] == 127).all(), "both pictures of the sample are grey"
    assert torch.equal(after.tiles_TCHW[[0, 3]], before.tiles_TCHW[[0, 3]])
    assert after.num_bad_samples == 1
    (record,) = after.metadata["bad_samples"]
    assert (record["source"], record["key"]) == ("a", "s002")
    assert record["reason"].startswith("s002.1.png: ")
    last_stage = Materialiser(recipe, recipe.stages[0], indexes, tokenizer, needs_tiles=False)(plan)
    assert torch.equal(last_stage.target_weights_Q, after.target_weights_Q), "the loss is computed where no encoder is"


def test_picture_of_another_size_than_its_metadata_is_bad(make_recipe, tokenizer, tmp_path, png):
    folder = tmp_path / "b"
    with ShardWriter(folder) as writer:
        talk = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]
        writer.write("k", {"task": "t", "split": "train", "messages": talk}, [png(16, 16)])
    path = folder / "shard-00000.tar"
    path.write_bytes(path.read_bytes().replace(b'"width":16', b'"width":17'))
    recipe = make_recipe(source={"path": str(folder)})
    indexes = indexes_of(recipe, tokenizer)
    batch = Materialiser(recipe, recipe.stages[0], indexes, tokenizer, needs_tiles=True)([pack(indexes, 0)])
    assert "16x16 pixels, its metadata say 17x16" in batch.metadata["bad_samples"][0]["reason"]


def test_shards_changed_after_indexing_are_an_error(setup, shards):
    _, indexes, materialise = setup
    plan = pack(indexes, 0)
    path = shards / "shard-00000.tar"
    path.write_bytes(path.read_bytes().replace(b"What number 0?", b"Number,number?", 1))
    with pytest.raises(MaterialiseError, match="'s000' has .* the shards changed"):
        materialise([plan])


def test_tiles_of_a_cut_picture_match_the_plan(make_recipe, tokenizer):
    recipe = make_recipe(data={"image": {"policy": "tiles", "max_tiles": 4, "thumbnail": True}, "seq_len_tokens": 256})
    indexes = indexes_of(recipe, tokenizer)
    batch = Materialiser(recipe, recipe.stages[0], indexes, tokenizer, needs_tiles=True)([pack(indexes, 1, 2)])
    assert batch.num_tiles == len(batch.tiles_TCHW) == int(indexes["a"].num_tiles[[1, 2]].sum()) > 3
    assert len(batch.image_positions_N) == 4 * batch.num_tiles


# ---------------------------------------------------------------------------------------------- vision_classification


@pytest.fixture
def classify(make_recipe, tokenizer):
    def make(num_classes=11):
        stage = {"objective": "vision_classification", "num_classes": num_classes, "images_per_pack": 4}
        recipe = make_recipe(stage=stage, source={"tasks": ["read"]})
        indexes = indexes_of(recipe, tokenizer, "vision_classification")
        return indexes, Materialiser(recipe, recipe.stages[0], indexes, tokenizer, needs_tiles=True)

    return make


def test_patches_are_the_rows_of_vision_classification(classify, shards):
    indexes, materialise = classify()
    batch = materialise([pack(indexes, 0, 1), pack(indexes, 2)])
    assert batch.num_tiles == 3
    assert batch.tiles_TCHW.shape == (3, 3, 16, 16)
    assert batch.segment_lengths == [4, 4, 4]
    assert (batch.tokens_S == 0).all()
    assert batch.image_positions_N.tolist() == batch.target_positions_Q.tolist() == list(range(12))
    assert batch.target_segments_Q.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    # Samples s001, s004, s007 have the box (0, 0, 8, 8); the wide ones are 24 pixels across, so that the box covers a third.
    assert batch.target_ids_Q.tolist() == [1, 10, 10, 10, 4, 10, 10, 10, 7, 10, 10, 10]
    assert batch.target_weights_Q.tolist() == [0.5] * 4 + [1.0] * 8
    damage(shards, "s004.0.png")
    assert materialise([pack(indexes, 0, 1)]).target_weights_Q.tolist() == [0.5] * 4 + [0.0] * 4


def test_labels_beyond_num_classes_are_refused(classify):
    with pytest.raises(MaterialiseError, match=r"labels up to 9, but stage 's' has num_classes=10, .* set num_classes=11"):
        classify(10)


def test_patch_labels_follow_centres_and_smaller_boxes_win():
    sample = Sample.model_validate(
        {
            "task": "t",
            "split": "train",
            "images": [{"file": "k.0.png", "width": 64, "height": 32}],
            "objects": [
                {"image": 0, "label": 1, "box_px": [8, 4, 24, 12]},
                {"image": 0, "label": 0, "box_px": [0, 0, 32, 32]},
            ],
        }
    )
    # Scaled to 32 x 32: box 1 covers x 4..12, y 4..12 (centres 4 and 12 of 8-pixel patches: the lower edge counts), box 0 x 0..16.
    labels = patch_labels(sample, 32, 8, background=9).reshape(4, 4)
    assert labels.tolist() == [[1, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 9]]
