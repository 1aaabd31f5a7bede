"""Tokens round and between visual tokens: prompts equal those of Hugging Face's processors, token for token."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.config.schema import ImageConfig, ModelConfig, PictureMarks
from megavlm.data.chat import Chat, ChatError
from megavlm.data.picture_marks import written_out
from megavlm.data.resizing import ResizingError, make_resizing
from megavlm.data.tokenizer import load_tokenizer

MESSAGES = [
    {"role": "user", "content": "<image>What is this? <image><image> And<image>"},
    {"role": "assistant", "content": "A cat, two dogs."},
    {"role": "user", "content": "And <image>this?"},
]
SIZES = [(40, 30), (16, 16), (100, 20), (13, 47), (64, 64)]
TEMPLATE = (
    "{{% for m in messages %}}<s>{{{{ m.role }}}}\n{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{{% for p in m.content %}}"
    "{{% if p.type == 'image' %}}{picture}{{% else %}}{{{{ p.text }}}}{{% endif %}}{{% endfor %}}{{% endif %}}<end>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<s>assistant\n{{% endif %}}"
)
ROWS_AND_COLUMNS = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]


@dataclass(frozen=True)
class Family:
    """One processor, and what makes the same of a picture here."""

    processor: str
    image_processor: str
    settings: dict[str, Any]
    image: dict[str, Any]
    marks: dict[str, Any]
    token: str = "<image>"
    special: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    shuffle: int = 1


SPLIT_MARKS = {
    "after": "<fake_token_around_image>",
    "tile_before": "<fake_token_around_image><row_{row}_col_{column}>",
    "tile_row_end": "\n",
    "whole_before": "\n<fake_token_around_image><global-img>",
    "single_before": "<fake_token_around_image><global-img>",
}
FAMILIES = {
    "idefics3": Family(
        "Idefics3Processor",
        "Idefics3ImageProcessorPil",
        {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}},
        {"policy": "split", "longest_edge_px": 48},
        SPLIT_MARKS,
        special=("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *ROWS_AND_COLUMNS),
        options={"image_seq_len": 4},
        shuffle=2,
    ),
    "pixtral": Family(
        "PixtralProcessor",
        "PixtralImageProcessorPil",
        {"size": {"longest_edge": 64}, "patch_size": 4},
        {"policy": "native", "longest_edge_px": 64, "whole_patches": "stretch", "min_tokens_per_image": 1},
        {"row_end": "[IMG_BREAK]", "last_row_end": "[IMG_END]"},
        token="[IMG]",
        special=("[IMG_BREAK]", "[IMG_END]"),
        options={"patch_size": 4, "spatial_merge_size": 1},
    ),
    "idefics2": Family(
        "Idefics2Processor",
        "Idefics2ImageProcessorPil",
        {"size": {"longest_edge": 16, "shortest_edge": 16}, "do_image_splitting": False},
        {"policy": "fixed"},
        {"before": "<fake_token_around_image>", "after": "<fake_token_around_image>", "merge": True, "word_space": True},
        special=("<fake_token_around_image>", "<end_of_utterance>"),
        options={"image_seq_len": 16},
    ),
    "gemma3": Family(
        "Gemma3Processor",
        "Gemma3ImageProcessorPil",
        {"size": {"height": 16, "width": 16}},
        {"policy": "fixed"},
        {"written": "<start_of_image>", "before": "\n\n<start_of_image>", "after": "<end_of_image>\n\n"},
        token="<image_soft_token>",
        special=("<start_of_image>", "<end_of_image>"),
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        options={"image_seq_length": 16},
    ),
    "internvl": Family(
        "InternVLProcessor",
        "GotOcr2ImageProcessorPil",
        {"size": {"height": 16, "width": 16}, "crop_to_patches": True, "min_patches": 1, "max_patches": 6},
        {"policy": "tiles", "max_tiles": 6, "thumbnail": True},
        {"before": "<img>", "after": "</img>"},
        token="<IMG_CONTEXT>",
        special=("<img>", "</img>", "<video>"),
        named={
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
        },
        options={"image_seq_length": 4},
        shuffle=2,
    ),
}  # fmt: skip


def make_tokenizer(folder: Path, family: Family) -> Any:
    """A byte-level BPE with the family's special tokens, as a Hugging Face folder."""
    tok = FastTokenizer(BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<end>", "<pad>", family.token, *family.special]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False
    )
    tok.train_from_iterator(["user: What is this? A cat, two dogs.\n\nAnd this?\n" * 3], trainer)
    tok.save(str(folder / "tokenizer.json"))
    template = TEMPLATE.format(picture=family.marks.get("written") or family.token)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": "<end>", "pad_token": "<pad>",
        "bos_token": "<s>", "chat_template": template, "extra_special_tokens": family.named,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return quiet_transformers().AutoTokenizer.from_pretrained(str(folder))


def small_model(family: Family) -> ModelConfig:
    return ModelConfig.model_validate({"vision": {"image_size_px": 16, "patch_size_px": 4}, "projector": {"pixel_shuffle": family.shuffle}})


def parts(message: dict[str, str]) -> dict[str, Any]:
    """A message as Hugging Face's templates take it."""
    first, *others = message["content"].split("<image>")
    content: list[dict[str, str]] = [{"type": "text", "text": first}] if first else []
    for text in others:
        content += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return {"role": message["role"], "content": content}


def replacing(name: str, family: Family, text: str, fast: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of a prompt by the processor's own rule for one picture; building the whole processor would take torchvision."""
    for module in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional"):
        monkeypatch.setitem(sys.modules, module, MagicMock(__spec__=None))
    cls = getattr(importlib.import_module(f"transformers.models.{name}.processing_{name}"), family.processor)
    resizing = make_resizing(ImageConfig.model_validate(family.image), small_model(family))
    grids = [resizing.grid(*size) for size in SIZES]
    own = SimpleNamespace(
        **family.options, image_token=family.token, image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]",
        start_image_token="<img>", end_image_token="</img>",
    )  # fmt: skip
    inputs = {"image_sizes": [(g.rows * 4, g.cols * 4) for g in grids], "num_patches": [g.work.tiles for g in grids]}
    pieces = text.split(family.token)
    expanded = "".join(a + cls.replace_image_token(own, inputs, i) for i, a in enumerate(pieces[:-1])) + pieces[-1]
    return list(fast(expanded, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_equal_the_processors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, tf = FAMILIES[name], quiet_transformers()
    fast = make_tokenizer(tmp_path, family)
    text = fast.apply_chat_template([parts(m) for m in MESSAGES], tokenize=False, add_generation_prompt=True)
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (h, w, 3), dtype=np.uint8)) for i, (w, h) in enumerate(SIZES)]
    if name in ("pixtral", "internvl"):
        theirs = replacing(name, family, text, fast, monkeypatch)
    else:
        image_processor = getattr(tf, family.image_processor)(**family.settings)
        processor = getattr(tf, family.processor)(image_processor=image_processor, tokenizer=fast, **family.options)
        theirs = processor(text=[text], images=[pictures], add_special_tokens=False)["input_ids"][0]
    image = ImageConfig.model_validate({**family.image, "marks": family.marks})
    model = small_model(family)
    tokenizer = load_tokenizer(tmp_path, family.token)
    resizing = make_resizing(image, model, tokenizer)
    grids = [resizing.grid(*size) for size in SIZES]
    ours = Chat("tokenizer", tokenizer, image.marks).encode_prompt(MESSAGES, [resizing.sequence(grid) for grid in grids])
    assert ours.tolist() == list(theirs)
    visual = int((ours == tokenizer.image_token_id).sum())
    assert visual < len(ours) and (sum(grid.tokens for grid in grids) == visual) == (not image.marks.inner)
    pieces = [resizing.sequence(grid) for grid in grids]
    assert [grid.tokens for grid in grids] == [p if isinstance(p, int) else len(p) for p in pieces], "lengths that packing counts on"


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_stay_supervised(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    make_tokenizer(tmp_path, family)
    tokenizer = load_tokenizer(tmp_path, family.token)
    chat = Chat("tokenizer", tokenizer, PictureMarks.model_validate(family.marks))
    encoded = chat.encode_conversation([*MESSAGES, {"role": "assistant", "content": "Yes."}], [3, 1, 2, 1, 4])
    assert tokenizer.decode(encoded.ids_L[encoded.supervised_L].tolist()) == "A cat, two dogs.<end>Yes.<end>"
    assert int((encoded.ids_L == tokenizer.image_token_id).sum()) == 11
    assert int((encoded.plain_ids == tokenizer.image_token_id).sum()) == 5
    plain = Chat("tokenizer", tokenizer, PictureMarks(written=family.marks.get("written", "")))
    assert chat.fingerprint != plain.fingerprint or not PictureMarks.model_validate(family.marks).before + family.marks.get("after", "")


@pytest.mark.parametrize("name", ["idefics3", "pixtral"])
def test_caps_hold_for_marks_too(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    make_tokenizer(tmp_path, family)
    tokenizer = load_tokenizer(tmp_path, family.token)
    model = small_model(family)
    resizing = make_resizing(ImageConfig.model_validate({**family.image, "marks": family.marks}), model, tokenizer)
    for size in SIZES:
        whole, least, before = resizing.grid(*size), resizing.least(*size), 0
        for cap in range(least, whole.tokens + 2):
            grid = resizing.grid(*size, cap)
            assert before <= grid.tokens <= cap and len(resizing.sequence(grid)) == grid.tokens
            before = grid.tokens
        assert before == whole.tokens
        with pytest.raises(ResizingError, match=f"needs at least {least}"):
            resizing.grid(*size, least - 1)


def test_spans_move_with_what_is_put_in() -> None:
    marks = PictureMarks(before="<a>", after="<bc>")
    text = "x<i>y ANSWER <i><i> OTHER"
    spans = [(text.index("ANSWER"), text.index("ANSWER") + 6), (text.index("OTHER"), len(text))]
    new, moved = written_out(text, spans, "<i>", marks)
    assert new == "x<a><i><bc>y ANSWER <a><i><bc><a><i><bc> OTHER"
    assert [new[a:b] for a, b in moved] == ["ANSWER", "OTHER"]


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="go with policy=native, not fixed"):
        ImageConfig.model_validate({"marks": {"row_end": "x"}})
    with pytest.raises(ValueError, match="go with policy=split, not native"):
        ImageConfig.model_validate({"policy": "native", "marks": {"tile_before": "x"}})
    family = FAMILIES["pixtral"]
    make_tokenizer(tmp_path, family)
    with pytest.raises(ChatError, match="holds data.image_token"):
        Chat("tokenizer", load_tokenizer(tmp_path, "[IMG]"), PictureMarks(before="[IMG]"))
    with pytest.raises(ResizingError, match="takes the tokenizer"):
        make_resizing(ImageConfig.model_validate({**family.image, "marks": family.marks}), ModelConfig())


def test_paligemma_prompts_equal_the_processors(tmp_path: Path) -> None:
    """Its folders bring no chat template: the one here puts pictures first, then bos, as its processor does."""
    tf, family = quiet_transformers(), Family("PaliGemmaProcessor", "SiglipImageProcessorPil", {}, {}, {})
    fast = make_tokenizer(tmp_path, family)
    image_processor = tf.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    image_processor.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(image_processor=image_processor, tokenizer=fast)
    picture = Image.new("RGB", (30, 20))
    tokenizer = load_tokenizer(tmp_path)
    chat = Chat("paligemma", tokenizer)
    for text in ("<image>caption en", "<image>\ncaption en"):
        theirs = processor(text=["caption en"], images=[[picture]])["input_ids"][0]
        assert chat.encode_prompt([{"role": "user", "content": text}], [16]).tolist() == list(theirs)
    talk = [{"role": "user", "content": "<image>caption en"}, {"role": "assistant", "content": "A cat"}]
    encoded = chat.encode_conversation(talk, [16])
    assert tokenizer.decode(encoded.ids_L[encoded.supervised_L].tolist()) == "A cat<end>"
    with pytest.raises(ChatError, match="one question and one answer"):
        chat.encode_conversation([*talk, *talk], [16, 16])
