"""A tiny data set with pictures of several sizes, its tokenizer and a recipe for it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megavlm.config.schema import Recipe
from megavlm.data.shards import ShardWriter
from megavlm.data.tokenizer import SentencePieceTokenizer, train_sentencepiece

SPECIAL = ["<image>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CORPUS = [f"The number {i} stands {i * 7} times on the page. What do you see? Un été à Paris, ça va.\n" for i in range(300)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_sentencepiece(CORPUS, tmp_path_factory.mktemp("tokenizer") / "tiny.model", 480, SPECIAL)


@pytest.fixture
def png() -> Callable[..., bytes]:
    def make(width: int, height: int, seed: int = 0, fmt: str = "PNG", **options: Any) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, fmt, **options)
        return file.getvalue()

    return make


@pytest.fixture
def shards(tmp_path: Path, png: Callable[..., bytes]) -> Path:
    """60 train samples (text, one picture, two pictures; one turn or two) and 6 held-out ones, in 4 shards."""
    folder = tmp_path / "shards"
    with ShardWriter(folder, samples_per_shard=20) as writer:
        for i in range(66):
            num_images = i % 3
            pictures = [png(16 + 8 * (i % 2), 16, seed=100 * i + k) for k in range(num_images)]
            turns = [
                {"role": "user", "content": "<image>\n" * num_images + f"What number {i}?"},
                {"role": "assistant", "content": f"number {i * 7}"},
            ]
            if i % 4 == 0:
                turns += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes, " * (i % 5) + "I see"}]
            sample: dict[str, Any] = {
                "task": ("text", "read", "compare")[num_images],
                "split": "train" if i < 60 else "heldout",
                "messages": turns,
            }
            if num_images == 1:
                sample["objects"] = [{"image": 0, "label": i % 10, "box_px": [0, 0, 8, 8]}]
            if i == 1:
                sample["weight"] = 0.5
            writer.write(f"s{i:03d}", sample, pictures)
    return folder


@pytest.fixture
def make_recipe(shards: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path) -> Callable[..., Recipe]:
    def make(data: dict[str, Any] | None = None, stage: dict[str, Any] | None = None, source: dict[str, Any] | None = None) -> Recipe:
        vision = {"image_size_px": 16, "patch_size_px": 8, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
        return Recipe.model_validate(
            {
                "run": {"dir": str(tmp_path / "run")},
                "model": {"vision": vision},
                "data": {
                    "sources": {"a": {"path": str(shards), **(source or {})}},
                    "tokenizer": str(tokenizer.path),
                    "seq_len_tokens": 96,
                    "pack_window_samples": 16,
                    **(data or {}),
                },
                "stages": [{"name": "s", "steps": 4, "packs_per_step": 4, "mixture": {"a": 1}, **(stage or {})}],
            }
        )

    return make


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A Hugging Face tokenizer folder: byte-level BPE (as Qwen's and Llama 3's) or SentencePiece-like with a dummy prefix (Llama 2's)."""

    def make(special: list[str], template: str | None = None, byte_level: bool = True, rstrip: bool = False, **names: str | None) -> Path:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

        tok: Any
        corpus = iter(CORPUS)
        if byte_level:
            tok = Tokenizer(models.BPE())
            tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tok.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            tok.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
        else:
            tok = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
            tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            tok.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
            fixed = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
            tok.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=600, special_tokens=fixed, show_progress=False))
            # The trainer makes the byte pieces special; they are ordinary ones.
            state = json.loads(tok.to_str())
            state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] == "<unk>"]
            tok = Tokenizer.from_str(json.dumps(state))
        tok.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=rstrip) for t in special])
        folder = tmp_path_factory.mktemp("hf")
        tok.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make
