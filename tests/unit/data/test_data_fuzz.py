"""500 broken pictures: the process lives, exactly the broken samples are lost, memory stays bounded."""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
import tarfile
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.data.decode import PillowDecoder, nvimgcodec_available
from megavlm.data.images import MAX_PIXELS, ImageError
from megavlm.data.index import build_index
from megavlm.data.materialise import Materialiser
from megavlm.data.shards import ShardWriter
from megavlm.data.types import PackPlan, SampleRef
from megavlm.planner.flops import VisionWork

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif", "JPEG2000": "jp2"}
NUM_BROKEN = 500
WIDTH, HEIGHT = 96, 64


@cache
def whole(number):
    """A picture of smooth colours and some noise, in one of eight formats."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    pixels = np.clip(np.asarray(coarse).astype(int) + rng.integers(-9, 10, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
    fmt = list(EXTENSIONS)[number % len(EXTENSIONS)]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, fmt, **({"speed": 10} if fmt == "AVIF" else {}))
    return fmt, file.getvalue()


def cut_short(data, rng, fmt):
    return data[: int(rng.integers(1, len(data)))]


def flipped(data, rng, fmt):
    broken = bytearray(data)
    for at in rng.integers(0, 8 * len(data), rng.integers(1, 20)):
        broken[at // 8] ^= 1 << (at % 8)
    return bytes(broken)


def emptied(data, rng, fmt):
    return b""


def zeroed(data, rng, fmt):
    start = int(rng.integers(0, len(data)))
    return data[:start] + bytes(min(256, len(data) - start)) + data[start + 256 :]


def another(data, rng, fmt):
    """A text under a picture's name."""
    return [b"<html>404</html>", b"\x00" * 300, rng.bytes(300), b"%PDF-1.7 ...", b"BM", b"\x89PNG\r\n\x1a\n"][int(rng.integers(6))]


def huge(data, rng, fmt):
    """Dimensions written over in the header, wherever they stand as they would in this format."""
    side = int(rng.choice([20_000, 65_000, 2_000_000_000]))
    wide, narrow = (struct.pack(f"{order}II", side, side) for order in "<>"), min(side, 65_000)
    for old, new in zip((struct.pack(f"{o}II", WIDTH, HEIGHT) for o in "<>"), wide, strict=True):
        data = data.replace(old, new)
    for order in "<>":
        for pair in ((WIDTH, HEIGHT), (HEIGHT, WIDTH)):
            data = data.replace(struct.pack(f"{order}HH", *pair), struct.pack(f"{order}HH", narrow, narrow), 1)
    return data


def renamed(data, rng, fmt):
    """Nothing wrong but its name, which is another format's."""
    return data


DAMAGES = [cut_short, flipped, emptied, zeroed, another, huge, renamed, flipped, cut_short, flipped]


def broken(number):
    """Bytes of broken picture `number`, its name's extension and what was done to it."""
    fmt, data = whole(number)
    rng = np.random.default_rng(10_000 + number)
    damage = DAMAGES[(number // len(EXTENSIONS)) % len(DAMAGES)]
    shown = list(EXTENSIONS)[int(rng.integers(len(EXTENSIONS)))] if damage is renamed else fmt
    return damage(data, rng, fmt), EXTENSIONS[shown], damage.__name__


def plainly(data):
    """What bare Pillow makes of it: (H, W, 3), or None where it fails or the size is not what the metadata say."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.size[0] * picture.size[1] > MAX_PIXELS or picture.size != (WIDTH, HEIGHT):
                return None
            return np.asarray(picture.convert("RGB"))
    except Exception:
        return None


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_pillow_reads_or_refuses_each():
    decoder, seen = PillowDecoder(), {}
    for number in range(NUM_BROKEN):
        data, _, damage = broken(number)
        outcome = "refused" if _refuses(decoder, data) else "read"
        seen[damage, outcome] = seen.get((damage, outcome), 0) + 1
    assert seen.get(("renamed", "refused"), 0) == 0
    assert seen.get(("emptied", "read"), 0) == seen.get(("another", "read"), 0) == 0
    assert min(seen["flipped", "read"], seen["flipped", "refused"], seen["cut_short", "refused"], seen["huge", "refused"]) >= 20, seen


@pytest.mark.parametrize("decoder", ["PillowDecoder", "NvImageCodecDecoder"])
def test_the_process_lives_and_its_memory_is_bounded(decoder):
    """In a process of its own, whose peak is measured: a native decoder that dies takes its process along."""
    if decoder == "NvImageCodecDecoder" and not nvimgcodec_available():
        pytest.skip("nvidia-nvimgcodec is not installed")
    code = f"""
import json, sys
sys.path.insert(0, {__file__.rsplit("/", 1)[0]!r})
import test_data_fuzz as here
from megavlm.data.decode import NvImageCodecDecoder, PillowDecoder
decoder, refused = {decoder}(), []
decoder.decode(here.whole(0)[1])
before = here.peak_mib()
for number in range(here.NUM_BROKEN):
    try:
        decoder.decode(here.broken(number)[0])
    except here.ImageError:
        refused.append(number)
print(json.dumps([refused, here.peak_mib() - before]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
    refused, grown_mib = json.loads(done.stdout.splitlines()[-1])
    assert grown_mib < 64, f"the peak rose by {grown_mib} MiB over 500 files"
    # What nvImageCodec does not decode, Pillow does or refuses: ranks with different decoders lose the same samples.
    by_pillow = {number for number in range(NUM_BROKEN) if _refuses(PillowDecoder(), broken(number)[0])}
    assert set(refused) == by_pillow


def _refuses(decoder, data):
    try:
        pixels = decoder.decode(data)
    except ImageError:
        return True
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)
    return False


# ------------------------------------------------------------------------------------------------------- through the whole route


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Shards of 600 whole pictures, and the same after a bad night: 500 of them broken, a whole one after every five."""
    clean, bad = (tmp_path_factory.mktemp("fuzz") / name for name in ("clean", "bad"))
    with ShardWriter(clean, samples_per_shard=200) as writer:
        for number in range(NUM_BROKEN * 6 // 5):
            talk = [{"role": "user", "content": f"<image>{number}?"}, {"role": "assistant", "content": f"number {number}"}]
            fmt, data = whole(number)
            writer.write(f"s{number:04d}", {"task": "t", "split": "train", "messages": talk}, [data], [EXTENSIONS[fmt]])
    bad.mkdir()
    for shard in sorted(clean.glob("shard-*.tar")):
        with tarfile.open(shard) as old, tarfile.open(bad / shard.name, "w") as new:
            for member in old:
                data, number = old.extractfile(member).read(), int(member.name[1:5])
                if number % 6 != 5 and not member.name.endswith(".json"):
                    data = spoiled(number)
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
    return clean, bad


def spoiled(number):
    """The broken picture that takes the place of whole picture `number`; another format's under its name where that is the damage."""
    data, _, damage = broken(number)
    return whole(number + 3)[1] if damage == "renamed" else data


def one_by_one(recipe, tokenizer):
    """Each sample's batch, by its key."""
    source = recipe.data.sources["a"]
    index = build_index(source, recipe.data, recipe.model, "multimodal", tokenizer, progress=False)
    materialise = Materialiser(recipe, recipe.stages[0], {"a": index}, tokenizer, needs_tiles=True)
    batches = {}
    for row in range(len(index)):
        work = VisionWork(*(int(column[row]) for column in (index.num_tiles, index.num_patches, index.patch_pairs)))
        plan = PackPlan((SampleRef("a", row),), (int(index.length_tokens[row]),), work, int(index.num_targets[row]), 0.0)
        batches[index.key(row)] = materialise([plan])
    return batches


@pytest.mark.parametrize("policy", ["fixed", pytest.param("native", marks=pytest.mark.slow)])
def test_exactly_the_broken_samples_are_lost_and_all_else_is_untouched(folders, make_recipe, tokenizer, policy):
    image = {"policy": policy, "decoder": "pillow", "max_tokens_per_image": 48}
    clean, bad = (one_by_one(make_recipe(source={"path": str(folder)}, data={"image": image}), tokenizer) for folder in folders)
    assert list(clean) == list(bad) and len(bad) == NUM_BROKEN * 6 // 5
    lost = {key for key, batch in bad.items() if batch.num_bad_samples}
    unreadable = {f"s{number:04d}" for number in range(len(bad)) if number % 6 != 5 and plainly(spoiled(number)) is None}
    assert lost == unreadable
    assert 200 < len(lost) < NUM_BROKEN
    for key, batch in bad.items():
        before, number = clean[key], int(key[1:])
        assert before.num_bad_samples == 0
        for name in ("tokens_S", "positions_S", "target_positions_Q", "target_ids_Q", "target_segments_Q", "image_positions_N"):
            assert torch.equal(getattr(batch, name), getattr(before, name)), (key, name)
        assert batch.segment_lengths == before.segment_lengths
        pixels, pixels_before = (b.tiles_TCHW if policy == "fixed" else b.pixels_X for b in (batch, before))
        assert pixels.shape == pixels_before.shape
        if key in lost:
            assert not batch.target_weights_Q.any()
            assert pixels.unique().tolist() == [127]
            assert [line["key"] for line in batch.metadata["bad_samples"]] == [key]
        else:
            assert torch.equal(batch.target_weights_Q, before.target_weights_Q)
            if number % 6 == 5 or spoiled(number) == whole(number)[1]:
                assert torch.equal(pixels, pixels_before), key
