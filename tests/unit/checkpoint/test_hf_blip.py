"""BLIP-2 beyond the table of proofs: its processor and prompts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, processors

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.config import config_from_hf, image_config_from_hf
from megavlm.checkpoint.hf.families.base import normalised
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.config.schema import ImageConfig, ProjectorConfig
from megavlm.data.chat import Chat
from megavlm.data.resizing import make_resizing, plan_pictures
from megavlm.data.tokenizer import Tokenizer, load_tokenizer
from megavlm.testing.families.blip import CASES


def make_tokenizer(folder: Path) -> Tokenizer:
    """Words of one letter, with OPT's bos written before a text."""
    letters = {chr(code): code - 28 for code in range(32, 127)}
    fast = Fast(models.WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2, "<image>": 3} | letters, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.decoder = decoders.Fuse()
    fast.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    tokenizer = quiet_transformers().PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
    )
    tokenizer.save_pretrained(str(folder))
    return load_tokenizer(folder)


def folder_of(tmp_path: Path, **changes: Any) -> Path:
    """A folder with config.json alone."""
    values = CASES[0].config(quiet_transformers()).to_dict()
    for name, value in changes.items():
        block, _, field = name.rpartition("__")
        (values[block] if block else values)[field] = value
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return tmp_path


def test_what_training_sees_is_what_the_exported_processor_makes(tmp_path: Path) -> None:
    tf, model = quiet_transformers(), config_from_hf(folder_of(tmp_path))
    tokenizer, image = make_tokenizer(tmp_path), ImageConfig(fit="stretch")
    for name, content in family("blip-2").processor_files(model, image, tokenizer).items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert image_config_from_hf(tmp_path) == image
    processor = tf.AutoProcessor.from_pretrained(str(tmp_path))
    assert type(processor).__name__ == "Blip2Processor"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    theirs = processor(images=Image.fromarray(pixels), text="Is it? Answer:", return_tensors="pt")
    chat = Chat("blip-2", tokenizer)
    resizing = make_resizing(image, model)
    (grid,) = plan_pictures([(30, 20)], resizing, image)
    ids = chat.encode_prompt([{"role": "user", "content": "<image>Is it? Answer:"}], [resizing.sequence(grid)])
    assert ids.tolist() == theirs["input_ids"][0].tolist()
    # One grey level of 255, for the two resizing codes round differently.
    ours = normalised(model.vision, resizing.cut(pixels, grid))
    assert float((ours - theirs["pixel_values"]).abs().max()) <= 1.01 / 255 / min(model.vision.image_std)


def test_answers_alone_are_learned(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    talk = [{"role": "user", "content": "<image>Is it? Answer:"}, {"role": "assistant", "content": " yes"}]
    encoded = Chat("blip-2", tokenizer).encode_conversation(talk, [5])
    assert tokenizer.decode(encoded.ids_L[encoded.supervised_L].tolist()) == " yes</s>"
    assert encoded.ids_L[:6].tolist() == [3] * 5 + [2]


def test_encoder_decoders_are_refused_with_the_reason(tmp_path: Path) -> None:
    text = quiet_transformers().T5Config(d_model=48, num_layers=2, num_heads=4, vocab_size=101).to_dict()
    with pytest.raises(HuggingFaceError, match="text_config.model_type is 't5', an encoder-decoder"):
        config_from_hf(folder_of(tmp_path, text_config=text))


def test_a_qformer_that_reads_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HuggingFaceError, match="use_qformer_text_input is True"):
        config_from_hf(folder_of(tmp_path, qformer_config__use_qformer_text_input=True))


def test_other_pictures_than_the_processors_are_refused(tmp_path: Path) -> None:
    model = config_from_hf(folder_of(tmp_path))
    with pytest.raises(HuggingFaceError, match="fit=crop, but Blip2Processor stretches"):
        family("blip-2").check_pictures(model, ImageConfig(fit="crop"))


def test_the_block_goes_with_the_kind() -> None:
    with pytest.raises(ValueError, match="kind=qformer and the block qformer go together"):
        ProjectorConfig(kind="qformer", num_layers=1)
    with pytest.raises(ValueError, match="set num_layers=1"):
        ProjectorConfig.model_validate({"kind": "qformer", "qformer": {}})
    with pytest.raises(ValueError, match="hidden_size=768 is not a multiple of num_attention_heads=7"):
        ProjectorConfig.model_validate({"kind": "qformer", "num_layers": 1, "qformer": {"num_attention_heads": 7}})
    assert ProjectorConfig.model_validate({"kind": "qformer", "num_layers": 1, "qformer": {}}).tokens_per_picture == 32
