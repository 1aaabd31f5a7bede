"""A folder's generation_config.json: its end tokens and its penalty are ours, and transformers' `generate` says what comes of them."""

import json
import logging
import shutil

import pytest
import torch
import transformers

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.generation import generation_defaults
from megavlm.checkpoint.hf.importing import import_hf
from megavlm.data.chat import Chat
from megavlm.data.demo import make_demo
from megavlm.data.prompt import Prompt
from megavlm.data.tokenizer import load_tokenizer
from megavlm.inference.load import load_for_inference
from megavlm.testing.families.case import randomise
from megavlm.testing.in_rank import in_rank


class Told(logging.Handler):
    """Keeps what is logged (the test runs in a process of its own)."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


PROMPTS = ([5, 90, 91, 92], [7, 33, 140, 33, 33, 200, 12])
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with a tokenizer."""
    demo, made = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("hf")
    make_demo(demo, seed=3, num_train=8, num_held_out=8, page_px=48, num_workers=1)
    tokenizer = load_tokenizer(demo / "tokenizer.model")
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=512,
        eos_token_id=None,
    )
    torch.manual_seed(3)
    hf = transformers.LlamaForCausalLM(config)
    randomise(hf, 0.2)
    hf.save_pretrained(made)
    tokenizer.save_hf(made, Chat("megavlm", tokenizer).jinja())
    (made / "generation_config.json").unlink()
    return made


def theirs(folder, **options):
    """New tokens of each prompt by transformers' generate, as the folder says but for the options."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0} | options
    made = [hf.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), **options) for ids in PROMPTS]
    return [out[0, len(ids) :].tolist() for out, ids in zip(made, PROMPTS, strict=True)]


def ours(loaded, **options):
    return loaded.generate([Prompt(list(ids)) for ids in PROMPTS], max_new_tokens=NEW_TOKENS, **options)


def configured(folder, to, **values):
    shutil.copytree(folder, to, dirs_exist_ok=True)
    (to / "generation_config.json").write_text(json.dumps(values))
    return to


@in_rank
def test_end_tokens_and_penalty_are_the_folders(folder, ctx, tmp_path):
    free = theirs(configured(folder, tmp_path / "free", repetition_penalty=1.3))
    ends = [free[0][9], free[1][17]]
    hf = configured(
        folder,
        tmp_path / "hf",
        eos_token_id=ends,
        repetition_penalty=1.3,
        do_sample=True,
        temperature=0.1,
        top_p=0.01,
        no_repeat_ngram_size=0,
    )
    expected = theirs(hf)
    assert expected != theirs(hf, repetition_penalty=1.0), "the penalty must matter here"
    assert max(len(answer) for answer in expected) < NEW_TOKENS, "both must end"
    told = Told()
    logging.getLogger("megavlm.inference.load").addHandler(told)
    loaded = load_for_inference(hf, ctx=ctx)
    (text,) = told.texts
    assert "temperature=0.1" in text and "top_p=0.01" in text and "answers are greedy" in text
    assert not set(Chat("megavlm", loaded.tokenizer).stop_ids) & {token for answer in free for token in answer}
    assert ours(loaded) == expected
    assert ours(loaded, repetition_penalty=1.0) == theirs(hf, repetition_penalty=1.0)
    assert loaded.text(expected[0]) == loaded.tokenizer.decode(expected[0][:-1]), "an end token is not shown"
    import_hf(hf, tmp_path / "imported")
    assert ours(load_for_inference(tmp_path / "imported", ctx=ctx)) == expected


@in_rank
def test_without_the_file_config_json_has_the_say(folder, ctx, tmp_path):
    end = theirs(folder, repetition_penalty=1.3)[0][6]
    shutil.copytree(folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": end, "repetition_penalty": 1.3}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    expected = theirs(tmp_path / "hf")
    assert len(expected[0]) <= 7
    assert expected != theirs(tmp_path / "hf", repetition_penalty=1.0), "the penalty must matter here"
    assert ours(load_for_inference(tmp_path / "hf", ctx=ctx)) == expected


def test_what_is_not_taken_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"no_repeat_ngram_size": 3, "num_beams": 4, "temperature": 0.5, "eos_token_id": 7, "min_length": 0})
    )
    found = generation_defaults(tmp_path)
    assert (found.stop_ids, found.repetition_penalty) == ((7,), 1.0)
    assert found.not_taken == ("no_repeat_ngram_size=3", "num_beams=4")


@pytest.mark.parametrize(
    ("values", "problem"), [({"eos_token_id": ["a"]}, "eos_token_id"), ({"repetition_penalty": -1}, "repetition_penalty")]
)
def test_what_is_no_number_is_refused(tmp_path, values, problem):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(HuggingFaceError, match=problem):
        generation_defaults(tmp_path)
