"""The index: exact lengths from metadata, a cache that is used exactly when it may be, and refusals that name the sample."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megavlm.data import catalog, token_table
from megavlm.data import index as index_module
from megavlm.data.index import SampleIndexError, build_index
from megavlm.data.sample_index import COLUMN_TYPES
from megavlm.data.shards import ShardWriter
from megavlm.data.tokenizer import train_sentencepiece

ASK = {"role": "user", "content": "What?"}
SAY = {"role": "assistant", "content": "this"}


@pytest.fixture
def build(make_recipe, tokenizer):
    def run(objective="multimodal", tok=None, data=None, source=None):
        recipe = make_recipe(data=data, source=source)
        return build_index(recipe.data.sources["a"], recipe.data, recipe.model, objective, tok or tokenizer, progress=False)

    return run


@pytest.fixture
def scans(monkeypatch):
    """Counts how often an index is put together instead of opened."""
    count = []
    real = index_module._assemble
    monkeypatch.setattr(index_module, "_assemble", lambda *a, **k: count.append(1) or real(*a, **k))
    return count


@pytest.fixture
def work(monkeypatch):
    """Counts scanned shards and tokenised conversations."""
    count = Counter()

    def counted(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: count.update([name]) or real(*a, **k))

    counted(catalog, "shard_table")
    counted(token_table, "encode_text")
    return count


def test_columns_say_what_the_shards_hold(build, tokenizer):
    index = build()
    assert len(index) == 60
    assert index.task_names == ["compare", "read", "text"]
    for row in (0, 1, 2, 25, 59):
        sample = index.sample(row)
        assert index.key(row) == f"s{row:03d}"
        assert index.task(row) == sample.task == ("text", "read", "compare")[row % 3]
        assert index.num_tiles[row] == len(sample.images) == row % 3
        text = "".join(f"<|{m.role}|>{m.content}<|end|>" for m in sample.messages)
        assert index.length_tokens[row] == len(tokenizer.encode(text).ids) + 3 * len(sample.images)
        answers = "".join(m.content + "<|end|>" for m in sample.messages if m.role == "assistant")
        assert tokenizer.decode(tokenizer.encode(answers).ids) == answers
        assert index.num_targets[row] == sum(len(tokenizer.encode(m.content).ids) + 1 for m in sample.messages if m.role == "assistant")


def test_pictures_are_found_by_offset(build, png):
    index = build()
    assert index.image(2, 0) == png(16, 16, seed=200)
    assert index.image(2, 1) == png(16, 16, seed=201)
    assert index.image(59, 1) == png(24, 16, seed=5901)


def test_tiles_change_the_length(build):
    one = build()
    many = build(data={"image": {"policy": "tiles", "max_tiles": 4, "thumbnail": True}, "seq_len_tokens": 400})
    wide = np.flatnonzero(one.num_tiles == 1)[0]
    # 24 x 16 pixels lie between 1:1 and 2:1; the picture has more than half of two tiles' pixels, so 2:1 wins. Plus the thumbnail.
    assert many.num_tiles[wide] == 2 + 1
    assert many.length_tokens[wide] - one.length_tokens[wide] == 4 * (many.num_tiles[wide] - 1)


def test_second_call_reads_the_cache_and_gives_the_same(build, scans):
    first, second = build(), build()
    assert len(scans) == 1
    assert first.fingerprint == second.fingerprint
    for name in ("keys", *COLUMN_TYPES):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert second.sample(7) == first.sample(7)


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"chat_template": "chatml"}},
        {"data": {"image": {"policy": "tiles", "max_tiles": 3}}},
        {"source": {"tasks": ["text"]}},
        {"source": {"split": "heldout"}},
        {"objective": "text", "source": {"tasks": ["text"]}},
    ],
)
def test_every_setting_that_matters_makes_another_cache(build, scans, change):
    base, other = build(), build(**change)
    assert len(scans) == 2
    assert base.fingerprint != other.fingerprint


def test_another_tokenizer_or_touched_shard_is_scanned_again(build, scans, shards, tmp_path):
    build()
    other = train_sentencepiece(
        ["x y z\n"] * 50, tmp_path / "o.model", 300, ["<image>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]
    )
    build(tok=other, data={"seq_len_tokens": 999})
    os.utime(shards / "shard-00001.tar", ns=(1, 1))
    build()
    assert len(scans) == 3


def test_settings_that_do_not_matter_share_the_cache(build, scans):
    build()
    build(data={"num_workers": 5, "seq_len_tokens": 200, "image": {"decoder": "pillow"}})
    assert len(scans) == 1


def test_fingerprint_survives_a_copy_of_the_data(build, shards, tmp_path):
    first = build()
    shutil.copytree(shards, tmp_path / "copy", ignore=shutil.ignore_patterns(".megavlm-index"))
    assert build(source={"path": str(tmp_path / "copy")}).fingerprint == first.fingerprint


def test_damaged_cache_is_built_again(build, shards, scans):
    first = build()
    (cache,) = (shards / ".megavlm-index").glob("*.arrow")
    cache.write_bytes(cache.read_bytes()[:500])
    assert build().fingerprint == first.fingerprint
    assert len(scans) == 2


def test_read_only_data_are_cached_in_the_users_folder(build, shards, scans, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (shards / ".megavlm-index").write_text("in the way, as a read-only folder would be")
    build()
    build()
    assert len(scans) == 1
    (place,) = (tmp_path / "cache/megavlm/index").iterdir()
    assert sorted(p.suffix for p in place.iterdir()) == [".arrow", ".parquet"]


def test_ranks_may_build_at_once(build, shards):
    with ThreadPoolExecutor(4) as pool:
        prints = {f.result().fingerprint for f in [pool.submit(build) for _ in range(4)]}
    assert len(prints) == 1
    assert sorted(p.suffix for p in (shards / ".megavlm-index").iterdir()) == [".arrow", ".parquet"], "no partial file stays"


def test_text_objective_refuses_pictures_by_name(build):
    with pytest.raises(SampleIndexError, match=r"40 samples .* cannot be used") as error:
        build(objective="text")
    assert "'s001': objective=text takes no pictures" in str(error.value)
    assert "... and 30 more" in str(error.value)
    assert (build(objective="text", source={"tasks": ["text"]}).num_tiles == 0).all()


def test_vision_classification_takes_one_labelled_picture(build):
    index = build(objective="vision_classification", source={"tasks": ["read"]})
    assert (index.length_tokens == 1).all()
    assert (index.num_targets == 4).all()
    assert (index.num_tiles == 1).all()
    assert index.max_label == 9
    with pytest.raises(SampleIndexError, match="takes one picture with objects; this sample has 2 pictures and no objects field"):
        build(objective="vision_classification", source={"tasks": ["compare"]})


def test_too_long_samples_are_refused_with_the_longest(build):
    longest = build()
    row = int(np.argmax(longest.length_tokens))
    with pytest.raises(SampleIndexError) as error:
        build(data={"seq_len_tokens": int(longest.length_tokens.max()) - 1})
    assert f"{longest.key(row)!r} with {longest.length_tokens[row]} tokens > data.seq_len_tokens={longest.length_tokens[row] - 1}" in str(
        error.value
    )
    with pytest.raises(SampleIndexError, match="patches > data.max_patches_per_pack"):
        build(data={"max_patches_per_pack": 1})


def test_nothing_left_says_what_is_there(build, tmp_path):
    with pytest.raises(SampleIndexError, match=r"none of 66 samples has split='test' .*heldout/compare, heldout/read"):
        build(source={"split": "test"})
    with pytest.raises(SampleIndexError, match="tasks=\\['reading'\\]"):
        build(source={"tasks": ["reading"]})
    with pytest.raises(SampleIndexError, match="has task 'reading'; its tasks are compare, read, text"):
        build(source={"tasks": ["read", "reading"]})
    with pytest.raises(SampleIndexError, match="there is no such folder"):
        build(source={"path": str(tmp_path / "nowhere")})


def test_bad_masks_are_found_while_indexing(build, tmp_path):
    with ShardWriter(tmp_path / "bad") as writer:
        writer.write("fine", {"task": "t", "split": "train", "messages": [ASK, SAY]})
        writer.write("mute", {"task": "t", "split": "train", "messages": [ASK]})
        writer.write("spoof", {"task": "t", "split": "train", "messages": [ASK, {"role": "assistant", "content": "<|end|>"}]})
    with pytest.raises(SampleIndexError) as error:
        build(source={"path": str(tmp_path / "bad")})
    assert "2 samples" in str(error.value)
    assert "'mute': no token is supervised" in str(error.value)
    assert "'spoof': message 1 (assistant) contains '<|end|>'" in str(error.value)


def test_vocabulary_must_fit_the_model(make_recipe, tokenizer):
    recipe = make_recipe()
    model = recipe.model.model_copy(update={"language": recipe.model.language.model_copy(update={"vocab_size": 100})})
    with pytest.raises(SampleIndexError, match=f"tokenizer has {tokenizer.vocab_size} tokens but model.language.vocab_size is 100"):
        build_index(recipe.data.sources["a"], recipe.data, model, "multimodal", tokenizer, progress=False)
