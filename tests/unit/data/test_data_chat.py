"""Chat templates: text, ids and masks equal Hugging Face's; every way to get a wrong mask is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megavlm.config.data import CHAT_TEMPLATES
from megavlm.data.chat import TEMPLATES, Chat, ChatError
from megavlm.data.chat_sources import SOURCES
from megavlm.data.tokenizer import TokenizerError, load_tokenizer, train_sentencepiece

TURNS = [
    {"role": "user", "content": '<image>\nWhat "number" is \\n it?\n'},
    {"role": "assistant", "content": "it's 42 \n"},
    {"role": "user", "content": " and here: <image>? "},
    {"role": "assistant", "content": "  ç!"},
]
SYSTEM = {"role": "system", "content": "Be brief.\n"}


@pytest.fixture(scope="module")
def hf(tokenizer, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("hf")
    tokenizer.save_hf(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
def test_text_ids_and_mask_equal_hugging_face(name, system, tokenizer, hf):
    if name == "plain" and system:
        pytest.skip("plain has no system turn: test_roles_are_checked")
    chat = Chat(name, tokenizer)
    messages = [SYSTEM] * system + TURNS
    for prompt in (False, True):
        ours = chat.template.render(messages, bos="<s>", eos="</s>", generation_prompt=prompt).text
        assert ours == hf.apply_chat_template(messages, chat_template=chat.jinja(), tokenize=False, add_generation_prompt=prompt)
    theirs = hf.apply_chat_template(messages, chat_template=chat.jinja(), return_dict=True, return_assistant_tokens_mask=True)
    encoded = chat.encode_conversation(messages, [1, 1])
    assert encoded.ids_L.tolist() == theirs["input_ids"]
    assert encoded.supervised_L.astype(int).tolist() == theirs["assistant_masks"]
    asked = hf.apply_chat_template(messages[:-1], chat_template=chat.jinja(), add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat.encode_prompt(messages[:-1], [1, 1]).tolist() == asked
    assert encoded.ids_L[: len(asked)].tolist() == asked, "generation continues exactly what training saw"


def test_config_names_every_template():
    assert set(CHAT_TEMPLATES) == {*TEMPLATES, *SOURCES}


@pytest.mark.parametrize(
    ("name", "end", "lead"),
    [
        ("megavlm", "<|end|>", ""),
        ("chatml", "<|im_end|>", ""),
        ("llava-v1", "</s>", " "),
        ("plain", "</s>", ""),
        ("llama3", "<|eot_id|>", ""),
    ],
)
def test_supervised_tokens_decode_to_the_answers_and_their_ends(name, end, lead, tokenizer):
    chat = Chat(name, tokenizer)
    encoded = chat.encode_conversation(TURNS, [3, 2])
    wanted = "".join(lead + m["content"] + end for m in TURNS if m["role"] == "assistant")
    assert tokenizer.decode(encoded.ids_L[encoded.supervised_L]) == wanted
    assert encoded.num_targets == encoded.supervised_L.sum() > 0
    assert tokenizer.token_id(end) in chat.stop_ids


def test_placeholders_are_expanded_in_place(tokenizer):
    chat = Chat("megavlm", tokenizer)
    short, long = chat.encode_conversation(TURNS, [1, 1]), chat.encode_conversation(TURNS, [4, 7])
    image = tokenizer.image_token_id
    assert (long.ids_L == image).sum() == 11
    assert len(long.ids_L) == len(short.ids_L) + 9
    assert not long.supervised_L[long.ids_L == image].any()
    runs = np.flatnonzero(np.diff((long.ids_L == image).astype(int)))
    assert np.diff(runs)[[0, 2]].tolist() == [4, 7]
    np.testing.assert_array_equal(long.ids_L[long.ids_L != image], short.ids_L[short.ids_L != image])


def test_llava_processor_with_our_jinja_gives_our_prompt(tokenizer, hf):
    from PIL import Image
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    chat = Chat("megavlm", tokenizer)
    pixels = CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(pixels, hf, patch_size=8, vision_feature_select_strategy="full", chat_template=chat.jinja())
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What number?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    theirs = processor(images=Image.new("RGB", (32, 32)), text=text)["input_ids"]
    ours = chat.encode_prompt([{"role": "user", "content": "<image>\nWhat number?"}], [16])
    assert list(np.asarray(theirs).ravel()) == ours.tolist()


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        (TURNS, [1], '2 "<image>" but the sample has 1 images'),
        ([{"role": "user", "content": "hi"}], [], "no token is supervised"),
        ([{"role": "user", "content": "say <|end|>"}, {"role": "assistant", "content": "x"}], [], "contains '<|end|>'"),
        ([{"role": "user", "content": "draw"}, {"role": "assistant", "content": "<image>"}], [1], "contains '<image>'"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}], [], "without text"),
        ([{"role": "robot", "content": "hi"}], [], "role 'robot'"),
        ([*TURNS, SYSTEM], [1, 1], "only as the first"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a\u2581b"}], [], "supervised tokens decode to"),
    ],
)
def test_conversations_with_a_wrong_mask_are_refused(messages, images, message, tokenizer):
    with pytest.raises(ChatError) as error:
        Chat("megavlm", tokenizer).encode_conversation(messages, images)
    assert message in str(error.value)


def test_roles_are_checked(tokenizer):
    with pytest.raises(ChatError, match="role 'system'; template 'plain' knows user, assistant"):
        Chat("plain", tokenizer).encode_conversation([SYSTEM, *TURNS], [1, 1])
    with pytest.raises(ChatError, match="is not one of"):
        Chat("vicuna", tokenizer)


def test_a_tokenizer_without_the_templates_tokens_is_refused(tmp_path):
    bare = train_sentencepiece(["a b c\n"] * 10, tmp_path / "t.model", 300, ["<image>"])
    with pytest.raises(TokenizerError, match="no special token"):
        Chat("chatml", bare)


def test_merges_across_the_span_are_caught(tmp_path):
    """A byte-level tokenizer that has learned "\\n\\n" merges the header's line break with an answer's: the mask cannot be exact."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(["\n\n\n\n"] * 50, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    tok.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tok.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    chat = Chat("chatml", load_tokenizer(tmp_path))
    ask = {"role": "user", "content": "hi"}
    chat.encode_conversation([ask, {"role": "assistant", "content": "fine\n\n"}], [])
    with pytest.raises(ChatError, match="supervised tokens decode to"):
        chat.encode_conversation([ask, {"role": "assistant", "content": "\nnot fine"}], [])
