"""InstructBLIP's data route: the text that its Q-Former reads is what its processor makes, in training and in generation alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers, processors

from megavlm.checkpoint.hf.reading import Problems, quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.config.schema import DataConfig, ImageConfig, ModelConfig
from megavlm.data.chat import Chat
from megavlm.data.collate import Piece, collate
from megavlm.data.instructions import FOLDER, InstructionTokenizer, instruction_tokenizer
from megavlm.data.prompt import prompt_batch
from megavlm.data.sentencepiece_export import TokenizerError
from megavlm.data.types import SampleRef
from megavlm.inference.prompts import make_prompt
from megavlm.testing.families.blip import CASES
from tests.unit.checkpoint.test_hf_blip import make_tokenizer

WORDS = ["is", "it", "red", "?", "what", "answer", ":"]


def make_words(folder: Path) -> Path:
    """A BERT-like tokenizer of a few words."""
    fast = Fast(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    quiet_transformers().PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(str(folder))
    return folder


@pytest.fixture
def model() -> ModelConfig:
    case = next(case for case in CASES if case.family == "instructblip")
    return family("instructblip").model_from_hf(case.config(quiet_transformers()), Problems())


def test_prompts_equal_the_processors(tmp_path: Path, model: ModelConfig) -> None:
    tf, tokenizer = quiet_transformers(), make_tokenizer(tmp_path)
    words = make_words(tmp_path / FOLDER)
    side = {"height": 16, "width": 16}
    processor = tf.InstructBlipProcessor(
        tf.BlipImageProcessor(size=side), tf.AutoTokenizer.from_pretrained(str(tmp_path)), tf.AutoTokenizer.from_pretrained(str(words)), 5
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    theirs = processor(images=picture, text="is it red ? answer :", return_tensors="pt")
    data = DataConfig(tokenizer=str(tmp_path), chat_template="blip-2", instruction_tokenizer=str(words), image=ImageConfig(fit="stretch"))
    messages = [{"role": "user", "content": "<image>\nis it red ? answer :"}]
    prompt = make_prompt(messages, [picture], chat=Chat("blip-2", tokenizer), data=data, model=model)
    assert list(prompt.ids) == theirs["input_ids"][0].tolist()
    assert prompt.instructions == theirs["qformer_input_ids"].tolist()
    ours = family("instructblip").hf_inputs(model, prompt)
    assert torch.equal(ours["qformer_input_ids"], theirs["qformer_input_ids"])
    batch = prompt_batch([prompt, prompt], tokenizer.image_token_id, model)
    assert batch.instruction_lengths == [8, 8] and batch.instruction_ids_W is not None
    assert batch.instruction_ids_W.tolist() == 2 * theirs["qformer_input_ids"][0].tolist()


def test_each_picture_is_read_with_its_message(tmp_path: Path) -> None:
    reader = InstructionTokenizer(make_words(tmp_path), 40, 16)
    talk = [
        {"role": "user", "content": "<image><image> red"},
        {"role": "assistant", "content": "it"},
        {"role": "user", "content": "what <image>?"},
    ]
    assert reader(talk) == [[2, 6, 3], [2, 6, 3], [2, 8, 7, 3]]
    assert InstructionTokenizer(tmp_path, 40, 3)([{"role": "user", "content": "<image>red red red"}]) == [[2, 6, 3]]


def test_batches_carry_the_words_of_their_pictures_in_order() -> None:
    def piece(instructions: list[list[int]]) -> Piece:
        none = np.zeros(0, dtype=np.int64)
        return Piece(SampleRef("a", 0), "k", "t", np.zeros(3, dtype=np.int64), none, none, 1.0, none, [], [], [], instructions, None)

    batch = collate([piece([[1, 2], [3]]), 4, piece([]), piece([[5]])], 0, 5, False)
    assert batch.instruction_lengths == [2, 1, 1] and batch.instruction_ids_W is not None
    assert batch.instruction_ids_W.tolist() == [1, 2, 3, 5]
    assert collate([piece([])], 0, 5, False).instruction_lengths is None


def test_what_does_not_fit_is_refused(tmp_path: Path, model: ModelConfig) -> None:
    with pytest.raises(TokenizerError, match="instruction_tokenizer is not given"):
        instruction_tokenizer(DataConfig(), model)
    with pytest.raises(TokenizerError, match="ids up to 10, model.projector.qformer.instruction.vocab_size is 8"):
        InstructionTokenizer(make_words(tmp_path), 8, 16)
    with pytest.raises(TokenizerError, match="has no tokenizer.json"):
        InstructionTokenizer(tmp_path / "nothing", 8, 16)
    assert instruction_tokenizer(DataConfig(), ModelConfig()) is None
