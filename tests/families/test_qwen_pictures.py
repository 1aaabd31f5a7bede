"""Pictures of odd sizes: our native resizing gives Qwen's models what transformers' own image processor gives them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.families.qwen2_vl import IMAGE_PAD
from megavlm.checkpoint.hf.reading import Problems, quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.seeded import picture_prompt
from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.tokenizer import Tokenizer
from megavlm.testing.families import CASES
from megavlm.testing.families.case import Case
from megavlm.testing.pool import RankPool

FAMILIES = {case.family: case for case in CASES if case.family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl") and not case.slow}
SIZES = [(64, 64), (37, 91), (9, 70), (133, 20), (7, 5), (200, 310)]
"""(width, height): as it is, odd, long, wide, below the least, above the most."""
LIMITS = ImageConfig(policy="native", min_tokens_per_image=6, max_tokens_per_image=300)
LEVEL = 1 / 255 / 0.26
"""One of 256 levels of a pixel, after normalising."""


def model_of(case: Case) -> ModelConfig:
    return case.kind.model_from_hf(case.config(quiet_transformers()), Problems())


def files(case: Case, image: ImageConfig) -> dict[str, dict[str, Any]]:
    return case.kind.processor_files(model_of(case), image, cast(Tokenizer, SimpleNamespace(image_token=IMAGE_PAD)))


def waves(width: int, height: int) -> np.ndarray:
    """A smooth picture (height, width, 3): on noise the order in which Pillow resizes lines and columns would show."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    return np.round(127.5 + 100 * np.sin(x / 9 + c) * np.cos(y / 7 - c)).astype(np.uint8)


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_and_grids_are_those_of_the_image_processor(name: str, tmp_path: Path) -> None:
    """transformers' processor is built from the file that an export writes; ours reads the limits back from the same file."""
    case = FAMILIES[name]
    model = model_of(case)
    for file, content in files(case, LIMITS).items():
        (tmp_path / file).write_text(json.dumps(content))
    image = family(name).image_from_hf(tmp_path, model)
    assert image == LIMITS
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(str(tmp_path))
    pictures = [waves(width, height) for width, height in SIZES]
    theirs = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    ours = case.kind.hf_inputs(model, picture_prompt(model, image, [5, 6, 7, 8], pictures, 3))
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert ours["pixel_values"].shape == theirs["pixel_values"].shape
    # Pillow's resize and torch's differ by up to two levels; a picture that keeps its size has the same pixels.
    assert float((ours["pixel_values"] - theirs["pixel_values"]).abs().max()) <= 2.1 * LEVEL
    untouched = int(ours["image_grid_thw"][0].prod())
    assert torch.allclose(ours["pixel_values"][:untouched], theirs["pixel_values"][:untouched], atol=1e-5)


def test_limits_that_are_no_whole_tokens_and_other_policies_are_refused(tmp_path: Path) -> None:
    case = FAMILIES["qwen2_vl"]
    model = model_of(case)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"min_pixels": 64 * 4, "max_pixels": 64 * 10 + 1, "image_mean": [0.5] * 3})
    )
    with pytest.raises(HuggingFaceError, match=r"max_pixels .* is 641, no multiple of the 8 x 8 pixels .* write 640"):
        case.kind.image_from_hf(tmp_path, model)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 64 * 5, "max_pixels": 64 * 10, "image_mean": [0.5] * 3}))
    assert case.kind.image_from_hf(tmp_path, model) == ImageConfig(policy="native", min_tokens_per_image=5, max_tokens_per_image=10)
    with pytest.raises(HuggingFaceError, match="policy=tiles, but Hugging Face's Qwen2VLForConditionalGeneration"):
        case.kind.check_pictures(model, ImageConfig(policy="tiles", max_tiles=4))


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes and Qwen's special tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()  # type: ignore[assignment]
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder


def export_trained(name: str, tokenizer: Path, out: Path) -> None:
    """A model that never was at Hugging Face: with weights of our own initialisation, and a tokenizer."""
    from megavlm.checkpoint.hf import export_hf
    from megavlm.config.schema import ParallelConfig
    from megavlm.data.chat import Chat
    from megavlm.data.tokenizer import load_tokenizer
    from megavlm.models.init import initialise
    from megavlm.parallel.context import enter_grid
    from megavlm.testing.tiny import tiny_chunks

    model = model_of(FAMILIES[name])
    model = model.model_copy(update={"language": model.language.model_copy(update={"vocab_size": 272}), "init_std": 0.2})
    ctx = enter_grid(ParallelConfig(), torch.device("cpu"), seed=0)
    chunks = tiny_chunks(model, ctx)
    initialise(chunks, model, 0, ctx)
    export_hf(chunks, out, model=model, chat=Chat("chatml", load_tokenizer(tokenizer, IMAGE_PAD)), image=LIMITS)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_trained_here_answers_alike_in_transformers(name: str, tokenizer_folder: Path, tmp_path: Path, pool: RankPool) -> None:
    """Tokenizer, image processor, config and weights of the export give the tokens and logits that the folder gives here."""
    pool.run(export_trained, name, tokenizer_folder, tmp_path / "out")
    answer, prompt = pool.run(answered_here, tmp_path / "out")[0]
    tf, case = quiet_transformers(), FAMILIES[name]
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = tf.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    config = tf.AutoConfig.from_pretrained(str(tmp_path / "out"))
    named = {field: tokenizer.convert_ids_to_tokens(getattr(config, field)) for field in (*case.kind.token_fields, "image_token_id")}
    assert named == dict(case.kind.token_fields) | {"image_token_id": IMAGE_PAD}
    pictures = Qwen2VLImageProcessorPil.from_pretrained(str(tmp_path / "out"))(Image.fromarray(waves(64, 64)), return_tensors="pt")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "<image>what?"}], tokenize=False, add_generation_prompt=True)
    text = text.replace("<image>", IMAGE_PAD * int(pictures["image_grid_thw"].prod() // 4))
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == prompt
    is_image = (ids == config.image_token_id).long()
    hf = getattr(tf, case.kind.hf_class).from_pretrained(str(tmp_path / "out")).eval()
    with torch.no_grad():
        theirs = hf.generate(input_ids=ids, mm_token_type_ids=is_image, max_new_tokens=8, do_sample=False, eos_token_id=None, **pictures)
    assert theirs[0, len(prompt) :].tolist() == answer


def answered_here(folder: Path) -> tuple[list[int], list[int]]:
    """(greedy answer, prompt) by the folder's own tokenizer, template and processor."""
    from megavlm.inference.generate import generate
    from megavlm.inference.load import load_for_inference

    loaded = load_for_inference(folder, device="cpu", dtype="fp32")
    prompt = loaded.prompt("<image>what?", [Image.fromarray(waves(64, 64))])
    token = loaded.tokenizer.image_token_id
    return generate(loaded.model, [prompt], max_new_tokens=8, stop_ids=[], image_token_id=token)[0], list(prompt.ids)
