"""Tokenizers: the exported Hugging Face tokenizer gives our ids, offsets cover the text, decode undoes encode."""

from __future__ import annotations

import io
import json
import random

import pytest

from megavlm.data.tokenizer import TokenizerError, load_tokenizer, train_sentencepiece

SPECIAL = ["<image>", "<|user|>", "<|assistant|>", "<|end|>"]
CORPUS = [f"The number {i} stands {i * 7} times on the page. Un été à Paris.\n" for i in range(300)]
STRINGS = [
    "<|user|><image>\nWhat number?<|end|><|assistant|>42<|end|>",
    " leading",
    "trailing  ",
    "  two  spaces \n\n\n lines\t",
    "<|end|>touching<|end|> spaced <|end|>",
    "été 日本語 \U0001f600 ½",
    "1234567 0.5, [0, 999]",
    "<|user|",
    "<unk> </s> <s><pad>",
    "a\u2581b",
    "<image><image> <image>",
    "",
]


def spm_file(path, **options):
    import sentencepiece as spm

    model = io.BytesIO()
    settings = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": SPECIAL,
        "hard_vocab_limit": False,
        "pad_id": 3,
        "minloglevel": 2,
    }
    spm.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **{**settings, **options})
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


@pytest.fixture(scope="module", params=["ours", "unigram", "dummy_prefix", "unigram_dummy_prefix", "no_byte_fallback"])
def spm(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "t.model"
    if request.param == "ours":
        return train_sentencepiece(CORPUS, path, 480, SPECIAL)
    options = {
        "unigram": {"model_type": "unigram"},
        "dummy_prefix": {"add_dummy_prefix": True},
        "unigram_dummy_prefix": {"add_dummy_prefix": True, "model_type": "unigram"},
        "no_byte_fallback": {"byte_fallback": False},
    }
    return spm_file(path, **options[request.param])


def fuzz(count):
    rng = random.Random(7)
    letters = [*"aeionstr 0123456789.,?\n", *SPECIAL, " ", "  ", "é", "日", "The ", "number", "\u00df"]
    return ["".join(rng.choice(letters) for _ in range(rng.randrange(1, 40))) for _ in range(count)]


def test_exported_hf_tokenizer_gives_the_same_ids_and_text(spm, tmp_path):
    from transformers import AutoTokenizer

    spm.save_hf(tmp_path, "{{ messages }}")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours_again = load_tokenizer(tmp_path)
    for text in STRINGS + fuzz(300):
        ids = spm.encode(text).ids
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert ours_again.encode(text).ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=False) == spm.decode(ids) == ours_again.decode(ids), text
    assert theirs.chat_template == "{{ messages }}"
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (spm.bos_id, spm.eos_id, spm.pad_id)
    assert len(theirs) == spm.vocab_size == ours_again.vocab_size
    assert theirs.convert_tokens_to_ids("<image>") == spm.image_token_id


def test_offsets_cover_the_text_and_agree_with_hf(spm, tmp_path):
    spm.save_hf(tmp_path)
    theirs = load_tokenizer(tmp_path)
    for text in STRINGS[:8] + fuzz(50):
        encoded = spm.encode(text)
        covered = {c for begin, end in encoded.offsets for c in range(begin, end)}
        assert covered == set(range(len(text))), text
        assert encoded.offsets == sorted(encoded.offsets)
        if not spm._dummy_prefix and spm._model.trainer_spec.model_type == 2:  # Hugging Face's Unigram lumps bytes of neighbours together
            assert encoded.offsets == theirs.encode(text).offsets, text


def test_own_tokenizer_is_lossless_and_splits_digits(tokenizer):
    for text in [s for s in STRINGS if "\u2581" not in s] + fuzz(100):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("4096").ids) == 4
    assert tokenizer.decode(tokenizer.encode("<|user|>hi<|end|>").ids, skip_special=True) == "hi"


def test_special_tokens_are_one_id_wherever_they_stand(tokenizer):
    alone = tokenizer.image_token_id
    for text in ("<image>", "x<image>y", " <image> ", "1<image>\n"):
        assert tokenizer.encode(text).ids.count(alone) == 1
    with pytest.raises(TokenizerError, match="no special token '<x>'"):
        tokenizer.token_id("<x>")


@pytest.mark.parametrize(
    "options", [{"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True}, {"treat_whitespace_as_suffix": True}]
)
def test_models_that_rewrite_text_are_refused(tmp_path, options):
    with pytest.raises(TokenizerError, match="rewrites text"):
        spm_file(tmp_path / "t.model", **options)


def test_fingerprint_follows_the_model(tokenizer, tmp_path):
    assert load_tokenizer(tokenizer.path).fingerprint == tokenizer.fingerprint
    assert train_sentencepiece(CORPUS, tmp_path / "other.model", 300, SPECIAL).fingerprint != tokenizer.fingerprint


def test_unusable_paths_and_sizes_say_why(tmp_path):
    with pytest.raises(TokenizerError, match="is empty"):
        load_tokenizer("")
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer(tmp_path / "no.model")
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"\xff\xfe not a model")
    with pytest.raises(TokenizerError):
        load_tokenizer(tmp_path / "x.model")
    with pytest.raises(TokenizerError, match="must contain"):
        train_sentencepiece(CORPUS, tmp_path / "t.model", 480, ["<|user|>"])
    with pytest.raises(TokenizerError, match="must exceed 264"):
        train_sentencepiece(CORPUS, tmp_path / "t.model", 200, SPECIAL)


def byte_level_folder(folder):
    """A Qwen-like byte-level BPE tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    tok.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    folder.mkdir(exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def test_hf_folder_gains_the_image_token_and_saves_it(tmp_path):
    from transformers import AutoTokenizer

    ours = load_tokenizer(byte_level_folder(tmp_path / "a"))
    ours.save_hf(tmp_path / "b", "x")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert ours.image_token_id == ours.vocab_size - 1 == theirs.convert_tokens_to_ids("<image>")
    assert ours.pad_id == ours.eos_id == theirs.eos_token_id
    for text in ("<|im_start|>user\n<image>\nété 日本<|im_end|>\n", " x "):
        assert ours.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text).ids) == text
    assert load_tokenizer(tmp_path / "b").encode("a<image>b") == ours.encode("a<image>b")
