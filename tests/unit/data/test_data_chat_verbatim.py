"""Whatever an answer holds (JSON, tables, code, any character, spaces anywhere) is trained bit for bit, or refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megavlm.data.chat import Chat, ChatError
from megavlm.data.tokenizer import SentencePieceTokenizer, load_tokenizer

MARKERS = ["<image>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>", "<|im_start|>", "<|im_end|>"]
MARKERS += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]
STRUCTURED = [
    json.dumps({"boxes": [[1, 2], [3.5, -4e-7]], "text": 'é "quoted" \\ \n 日本', "none": None}, indent=2, ensure_ascii=False),
    json.dumps({"a": {"b": []}}, indent="\t"),
    "| a  | b   |\n|:---|----:|\n| 1  |  2  |\n|    | x |\n",
    "def f(x):\n\tif x:\n\t\treturn  x  # two  spaces\n\n\n    return None\n",
    "a\r\nb\r\n\r\nc\rd",
    "   led and trailed by spaces   ",
    "tabs\t\tand \t mixed\t",
    "x" * 300 + " " * 60 + "y",
    "<ref>a cat</ref><box>(31,250),(499,999)</box>",
    "<table><tr><td>1</td></tr></table>",
    "e\u0301 \u00e9 \ufb01 \u2126 \u212b",  # characters that Unicode's normal forms would change
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u200b\u200e \ufeff \u00a0nbsp\u3000wide",
    "zero\x00byte \x07 \x1b[0m \x7f \x85 \u2028",
    "$\\frac{1}{2}$ \\begin{align} x &= y \\\\ \\end{align}",
    "1234567890 0.001 1e-10 000123",
]
KINDS = ["sentencepiece", "byte_level", "sentencepiece_in_hf"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer_of_kind(request, tokenizer, hf_folder):
    if request.param == "sentencepiece":
        return tokenizer
    byte_level = request.param == "byte_level"
    unknown = {} if byte_level else {"unk_token": "<unk>"}
    return load_tokenizer(hf_folder(MARKERS, None, byte_level, bos_token="<s>", eos_token="</s>", **unknown))


def answer_back(chat: Chat, answer: str, question: str = "What?") -> str:
    """The supervised text of one exchange, without its end token and the template's lead."""
    # "plain" writes nothing between the two: only a picture keeps the tokenizer from joining them.
    question = "<image>" if chat.template.name == "plain" else question
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    encoded = chat.encode_conversation(messages, [1] * question.count("<image>"))
    text = chat.tokenizer.decode(encoded.ids_L[encoded.supervised_L])
    lead = " " if chat.template.name == "llava-v1" else ""
    end = chat._stop_texts[0]
    assert text.startswith(lead) and text.endswith(end)
    return text[len(lead) : -len(end)]


@pytest.mark.parametrize("template", ["megavlm", "chatml", "llava-v1", "llama3", "plain"])
def test_structured_answers_are_kept(template, tokenizer_of_kind):
    chat = Chat(template, tokenizer_of_kind)
    for answer in STRUCTURED:
        assert answer_back(chat, answer) == answer


@pytest.mark.parametrize("template", ["megavlm", "llava-v1"])
@settings(max_examples=50, derandomize=True, deadline=None)
@given(answer=st.text(min_size=1, max_size=60) | st.text(st.sampled_from(' \t\r\n{}[]":,|aé日'), min_size=1, max_size=60))
@example(answer="a\u2581b")
def test_any_answer_is_kept_or_refused_by_name(template, tokenizer_of_kind, answer):
    chat = Chat(template, tokenizer_of_kind)
    metaspace = not (isinstance(chat.tokenizer, SentencePieceTokenizer) or chat.tokenizer.special_ids.get("<unk>") is not None)
    if not answer.strip():
        with pytest.raises(ChatError, match="without text"):
            answer_back(chat, answer)
    elif "\u2581" in answer and not metaspace:
        with pytest.raises(ChatError, match="supervised tokens decode to"):
            answer_back(chat, answer)
    else:
        assert answer_back(chat, answer) == answer


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    question=st.text(max_size=40),
    answers=st.lists(st.text(st.characters(exclude_categories=["Cs", "Zs", "Cc"]), min_size=1), min_size=1, max_size=3),
)
def test_several_turns(tokenizer_of_kind, question, answers):
    chat = Chat("chatml", tokenizer_of_kind)
    if any("\u2581" in a or not a.strip() for a in answers):
        return
    messages = [m for a in answers for m in ({"role": "user", "content": question}, {"role": "assistant", "content": a})]
    encoded = chat.encode_conversation(messages, [])
    assert chat.tokenizer.decode(encoded.ids_L[encoded.supervised_L]) == "".join(a + "<|im_end|>" for a in answers)


def test_an_answer_that_joins_its_question_is_named(tokenizer_of_kind):
    chat = Chat("plain", tokenizer_of_kind)
    messages = [{"role": "user", "content": "The num"}, {"role": "assistant", "content": "ber"}]
    with pytest.raises(ChatError, match="joins it with what stands before"):
        chat.encode_conversation(messages, [])


def test_what_a_tokenizer_cannot_write_is_named(tmp_path):
    import io

    import sentencepiece as spm

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["plain ascii text only, and some more of it\n"] * 50), model_writer=model, vocab_size=60, model_type="bpe",
        byte_fallback=False, add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=MARKERS[:5], hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "small.model").write_bytes(model.getvalue())
    chat = Chat("megavlm", load_tokenizer(tmp_path / "small.model"))
    assert answer_back(chat, "plain text") == "plain text"
    with pytest.raises(ChatError, match=r"cannot represent '日' in 'plain 日<\|end\|>'"):
        answer_back(chat, "plain 日")


def test_a_tokenizer_that_normalises_is_named(hf_folder):
    """Qwen's does NFC: an answer in another normal form would be trained as another text."""
    from tokenizers import Tokenizer, normalizers

    folder = hf_folder(MARKERS, None, True, eos_token="</s>")
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tok.normalizer = normalizers.NFC()
    tok.save(str(folder / "tokenizer.json"))
    chat = Chat("chatml", load_tokenizer(folder))
    assert answer_back(chat, "caf\u00e9") == "caf\u00e9"
    with pytest.raises(ChatError, match="the tokenizer changes this text"):
        answer_back(chat, "cafe\u0301")
    assert answer_back(chat, "fine", question="cafe\u0301") == "fine"
