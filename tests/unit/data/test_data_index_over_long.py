"""data.over_long: whatever lengths and budgets are, what is indexed fits, nothing is lost or doubled, every piece shows its pictures."""

from __future__ import annotations

import shutil
import uuid
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megavlm.data.chat import Chat
from megavlm.data.index import SampleIndexError, build_index
from megavlm.data.over_long import turn_groups
from megavlm.data.resizing import ResizingError, make_resizing, plan_pictures
from megavlm.data.sample import Sample, parse_sample
from megavlm.data.shards import ShardWriter, scan_shard, shard_paths

DONE: Counter[str] = Counter()
POLICIES = ["lower_resolution", "split_turns", "drop"]
TILES = {"policy": "tiles", "max_tiles": 6, "thumbnail": True}
WORDS = st.integers(1, 12).map(lambda n: " ".join(["number", "page", "see"][i % 3] for i in range(n)))


@st.composite
def conversations(draw):
    """Messages and the sizes of their pictures."""
    messages, sizes = [], []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(WORDS)})
    for _ in range(draw(st.integers(1, 5))):
        shown = draw(st.integers(0, 2))
        sizes += [(draw(st.integers(8, 64)), draw(st.integers(8, 64))) for _ in range(shown)]
        messages.append({"role": "user", "content": "<image>\n" * shown + draw(WORDS)})
        messages.append({"role": "assistant", "content": draw(WORDS)})
    return messages, sizes


def write(folder, talks, png):
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for i, (messages, sizes) in enumerate(talks):
            pictures = [png(w, h, seed=10 * i + k) for k, (w, h) in enumerate(sizes)]
            writer.write(f"s{i}", {"task": "t", "split": "train", "messages": messages}, pictures)


def originals(folder) -> dict[str, Sample]:
    return {raw.key: parse_sample(raw.text, raw.key) for path in shard_paths(folder) for raw in scan_shard(path, with_json=True)}


@pytest.fixture
def build(make_recipe, tokenizer):
    def run(folder, **data):
        recipe = make_recipe(data=data, source={"path": str(folder)})
        return build_index(recipe.data.sources["a"], recipe.data, recipe.model, "multimodal", tokenizer, progress=False), recipe

    return run


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    talks=st.lists(conversations(), min_size=1, max_size=4),
    policies=st.permutations(POLICIES[:2]).flatmap(lambda p: st.integers(0, 2).map(lambda n: [*p[:n], "drop"])),
    seq_len=st.integers(40, 120),
    max_patches=st.one_of(st.none(), st.none(), st.integers(8, 60)),
    native=st.booleans(),
)
def test_everything_fits_and_nothing_is_lost_or_doubled(tmp_path, png, build, tokenizer, talks, policies, seq_len, max_patches, native):
    folder = tmp_path / uuid.uuid4().hex
    write(folder, talks, png)
    data = {
        "over_long": policies,
        "seq_len_tokens": seq_len,
        "max_patches_per_pack": max_patches,
        "image": {"policy": "native", "min_tokens_per_image": 1} if native else TILES,
    }
    try:
        index, recipe = build(folder, **data)
    except SampleIndexError as error:
        if f"left out all {len(talks)} samples" in str(error):
            DONE["dropped"] += len(talks)
            return
        raise
    DONE.update(index.notes)
    chat, whole, seen = Chat("megavlm", tokenizer), originals(folder), {}
    for row in range(len(index)):
        sample, grids = index.sample(row), index.grids(row)
        encoded = chat.encode_conversation(index.messages(row), [g.tokens for g in grids])
        assert len(encoded.ids_L) == index.length_tokens[row] <= seq_len
        assert encoded.num_targets == index.num_targets[row]
        assert index.num_patches[row] == sum(g.work.patches for g in grids) <= (max_patches or 10**9)
        assert index.num_tiles[row] == sum(g.work.tiles for g in grids)
        assert index.patch_pairs[row] == sum(g.work.patch_pairs for g in grids)
        key, _, _ = index.key(row).partition("#")
        seen.setdefault(key, []).append(row)
        number = int(key[1:])
        for i, entry in enumerate(sample.images):
            original = whole[key].images.index(entry)
            assert index.image(row, i) == png(*talks[number][1][original], seed=10 * number + original)
    assert len(whole) - len(seen) == index.notes["dropped"]
    assert sum(len(rows) > 1 for rows in seen.values()) == index.notes["split"]
    for key, rows in seen.items():
        check_pieces(whole[key], index, rows)
    assert index.notes["lowered"] == sum(any(is_lowered(index, recipe, r) for r in rows) for rows in seen.values())
    shutil.rmtree(folder)


def test_the_property_test_met_every_policy():
    assert min(DONE["lowered"], DONE["split"], DONE["dropped"]) >= 5, DONE


def is_lowered(index, recipe, row):
    sizes = [(i.width, i.height) for i in index.sample(row).images]
    return index.grids(row) != plan_pictures(sizes, make_resizing(recipe.data.image, recipe.model), recipe.data.image)


def check_pieces(whole, index, rows):
    pieces = [index.sample(r) for r in rows]
    answers = [m.content for p in pieces for m in p.messages if m.role == "assistant"]
    assert answers == [m.content for m in whole.messages if m.role == "assistant"], "each answer once, in order"
    if len(rows) > 1:
        assert [index.key(r).partition("#")[2] for r in rows] == [str(i) for i in range(len(rows))]
    shown = 0
    for number, piece in enumerate(pieces):
        if whole.messages[0].role == "system":
            assert piece.messages[0] == whole.messages[0]
        own = sum(m.content.count("<image>") for m in piece.messages) - (shown if number else 0)
        shown += own
        assert piece.images == whole.images[:shown], "all pictures so far, in order"
    assert shown == len(whole.images)


def test_the_resolution_is_no_lower_than_it_must_be(tmp_path, png, build):
    talk = [{"role": "user", "content": "<image><image>What?"}, {"role": "assistant", "content": "this"}]
    write(tmp_path / "d", [(talk, [(64, 64), (64, 32)])], png)
    for image in (TILES, {"policy": "native", "min_tokens_per_image": 1}):
        whole, recipe = build(tmp_path / "d", image=image, seq_len_tokens=400)
        full = int(whole.length_tokens[0])
        for seq_len in range(full - 1, 20, -3):
            index, _ = build(tmp_path / "d", image=image, seq_len_tokens=seq_len, over_long=["lower_resolution", "drop"][:1])
            assert index.notes == {"lowered": 1, "split": 0, "dropped": 0}
            resizing, text = make_resizing(recipe.data.image, recipe.model), full - int(whole.image_tokens.sum())
            best = plan_pictures([(64, 64), (64, 32)], resizing, recipe.data.image, seq_len - text)
            assert index.length_tokens[0] == text + sum(g.tokens for g in best) <= seq_len
            assert index.grids(0) == best


def test_patches_lower_the_resolution_too(tmp_path, png, build):
    talk = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "this"}]
    write(tmp_path / "d", [(talk, [(64, 64)])], png)
    patches = set()
    for limit in range(28, 3, -1):
        index, recipe = build(tmp_path / "d", image=TILES, seq_len_tokens=400, max_patches_per_pack=limit, over_long=["lower_resolution"])
        assert index.num_patches[0] <= limit
        best = 0
        for cap in range(1, 200):
            try:
                plan = plan_pictures([(64, 64)], make_resizing(recipe.data.image, recipe.model), recipe.data.image, cap)
            except ResizingError:
                continue
            work = sum(g.work.patches for g in plan)
            best = max(best, work if work <= limit else 0)
        assert index.num_patches[0] == best
        patches.add(best)
    assert len(patches) > 1


def test_order_of_policies_decides(tmp_path, png, build):
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "this " * 8}]
    turns += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "that " * 8}]
    write(tmp_path / "d", [(turns, [(64, 64)]), (turns[:2], [(8, 8)])], png)
    full, _ = build(tmp_path / "d", image=TILES, seq_len_tokens=400)
    limit = int(full.length_tokens[0]) - 1
    for policies, notes in (
        (["lower_resolution", "split_turns"], {"lowered": 1, "split": 0, "dropped": 0}),
        (["split_turns", "lower_resolution"], {"lowered": 0, "split": 1, "dropped": 0}),
        (["drop", "split_turns"], {"lowered": 0, "split": 0, "dropped": 1}),
    ):
        index, _ = build(tmp_path / "d", image=TILES, seq_len_tokens=limit, over_long=policies)
        assert index.notes == notes
        assert index.key(len(index) - 1) == "s1"
    split, _ = build(tmp_path / "d", image=TILES, seq_len_tokens=limit, over_long=["split_turns"])
    assert [split.key(r) for r in range(3)] == ["s0#0", "s0#1", "s1"]
    assert split.messages(1)[0]["content"] == "<image>\nAnd?"
    assert split.image(1, 0) == split.image(0, 0)


def test_what_no_policy_helps_is_refused_and_the_policies_are_named(tmp_path, png, build):
    talk = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "this " * 40}]
    write(tmp_path / "d", [(talk, [(64, 64)])], png)
    with pytest.raises(SampleIndexError, match="add to data.over_long: lower_resolution, split_turns, drop"):
        build(tmp_path / "d", image=TILES, seq_len_tokens=30)
    with pytest.raises(SampleIndexError, match=r"1 of 1 samples do not fit a pack after data.over_long=.* add to data.over_long: drop"):
        build(tmp_path / "d", image=TILES, seq_len_tokens=30, over_long=POLICIES[:2])
    with pytest.raises(SampleIndexError, match="left out all 1 samples"):
        build(tmp_path / "d", image=TILES, seq_len_tokens=30, over_long=POLICIES)


def test_too_many_pictures_for_the_samples_cap(tmp_path, png, build):
    turn = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "this"}]
    write(tmp_path / "d", [(turn * 4, [(16, 16)] * 4), (turn, [(16, 16)])], png)
    image = {**TILES, "max_tokens_per_sample": 12}
    with pytest.raises(SampleIndexError, match=r"1 samples .* cannot be used:\n.*'s0': 4 pictures may have 12 visual tokens together"):
        build(tmp_path / "d", image=image, seq_len_tokens=400)
    index, _ = build(tmp_path / "d", image=image, seq_len_tokens=400, over_long=["split_turns", "drop"])
    assert index.notes == {"lowered": 0, "split": 0, "dropped": 1}, "the last turn would need four pictures again"


def test_objects_follow_their_pictures(tmp_path, png, build):
    turn = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "this " * 10}]
    box = {"box_px": [0, 0, 8, 8]}
    with ShardWriter(tmp_path / "d") as writer:
        objects = [{"image": 0, "label": 1, **box}, {"image": 1, "label": 2, **box}]
        writer.write("a", {"task": "t", "split": "train", "messages": turn * 2, "objects": objects}, [png(8, 8), png(16, 8)])
    index, _ = build(tmp_path / "d", seq_len_tokens=45, over_long=["split_turns"])
    assert [[(o.image, o.label) for o in index.sample(r).objects] for r in range(2)] == [[(0, 1)], [(0, 1), (1, 2)]]


@pytest.mark.parametrize(
    ("roles", "groups"),
    [
        ("suaua", [(0, 3), (3, 5)]),
        ("uaua", [(0, 2), (2, 4)]),
        ("uuaua", [(0, 3), (3, 5)]),
        ("uaauu", [(0, 5)]),
        ("uauau", [(0, 2), (2, 5)]),
        ("ua", [(0, 2)]),
    ],
)
def test_pieces_begin_at_questions(roles, groups):
    names = {"s": "system", "u": "user", "a": "assistant"}
    sample = Sample(task="t", split="s", messages=[{"role": names[r], "content": "x"} for r in roles])
    assert turn_groups(sample) == groups
