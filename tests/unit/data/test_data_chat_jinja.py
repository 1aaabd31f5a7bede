"""Hugging Face chat templates: text and ids equal apply_chat_template's, masks decode to the answers, and traps are refused by name.

The templates are those of well-known models, rewritten short; what each does is in its first line.
"""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.chat import Chat, ChatError
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.tokenizer import load_tokenizer

FOLDER = Path(__file__).parent / "templates"
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@dataclass(frozen=True)
class Model:
    """What the tests need to know of a template."""

    special: list[str]
    end: str
    eos: str
    bos: str | None = None
    image: str = IMAGE_TOKEN
    picture: str | None = None
    """Text of a picture; None where pictures are marks in a string."""
    lead: str = ""
    system: bool = True
    byte_level: bool = True
    rstrip: bool = False


MODELS = {
    "qwen2_vl": Model(
        [*CHATML, "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|endoftext|>"], "<|im_end|>", "<|im_end|>",
        image="<|image_pad|>", picture="<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "qwen2_5": Model([*CHATML, "<|endoftext|>"], "<|im_end|>", "<|endoftext|>"),
    "qwen3": Model([*CHATML, "<|endoftext|>"], "<|im_end|>", "<|im_end|>"),
    "llama3_2": Model(LLAMA, "<|eot_id|>", "<|eot_id|>", bos="<|begin_of_text|>"),
    "llama3_2_vision": Model(
        [*LLAMA, "<|image|>"], "<|eot_id|>", "<|eot_id|>", bos="<|begin_of_text|>", image="<|image|>", picture="<|image|>", system=False
    ),
    "mistral": Model(["<s>", "</s>", "[INST]", "[/INST]"], "</s>", "</s>", bos="<s>", lead=" ", system=False, byte_level=False),
    "gemma3": Model(
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"], "<end_of_turn>", "<eos>", bos="<bos>",
        image="<start_of_image>", picture="<start_of_image>",
    ),
    "phi3": Model(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"], "<|end|>", "<|endoftext|>", rstrip=True),
    "internvl3": Model([*CHATML, "<IMG_CONTEXT>"], "<|im_end|>", "<|im_end|>", image="<IMG_CONTEXT>", picture="<IMG_CONTEXT>\n"),
    "generation": Model(CHATML, "<|im_end|>\n", "<|im_end|>"),
    "smolvlm": Model(
        ["<|im_start|>", "<end_of_utterance>", "<image>"], "<end_of_utterance>", "<end_of_utterance>", picture="<image>", lead=" "
    ),
}  # fmt: skip
WITHOUT_END = {
    "llava_1_5": Model(["<s>", "</s>", "<image>"], "", "</s>", bos="<s>", picture="<image>\n", byte_level=False),
    "llava_next_mistral": Model(["<s>", "</s>", "<image>"], "", "</s>", bos="<s>", picture="<image>\n", byte_level=False),
}
ANSWERS = ["it's 42", '{"a": [1, 2],\n  "b": "é 日本"}']


def turns(with_images: bool = True) -> list[dict[str, str]]:
    first, second = ("<image>\nWhat number?", "And\n<image><image> here?") if with_images else ("What number?", "And here?")
    return [
        {"role": "user", "content": first},
        {"role": "assistant", "content": ANSWERS[0]},
        {"role": "user", "content": second},
        {"role": "assistant", "content": ANSWERS[1]},
    ]


def as_parts(messages: list[dict[str, str]], always: bool) -> list[dict]:
    """The conversation as a user of transformers would write it for a template that takes parts."""
    parted = []
    for message in messages:
        pieces = message["content"].split("<image>")
        parts = [{"type": "text", "text": pieces[0]}] if pieces[0] or len(pieces) == 1 else []
        for piece in pieces[1:]:
            text = piece[1:] if piece[:1] == "\n" else piece
            parts += [{"type": "image"}] + ([{"type": "text", "text": text}] if text else [])
        parted.append({**message, "content": parts if always or len(pieces) > 1 else message["content"]})
    return parted


class Bound:
    """A template with a tiny tokenizer, ours and transformers'."""

    def __init__(self, name: str, hf_folder) -> None:
        from transformers import AutoTokenizer

        self.model = {**MODELS, **WITHOUT_END}[name]
        source = (FOLDER / f"{name}.jinja").read_text()
        m = self.model
        unk = {} if m.byte_level else {"unk_token": "<unk>"}
        self.folder = hf_folder(m.special, source, m.byte_level, m.rstrip, bos_token=m.bos, eos_token=m.eos, **unk)
        self.theirs = AutoTokenizer.from_pretrained(self.folder)
        self.tokenizer = load_tokenizer(self.folder, m.image)
        self.chat = Chat("tokenizer", self.tokenizer)

    def expected(self, messages, **options) -> str:
        """transformers' text; its date is set to the one that training uses."""
        converted = messages
        if self.model.picture is not None:
            converted = as_parts(messages, always=self.chat.template._as_parts["user"])
        else:
            converted = [{**m, "content": m["content"].replace("<image>", self.model.image)} for m in messages]
        return self.theirs.apply_chat_template(converted, tokenize=False, date_string="26 Jul 2024", **options)


@pytest.fixture(scope="module")
def bound(hf_folder):
    made: dict[str, Bound] = {}

    def get(name: str) -> Bound:
        if name not in made:
            made[name] = Bound(name, hf_folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", [*MODELS, *WITHOUT_END])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_prompt_text_equals_transformers(name, system, images, bound):
    b = bound(name)
    if system and images and name == "llama3_2_vision":
        with pytest.raises(ChatError, match="Prompting with images is incompatible with system messages"):
            b.chat.encode_prompt([{"role": "system", "content": "Be brief."}, *turns()[:3]], [1] * 3)
        return
    messages = [{"role": "system", "content": "Be brief."}] * system + turns(images)[:3]
    wanted = b.expected(messages, add_generation_prompt=True)
    assert b.chat.template.render(messages, generation_prompt=True).text == wanted
    num_images = 3 if images else 0
    ids = b.chat.encode_prompt(messages, [1] * num_images)
    if b.model.picture is not None or not images:  # the twin tokenizer has no "<image>" of ours
        assert ids.tolist() == b.theirs(wanted, add_special_tokens=False)["input_ids"]
    assert (ids == b.tokenizer.image_token_id).sum() == num_images if images else True


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_text_and_mask(name, system, images, bound):
    b = bound(name)
    if system and not b.model.system:
        pytest.skip("refuses or drops it: test_traps")
    messages = [{"role": "system", "content": "Be brief."}] * system + turns(images)
    wanted = b.expected(messages)
    assert b.chat.template.render(messages).text == wanted
    sizes = [3, 1, 2] if images else []
    encoded = b.chat.encode_conversation(messages, sizes)
    supervised = encoded.ids_L[encoded.supervised_L]
    assert b.tokenizer.decode(supervised) == "".join(b.model.lead + a + b.model.end for a in ANSWERS)
    plain = encoded.ids_L[encoded.ids_L != b.tokenizer.image_token_id]
    kept = [i for i in b.tokenizer.encode(wanted).ids if i != b.tokenizer.image_token_id]
    assert plain.tolist() == kept
    if images:
        assert (encoded.ids_L == b.tokenizer.image_token_id).sum() == sum(sizes)
    prompt = b.chat.encode_prompt(messages[:-1], sizes)
    if name not in ("qwen3", "phi3"):  # Qwen3 thinks about the last question only; Phi-3 closes a text with eos
        assert encoded.ids_L[: len(prompt)].tolist() == prompt.tolist(), "generation continues exactly what training saw"


@pytest.mark.parametrize("name", ["generation"])
def test_mask_equals_transformers_where_the_template_says_it(name, bound):
    b = bound(name)
    theirs = b.theirs.apply_chat_template(turns(False), return_dict=True, return_assistant_tokens_mask=True)
    encoded = b.chat.encode_conversation(turns(False), [])
    assert encoded.ids_L.tolist() == theirs["input_ids"]
    assert encoded.supervised_L.astype(int).tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("name", MODELS)
def test_stop_ids_are_eos_and_the_end_of_an_answer(name, bound):
    b = bound(name)
    wanted = {b.model.eos, b.model.end.strip()}
    assert b.chat.stop_ids == sorted(b.theirs.convert_tokens_to_ids(list(wanted)))


@pytest.mark.parametrize("name", [*MODELS, *WITHOUT_END])
def test_exported_template_is_the_models_own(name, bound):
    assert bound(name).chat.jinja() == bound(name).theirs.chat_template


@pytest.mark.parametrize("name", WITHOUT_END)
def test_templates_without_an_end_generate_but_do_not_train(name, bound):
    b = bound(name)
    assert b.chat.stop_ids == [b.tokenizer.eos_id]
    with pytest.raises(ChatError, match="would not learn to stop.*llava-v1"):
        b.chat.encode_conversation(turns(), [1] * 3)


def said(answer: str, question: str = "Why?") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("llama3_2", said("trimmed \n"), "changes an assistant message"),
        ("gemma3", said("  trimmed"), "changes an assistant message"),
        ("qwen3", said("<think>hm</think>yes") + said("no"), "changes an assistant message"),
        ("phi3", said(" swallowed"), "supervised tokens decode to"),
        ("mistral", said("a") + said("b")[1:], "conversation roles must alternate"),
        ("mistral", [{"role": "system", "content": "Be brief."}, *said("a")], "leaves out or changes message 0"),
        ("qwen2_vl", said("a<|im_end|>"), "would be read as a special token"),
        ("qwen2_vl", said("a", "b<|vision_start|>"), "would be read as a special token"),
        ("qwen2_vl", said("a", "b<|image_pad|>"), "would be read as a special token"),
        ("qwen2_vl", said("see <image>"), "the messages hold 1"),
        ("qwen2_vl", said("a")[:1], "no token is supervised"),
        ("qwen2_vl", said("a\ud800b"), "half of a character"),
        ("generation", [{"role": "tool", "content": "x"}], "no token is supervised"),
    ],
)
def test_traps(name, messages, message, bound):
    with pytest.raises(ChatError, match=message):
        bound(name).chat.encode_conversation(messages, [])


PIECES = st.lists(
    st.sampled_from([*"a\u00e9\u65e5 \n\t{}|", "The number", "<image>", "<image>\n", "<b>", "USER:", "\r\n"]), max_size=6
).map("".join)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=40, derandomize=True, deadline=None)
@given(system=st.none() | PIECES, exchanges=st.lists(st.tuples(PIECES, PIECES), min_size=1, max_size=3))
def test_random_conversations_are_right_or_refused(name, system, exchanges, bound):
    b = bound(name)
    messages = [] if system is None else [{"role": "system", "content": system.replace("<image>", "")}]
    for question, answer in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.replace("<image>", "")}]
    sizes = [2] * sum(m["content"].count("<image>") for m in messages)
    try:
        encoded = b.chat.encode_conversation(messages, sizes)
    except ChatError:
        return
    assert b.chat.template.render(messages).text == b.expected(messages)
    answers = "".join(b.model.lead + m["content"] + b.model.end for m in messages if m["role"] == "assistant")
    assert b.tokenizer.decode(encoded.ids_L[encoded.supervised_L]) == answers
    assert (encoded.ids_L == b.tokenizer.image_token_id).sum() == sum(sizes)


def test_a_changed_answer_in_a_generation_block(hf_folder):
    source = (
        (FOLDER / "generation.jinja")
        .read_text()
        .replace("message['content'] + '<|im_end|>\\n'", "message['content'] | trim + '<|im_end|>'")
    )
    chat = Chat("tokenizer", load_tokenizer(hf_folder(CHATML, source, eos_token="<|im_end|>")))
    assert chat.encode_conversation(said("fine"), []).num_targets
    with pytest.raises(ChatError, match="changes message 1"):
        chat.encode_conversation(said("trimmed "), [])


def test_the_image_token_must_be_the_templates(hf_folder, bound):
    folder = bound("qwen2_vl").folder
    chat = Chat("tokenizer", load_tokenizer(folder))
    assert chat.encode_conversation(said("text only is fine"), []).num_targets
    with pytest.raises(ChatError, match=r"writes a picture as '<\|vision_start\|><\|image_pad\|><\|vision_end\|>'.*set data.image_token"):
        chat.encode_conversation(turns(), [1] * 3)


def test_what_does_not_depend_on_the_day(bound):
    text = bound("llama3_2").chat.template.render(said("a")).text
    assert "Today Date: 26 Jul 2024" in text


def test_where_templates_are_found(hf_folder, bound, tmp_path):
    source, other = (FOLDER / "qwen2_5.jinja").read_text(), (FOLDER / "qwen3.jinja").read_text()
    folder = hf_folder(CHATML, None, eos_token="<|im_end|>")
    with pytest.raises(ChatError, match="brings no chat template"):
        Chat("tokenizer", load_tokenizer(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": other}, {"name": "default", "template": source}]
    for found, wanted in ((source, source), (named, source), ({"default": other}, other)):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": found}))
        assert Chat("tokenizer", load_tokenizer(folder)).jinja() == wanted
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named[:1]}))
    with pytest.raises(ValueError, match='chat templates tool_use and none named "default"'):
        Chat("tokenizer", load_tokenizer(folder))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": other}))
    assert Chat("tokenizer", load_tokenizer(folder)).jinja() == other, "the processor's goes before the tokenizer's"
    (folder / "chat_template.jinja").write_text(source)
    assert Chat("tokenizer", load_tokenizer(folder)).jinja() == source
    file = tmp_path / "mine.jinja"
    file.write_text(source)
    assert Chat(str(file), load_tokenizer(folder)).jinja() == source
    for text, message in (("{% for %}", "not valid Jinja"), ("{{ 1 }}", "cannot render a message of role user"), (None, "no such file")):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(ChatError, match=message):
            Chat(str(file), load_tokenizer(folder))


def test_a_jinja_file_goes_with_sentencepiece(tokenizer, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text((FOLDER / "qwen2_5.jinja").read_text())
    chat = Chat(str(file), tokenizer)
    encoded = chat.encode_conversation([{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "this"}], [4])
    assert tokenizer.decode(encoded.ids_L[encoded.supervised_L]) == "this<|im_end|>"
    assert (encoded.ids_L == tokenizer.image_token_id).sum() == 4


def test_built_in_templates_write_the_tokenizers_image_token(bound):
    b = bound("qwen2_vl")
    chat = Chat("chatml", b.tokenizer)
    encoded = chat.encode_conversation(turns(), [2, 1, 1])
    assert (encoded.ids_L == b.tokenizer.token_id("<|image_pad|>")).sum() == 4
    rendered = b.theirs.apply_chat_template(as_parts(turns()[:2], False), chat_template=chat.jinja(), tokenize=False)
    assert rendered == chat._render(turns()[:2], False).text, "exported: a picture part is the token and a line break"
    with pytest.raises(ChatError, match="would be read as a special token"):
        chat.encode_conversation(said("a", "<|image_pad|>"), [])


@pytest.mark.parametrize(("built_in", "name"), [("chatml", "internvl3"), ("llama3", "llama3_2_vision")])
def test_named_templates_are_the_families_own(built_in, name, bound):
    """Llama 3.2 Vision adds no date where there are no pictures to look for; InternVL's is plain ChatML."""
    b = bound(name)
    messages = [{"role": "system", "content": "Be brief."}, *turns(False)]
    named = Chat(built_in, b.tokenizer)
    assert named._render(messages, False).text == b.expected(messages)
    ours, theirs = named.encode_conversation(messages, []), b.chat.encode_conversation(messages, [])
    assert ours.ids_L.tolist() == theirs.ids_L.tolist()
    assert ours.supervised_L.tolist() == theirs.supervised_L.tolist()


def test_threads_share_a_generation_template(bound):
    chat = bound("generation").chat
    talks = [said(f"answer {i}", f"question {i}") for i in range(60)]
    alone = [chat.encode_conversation(t, []) for t in talks]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda t: (chat.encode_prompt(t[:1], []), chat.encode_conversation(t, []))[1], talks * 3))
    for i, encoded in enumerate(together):
        assert encoded.ids_L.tolist() == alone[i % 60].ids_L.tolist()
        assert encoded.supervised_L.tolist() == alone[i % 60].supervised_L.tolist()


def test_chats_can_be_sent_to_workers_and_have_fingerprints(bound):
    chats = [bound(name).chat for name in ("qwen2_vl", "generation", "mistral")]
    assert len({c.fingerprint for c in chats}) == 3
    for chat in chats:
        copy = pickle.loads(pickle.dumps(chat))
        assert copy.fingerprint == chat.fingerprint
        assert copy.encode_conversation(said("yes"), []).ids_L.tolist() == chat.encode_conversation(said("yes"), []).ids_L.tolist()
    assert Chat("chatml", chats[0].tokenizer).fingerprint != Chat("chatml", load_tokenizer(bound("qwen2_vl").folder)).fingerprint
