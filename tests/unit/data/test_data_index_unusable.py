"""Samples that cannot be used, half data sets, stale indexes: told by name, left out only where the recipe says so."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile

import pytest

from megavlm.data.catalog import build_catalog
from megavlm.data.index import SampleIndexError, build_index
from megavlm.data.materialise import MaterialiseError, Materialiser
from megavlm.data.shards import ShardError, ShardWriter
from megavlm.data.types import PackPlan, SampleRef
from megavlm.planner.flops import VisionWork


def sample(text="What?", answer="number 1", **more):
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"task": "t", "split": "train", "messages": turns, **more}


@pytest.fixture
def build(make_recipe, tokenizer):
    def run(folder, **data):
        recipe = make_recipe(source={"path": str(folder)}, data=data)
        return recipe, build_index(recipe.data.sources["a"], recipe.data, recipe.model, "multimodal", tokenizer, progress=False)

    return run


def tar(path, members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def test_unusable_samples_are_refused_or_dropped_counted_and_listed(tmp_path, png, build, caplog):
    folder = tmp_path / "some"
    with ShardWriter(folder, samples_per_shard=3) as writer:
        writer.write("good", sample("<image>\nWhat?"), [png(16, 16)])
        writer.write("line", sample("<image>\nWhat?"), [png(1, 2000)])
        writer.write("token", sample("What? <|end|>"))
        writer.write("last", sample("Sure?"))
    lines = [("wrong.json", b"{}"), ("away.json", json.dumps(sample("<image>", images=[{"file": "x", "width": 9, "height": 9}])).encode())]
    tar(folder / "shard-00009.tar", lines)
    native = {"image": {"policy": "native"}, "over_long": ["lower_resolution", "split_turns", "drop"]}
    with pytest.raises(SampleIndexError, match="2 samples"):
        build(folder, **native)
    with caplog.at_level(logging.WARNING, "megavlm"):
        _, index = build(folder, **native, unusable="drop")
    assert [index.key(row) for row in range(len(index))] == ["good", "last"]
    assert index.notes == {"lowered": 0, "split": 0, "dropped": 0, "unusable": 4}
    assert index.messages(1)[0]["content"] == "Sure?"
    assert len(index.grids(0)) == 1
    listed = index.file.with_suffix(".unusable.jsonl")
    assert {json.loads(line)["key"] for line in listed.read_text().splitlines()} == {"line", "token", "wrong", "away"}
    assert all(json.loads(line)["reason"] for line in listed.read_text().splitlines())
    assert str(listed) in caplog.text
    assert "sample 'token'" in caplog.text
    caplog.clear()
    _, again = build(folder, **native, unusable="drop")
    assert (again.notes, again.fingerprint) == (index.notes, index.fingerprint)
    assert "sample 'token'" not in caplog.text
    with pytest.raises(SampleIndexError, match="cannot be used"):
        build(folder, **native)


def test_both_commands_print_the_note(tmp_path, make_recipe, tokenizer, capsys):
    import yaml

    from megavlm.cli.data import index as index_command
    from megavlm.cli.data_inspect import stats

    with ShardWriter(tmp_path / "some") as writer:
        for i in range(40):
            writer.write(f"k{i}", sample(f"What {i}? {'<|end|>' if i < 3 else ''}"))
    recipe = make_recipe(source={"path": str(tmp_path / "some")}, data={"unusable": "drop"})
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    index_command(path)
    assert "3 unusable" in capsys.readouterr().out
    stats(path, steps=1, out=tmp_path / "stats")
    assert "3 samples left out as unusable" in capsys.readouterr().out


def test_a_data_set_of_nothing_usable_is_refused_even_so(tmp_path, build):
    with ShardWriter(tmp_path / "none") as writer:
        writer.write("token", sample("What? <|end|>"))
    with pytest.raises(SampleIndexError, match="1 samples .* cannot be used"):
        build(tmp_path / "none", unusable="drop")


def test_a_samples_weight_is_in_the_fingerprint(tmp_path, build):
    prints = []
    for name, weight in (("one", 1.0), ("two", 0.001), ("three", 1.0)):
        with ShardWriter(tmp_path / name) as writer:
            writer.write("a", sample(weight=weight))
        prints.append(build(tmp_path / name)[1].fingerprint)
    assert prints[0] == prints[2] != prints[1]


def test_half_a_data_set_is_not_indexed(shards):
    (shards / ".prepare").mkdir()
    (shards / ".prepare" / "names.json").write_text("{}")
    with pytest.raises(ShardError, match="half a data set.*Run the same command again"):
        build_catalog(shards, progress=False)
    (shards / ".prepare" / "names.json").rename(shards / ".prepare" / "named.json")
    assert len(build_catalog(shards, progress=False)) == 66


def test_a_member_whose_name_is_not_utf8_is_named(tmp_path):
    tar(tmp_path / "odd" / "shard-00000.tar", [("caf\xe9.json", json.dumps(sample()).encode())])
    with pytest.raises(ShardError, match=r"caf\\xe9.json' is not UTF-8"):
        build_catalog(tmp_path / "odd", progress=False)


def test_keys_have_a_length(tmp_path, build):
    with pytest.raises(ShardError, match="256 bytes, the most is 255"), ShardWriter(tmp_path / "long") as writer:
        writer.write("k" * 256, sample())
    tar(tmp_path / "their" / "shard-00000.tar", [(f"{'k' * 4000}.json", json.dumps(sample()).encode())])
    with pytest.raises(SampleIndexError, match="its key has 4000 bytes, the most is 255"):
        build(tmp_path / "their")


@pytest.mark.parametrize("images", [0, 2])
def test_another_text_of_equal_length_under_the_same_size_and_time_stops_training(tmp_path, png, build, tokenizer, images):
    folder = tmp_path / "stale"
    with ShardWriter(folder) as writer:
        writer.write("a", sample("<image>\n" * images + "What?", "number 1"), [png(16, 16)] * images)
    recipe, index = build(folder, image={"policy": "native"})
    work = VisionWork(*(int(c[0]) for c in (index.num_tiles, index.num_patches, index.patch_pairs)))
    pack = PackPlan((SampleRef("a", 0),), (int(index.length_tokens[0]),), work, int(index.num_targets[0]), 0.0)
    materialise = Materialiser(recipe, recipe.stages[0], {"a": index}, tokenizer, needs_tiles=True)
    assert materialise([pack]).num_bad_samples == 0
    shard = folder / "shard-00000.tar"
    was = shard.stat()
    shard.write_bytes(shard.read_bytes().replace(b"number 1", b"number 9"))
    os.utime(shard, ns=(was.st_atime_ns, was.st_mtime_ns))
    _, stale = build(folder, image={"policy": "native"})
    assert stale.fingerprint == index.fingerprint, "nobody can see it from outside"
    with pytest.raises(MaterialiseError, match="another text than when it was indexed"):
        Materialiser(recipe, recipe.stages[0], {"a": stale}, tokenizer, needs_tiles=True)([pack])
