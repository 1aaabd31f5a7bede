"""Export: what was imported comes out bit for bit, what was trained gives Hugging Face's model our logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megavlm.checkpoint import store
from megavlm.checkpoint.hf import HuggingFaceError, config_from_hf, export_hf, image_config_from_hf, load_hf
from megavlm.checkpoint.hf.config import quiet_transformers
from megavlm.checkpoint.hf.seeded import seeded_prompts
from megavlm.config.schema import ImageConfig, ModelConfig, ParallelConfig
from megavlm.data.chat import Chat
from megavlm.data.pixels import cut_tiles, tile_grid
from megavlm.data.prompt import prompt_batch
from megavlm.data.resizing import make_resizing
from megavlm.data.tokenizer import load_tokenizer, train_sentencepiece
from megavlm.models.init import initialise
from megavlm.parallel.context import enter_grid
from megavlm.testing.families import CASES
from megavlm.testing.families.case import Case, hf_logits, make_hf
from megavlm.testing.pool import RankPool
from megavlm.testing.tiny import tiny_batch, tiny_chunks, tiny_model_config

BF16 = torch.bfloat16
KINDS = [
    ("LLaVA-1.5", torch.float32),
    ("LLaVA-1.5, class token, Qwen2", BF16),
    ("LLaVA-1.5, SigLIP, Qwen2 tied", BF16),
    ("LLaVA-1.5, Qwen3", torch.float32),
    ("Llama 2, Vicuna", BF16),
]


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def through_layout(folder: Path, checkpoint: Path, layout: dict[str, Any], dtype: str) -> None:
    """Import into a parallel layout and save that as a checkpoint."""
    model, parallel = config_from_hf(folder), ParallelConfig(**layout)
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    chunks = tiny_chunks(model, ctx, parallel, dtype=dtype)
    load_hf(chunks, folder, model, ctx)
    store.save(checkpoint, chunks, None, {"model": model.model_dump(mode="json")}, ctx)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["a cat sat on 12 mats", "what number is in the picture? 7 and 34", "the box is at 120 30 440 900"] * 20
    specials = ["<image>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    return Chat("megavlm", train_sentencepiece(texts, folder / "t.model", 300, specials))


@pytest.mark.parametrize("name, dtype, split", [*((*kind, None) for kind in KINDS), (*KINDS[2], [0, 1, 2, 1])])
def test_export_of_import_is_the_original(
    pool: RankPool, tmp_path: Path, name: str, dtype: torch.dtype, split: list[int] | None, chat: Chat
) -> None:
    """Through a checkpoint that eight pipeline chunks and two tensor ranks wrote, in several files, with a tokenizer of our own."""
    make_hf(case_of(name), tmp_path / "hf", dtype=dtype, max_shard_size=50_000)
    layout = {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "layers_per_stage": split}
    ours = {torch.float32: "fp32", BF16: "bf16"}[dtype]
    pool.run(through_layout, tmp_path / "hf", tmp_path / "checkpoint", layout, ours, world_size=4)
    small = replace_vocabulary(chat, 101)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", chat=small, max_shard_bytes=60_000)
    before, after = all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-0000*.safetensors"))) > 1
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == dtype, key
        assert torch.equal(tensor, after[key]), key
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in before.values())


def replace_vocabulary(chat: Chat, size: int) -> Any:
    """The tiny models have fewer rows than any byte-complete tokenizer has tokens: pretend, as no text is encoded."""

    class Small:
        def __getattr__(self, name: str) -> Any:
            return getattr(chat.tokenizer, name)

    small: Any = Small()
    small.vocab_size, small.image_token_id, small.bos_id, small.eos_id, small.pad_id = size, 3, 1, 2, 0
    small.num_rows = lambda text_only: size
    other = Chat("megavlm", chat.tokenizer)
    other.tokenizer = small
    return other


def test_transformers_writes_the_same_names(tmp_path: Path, chat: Chat, pool: RankPool) -> None:
    """The export, loaded by the Auto class and saved again, has the same names: these are the names on the disk."""
    make_hf(case_of("LLaVA-1.5, SigLIP, Qwen2 tied"), tmp_path / "hf")
    pool.run(through_layout, tmp_path / "hf", tmp_path / "checkpoint", {}, "fp32")
    export_hf(tmp_path / "checkpoint", tmp_path / "out", chat=replace_vocabulary(chat, 101))
    auto = quiet_transformers().AutoModelForImageTextToText
    model, info = auto.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(str(tmp_path / "again"))
    assert set(all_tensors(tmp_path / "again")) == set(all_tensors(tmp_path / "out"))


def train_and_save(path: Path, layout: dict[str, Any], model: ModelConfig) -> torch.Tensor | None:
    """Three plain gradient steps, then (where one rank holds the model) the logits."""
    parallel = ParallelConfig(**layout)
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    chunks: Any = tiny_chunks(model, ctx, parallel)
    initialise(chunks, model, 5, ctx)
    for step in range(3):
        chunks[0](tiny_batch(model, seed=step)).total.backward()
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
    store.save(path, chunks, None, {"model": model.model_dump(mode="json"), "step": 3}, ctx)
    with torch.no_grad():
        batch = prompt_batch(seeded_prompts(model, ImageConfig(), 3), 3, model)
        return chunks[0].language.logits(chunks[0].transform(batch, chunks[0].packing(batch)))


@pytest.mark.parametrize("siglip", [False, True])
def test_trained_model_gives_our_logits_in_hugging_face(pool: RankPool, tmp_path: Path, chat: Chat, siglip: bool) -> None:
    model = tiny_model_config(siglip=siglip)
    ours = pool.run(train_and_save, tmp_path / "c", {"tensor": 2}, model, world_size=2)[0]
    export_hf(tmp_path / "c", tmp_path / "out", chat=replace_vocabulary(chat, 101))
    hf = quiet_transformers().LlavaForConditionalGeneration.from_pretrained(str(tmp_path / "out")).eval()
    theirs = torch.cat(hf_logits(case_of("LLaVA-1.5"), hf, model, seeded_prompts(model, ImageConfig(), 3)))
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("siglip, keep_class_token", [(False, False), (False, True), (True, False)])
def test_processor_makes_our_tokens_and_pixels(pool: RankPool, tmp_path: Path, chat: Chat, siglip: bool, keep_class_token: bool) -> None:
    model = tiny_model_config(siglip=siglip, vocab_size=chat.tokenizer.vocab_size)
    model.vision.keep_class_token = keep_class_token
    pool.run(train_and_save, tmp_path / "c", {}, model)
    export_hf(tmp_path / "c", tmp_path / "out", chat=chat)
    tf = quiet_transformers()
    processor = tf.AutoProcessor.from_pretrained(str(tmp_path / "out"))
    assert type(processor).__name__ == "LlavaProcessor"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    messages = [{"role": "user", "content": "<image>\nwhat number is in the picture?"}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.fromarray(pixels)], return_tensors="pt")
    ours = chat.encode_prompt(messages, [model.visual_tokens_per_tile])
    assert inputs["input_ids"][0].tolist() == ours.tolist()
    tiles = cut_tiles(pixels, tile_grid(16, 16, ImageConfig(), 16), 16)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.vision.image_mean, model.vision.image_std))
    torch.testing.assert_close(inputs["pixel_values"], (tiles.float() / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    hf = tf.LlavaForConditionalGeneration.from_pretrained(str(tmp_path / "out"))
    answer = hf.generate(**inputs, max_new_tokens=3)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    assert hf.generation_config.eos_token_id == chat.stop_ids
    assert processor(text=text, images=[Image.new("RGB", (50, 20))], return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_processor_fits_a_picture_as_training_did(pool: RankPool, tmp_path: Path, chat: Chat, fit: str) -> None:
    model = tiny_model_config(vocab_size=chat.tokenizer.vocab_size)
    image = ImageConfig.model_validate({"fit": fit})
    pool.run(train_and_save, tmp_path / "c", {}, model)
    export_hf(tmp_path / "c", tmp_path / "out", chat=chat, image=image)
    assert image_config_from_hf(tmp_path / "out") == image
    processor = quiet_transformers().AutoProcessor.from_pretrained(str(tmp_path / "out"))
    smooth = np.add.outer(np.arange(40), np.arange(70) * 2)[..., None] + np.array([0, 20, 50])
    resizing = make_resizing(image, model)
    tiles = resizing.cut(smooth.astype(np.uint8), resizing.grid(70, 40))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.vision.image_mean, model.vision.image_std))
    theirs = processor(text="<image>", images=[Image.fromarray(smooth.astype(np.uint8))], return_tensors="pt")["pixel_values"]
    levels = (theirs * std + mean) * 255 - tiles
    assert theirs.shape == tiles.shape and float(levels.abs().max()) <= 2.01


def test_policies_that_the_processor_lacks_are_refused(pool: RankPool, tmp_path: Path, chat: Chat) -> None:
    model = tiny_model_config(vocab_size=chat.tokenizer.vocab_size)
    pool.run(train_and_save, tmp_path / "c", {}, model)
    for values in ({"policy": "native"}, {"policy": "anyres"}, {"policy": "tiles", "max_tiles": 4}):
        with pytest.raises(HuggingFaceError, match=f"policy={values['policy']}.* one square tile a picture"):
            export_hf(tmp_path / "c", tmp_path / "out", chat=chat, image=ImageConfig.model_validate(values))
    newline = model.model_copy(update={"projector": model.projector.model_copy(update={"image_newline": True})})
    with pytest.raises(HuggingFaceError, match="model.projector.image_newline=True"):
        export_hf(tmp_path / "c", tmp_path / "out", chat=chat, model=newline)
    assert not (tmp_path / "out").exists()


def test_export_refuses_before_writing(pool: RankPool, tmp_path: Path, chat: Chat) -> None:
    model = tiny_model_config()
    pool.run(train_and_save, tmp_path / "c", {}, model)
    with pytest.raises(HuggingFaceError, match=r"tokenizer has \d+ tokens, but model.language.vocab_size is 101"):
        export_hf(tmp_path / "c", tmp_path / "out", chat=chat)
    with pytest.raises(HuggingFaceError, match="no tokenizer is known"):
        export_hf(tmp_path / "c", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(HuggingFaceError, match="is not empty"):
        export_hf(tmp_path / "c", tmp_path / "full", chat=replace_vocabulary(chat, 101))
    assert not (tmp_path / "out").exists()


def two_stages(run: Path, tokenizer: Path) -> None:
    """Stage 1 holds the whole model, stage 2 the language model alone; also the whole of both, exported live."""
    model = tiny_model_config()
    ctx = enter_grid(ParallelConfig(), torch.device("cpu"), seed=1)
    (whole,) = tiny_chunks(model, ctx)
    (text,) = tiny_chunks(model, ctx, text_only=True)
    initialise([whole], model, 1, ctx)
    initialise([text], model, 2, ctx)
    block = {"model": model.model_dump(mode="json")}
    store.save(run / "checkpoints" / "00000001-one", [whole], None, block, ctx)
    modules = {"vision": "00000001-one", "projector": "00000001-one", "language": "00000002-two"}
    store.save(run / "checkpoints" / "00000002-two", [text], None, block | {"modules": modules}, ctx)
    chat = Chat("megavlm", load_tokenizer(tokenizer))
    export_hf([whole], run / "live", model=model, chat=replace_vocabulary(chat, 101))


def test_modules_come_from_the_stage_that_held_them_last(pool: RankPool, tmp_path: Path, chat: Chat) -> None:
    pool.run(two_stages, tmp_path, chat.tokenizer.path)  # type: ignore[attr-defined]
    export_hf(tmp_path, tmp_path / "newest", chat=replace_vocabulary(chat, 101))
    export_hf(tmp_path / "checkpoints" / "00000001-one", tmp_path / "first", chat=replace_vocabulary(chat, 101))
    live, first, newest = (all_tensors(tmp_path / name) for name in ("live", "first", "newest"))
    assert set(live) == set(first) == set(newest)
    for name, tensor in live.items():
        assert torch.equal(tensor, first[name]), name
        from_second_stage = name.startswith("language_model") and tensor.std() > 0
        assert torch.equal(tensor, newest[name]) is not from_second_stage, name
    shutil.rmtree(tmp_path / "checkpoints" / "00000001-one")
    with pytest.raises(ValueError, match="00000001-one: there is no such folder"):
        export_hf(tmp_path, tmp_path / "again", chat=replace_vocabulary(chat, 101))
