"""Conversations to tokens: a chat template bound to a tokenizer.

A conversation is rendered and tokenised once, as a whole. Which tokens are supervised follows from character spans, never from
tokenising parts: parts tokenise differently from the whole. Every sample's mask is then checked by decoding it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megavlm.config.schema import PictureMarks
from megavlm.data.chat_jinja import TODAY, JinjaTemplate, read_template
from megavlm.data.chat_sources import SOURCES
from megavlm.data.chat_templates import TEMPLATES, ChatError, ChatTemplate, Rendered, Role
from megavlm.data.picture_marks import written_out
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.tokenizer import Encoding, Tokenizer

__all__ = ["TEMPLATES", "Chat", "ChatError", "ChatTemplate", "EncodedConversation", "Rendered", "Role"]
_RULES = 1
"""Goes up when the same template and tokenizer give other tokens or another mask than before."""


@dataclass(frozen=True)
class EncodedConversation:
    """Tokens of one sample, placeholders expanded. Shape legend: L tokens of the sample."""

    ids_L: np.ndarray
    """int64."""
    supervised_L: np.ndarray
    """bool; true where the token is part of an assistant text or its end token."""

    plain_ids: np.ndarray
    """As `ids_L`, with one placeholder a picture."""
    plain_supervised: np.ndarray

    @property
    def num_targets(self) -> int:
        return int(self.supervised_L.sum())


class Chat:
    """A chat template bound to a tokenizer.

    Args:
        template: recipe.data.chat_template: a name in TEMPLATES, "tokenizer" for the Hugging Face tokenizer's own, or a *.jinja file.
        tokenizer: from load_tokenizer.
        marks: recipe.data.image.marks: tokens round and between the visual tokens of a picture.

    Raises:
        ChatError: unknown template name, no such file, a template that cannot render a question and an answer.
        TokenizerError: the tokenizer lacks a special token that the template needs.
    """

    def __init__(self, template: str, tokenizer: Tokenizer, marks: PictureMarks | None = None, stop_ids: Sequence[int] = ()) -> None:
        self.tokenizer, self.marks, self._more_stop_ids = tokenizer, marks or PictureMarks(), frozenset(stop_ids)
        for text in (self.marks.written, self.marks.before, self.marks.after):
            if tokenizer.image_token in text:
                raise ChatError(f"data.image.marks holds data.image_token={tokenizer.image_token!r} itself, in {text!r}: it is put there")
        self.template: ChatTemplate | JinjaTemplate
        if template in TEMPLATES:
            self.template = TEMPLATES[template]
            texts = (t.replace("{eos}", tokenizer.eos_token) for t in self.template.special_tokens)
            self.special_texts = tuple(tokenizer.image_token if t == IMAGE_TOKEN else t for t in texts)
            self._stop_texts: tuple[str, ...] = (self.template.stop_token.replace("{eos}", tokenizer.eos_token),)
        elif template == "tokenizer" or template in SOURCES or template.endswith(".jinja"):
            self.template = JinjaTemplate(*read_template(template, tokenizer), tokenizer, self.marks.written)
            self.special_texts, self._stop_texts = self.template.special_texts, self.template.stop_texts
        else:
            raise ChatError(f'chat template {template!r} is not one of {", ".join((*TEMPLATES, *SOURCES))}, "tokenizer" or a *.jinja file')
        if self.marks.written:
            self.special_texts = tuple(dict.fromkeys((*self.special_texts, tokenizer.image_token)))
        for token in self.special_texts:
            if not token:
                raise ChatError(f"template {template!r} ends answers with the tokenizer's eos token, and this tokenizer names none")
            if not isinstance(self.template, JinjaTemplate):
                tokenizer.token_id(token)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer during generation."""
        ids = {self.tokenizer.token_id(text) for text in self._stop_texts}
        return sorted(ids | self._more_stop_ids | ({self.tokenizer.eos_id} if self.tokenizer.eos_id is not None else set()))

    @property
    def fingerprint(self) -> str:
        """Changes whenever the tokens or the mask of some conversation could change."""
        parts = [str(_RULES), TODAY.isoformat(), self.tokenizer.fingerprint, self.jinja()]
        if self.marks != PictureMarks():
            parts.append(self.marks.model_dump_json())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def jinja(self) -> str:
        """The Hugging Face chat template that renders what training sees."""
        if isinstance(self.template, JinjaTemplate):
            return self.template.jinja()
        return self.template.jinja(self.tokenizer.image_token)

    def encode_conversation(self, messages: Sequence[Mapping[str, str]], pictures: Sequence[int | np.ndarray]) -> EncodedConversation:
        """Tokens of a training sample; "<image>" number i becomes pictures[i] placeholders, or those ids (`Resizing.sequence`).

        Raises:
            ChatError: wrong number of "<image>", a template token inside a content, no or only supervised tokens, or supervised
                tokens that do not decode to the assistant texts and end tokens.
        """
        self._check_contents(messages, len(pictures))
        rendered = self._render(messages, generation_prompt=False)
        encoded = self._encode(rendered.text)
        ids = np.asarray(encoded.ids, dtype=np.int64)
        supervised = np.zeros(len(ids), dtype=bool)
        for begin, end in rendered.spans:
            # Offsets ascend: the tokens that share a character with the span lie side by side.
            first = bisect_right(encoded.offsets, begin, key=lambda o: o[1])
            after = bisect_left(encoded.offsets, end, key=lambda o: o[0])
            if rendered.lead and first < after:
                start = encoded.offsets[first][0]
                begin = start if start < begin and rendered.lead.endswith(rendered.text[start:begin]) else begin
            supervised[first:after] = True
            self._check_span(rendered.text[begin:end], encoded.ids[first:after])
        if not supervised.any():
            raise ChatError("no token is supervised: the conversation has no assistant message")
        if supervised.all() or supervised[0]:
            raise ChatError("the first token is supervised, and no token stands before it to predict it from: start with a user message")
        return EncodedConversation(*self._expand(ids, supervised, pictures), ids, supervised)

    def encode_prompt(self, messages: Sequence[Mapping[str, str]], pictures: Sequence[int | np.ndarray]) -> np.ndarray:
        """int64 ids of `messages` and the assistant's header: what generation continues. Raises ChatError as encode_conversation."""
        self._check_contents(messages, len(pictures))
        ids = np.asarray(self._encode(self._render(messages, generation_prompt=True).text).ids, dtype=np.int64)
        return self._expand(ids, np.zeros(len(ids), dtype=bool), pictures)[0]

    def _render(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool) -> Rendered:
        rendered = self._rendered(messages, generation_prompt)
        text, spans = written_out(rendered.text, list(rendered.spans), self.tokenizer.image_token, self.marks)
        return replace(rendered, text=text, spans=spans)

    def _rendered(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool) -> Rendered:
        """As the template writes it, without data.image.marks."""
        if isinstance(self.template, JinjaTemplate):
            return self.template.render(messages, generation_prompt)
        token = self.marks.written or self.tokenizer.image_token
        if token != IMAGE_TOKEN:
            messages = [{"role": m["role"], "content": m["content"].replace(IMAGE_TOKEN, token)} for m in messages]
        names = {"bos": self.tokenizer.bos_token, "eos": self.tokenizer.eos_token}
        return self.template.render(messages, **names, generation_prompt=generation_prompt)

    def _encode(self, text: str) -> Encoding:
        try:
            return self.tokenizer.encode(text)
        except (UnicodeError, TypeError) as error:
            broken = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if broken is None:
                raise
            raise ChatError(f"half of a character (U+{ord(text[broken]):04X}) in {text[max(broken - 20, 0) : broken + 20]!r}") from error

    def _check_contents(self, messages: Sequence[Mapping[str, str]], num_images: int) -> None:
        found = sum(m["content"].count(IMAGE_TOKEN) for m in messages)
        if found != num_images:
            raise ChatError(f'the messages hold {found} "{IMAGE_TOKEN}" but the sample has {num_images} images')
        for i, message in enumerate(messages):
            content, is_answer = message["content"], message["role"] == "assistant"
            for token in (*self.special_texts, IMAGE_TOKEN):
                if token in content and (token != IMAGE_TOKEN or is_answer):
                    raise ChatError(
                        f"message {i} ({message['role']}) contains {token!r}, which would be read as a special token: remove it"
                    )
            if is_answer and not content.strip():
                raise ChatError(f"message {i} is an assistant message without text")

    def _check_span(self, expected: str, ids: Sequence[int]) -> None:
        decoded = self.tokenizer.decode(ids)
        if decoded == expected:
            return
        unknown = self.tokenizer.special_ids.get(self.tokenizer.named_tokens.get("unk_token", ""), -1)
        if unknown in ids:
            at = next((i for i, (a, b) in enumerate(zip(decoded, expected, strict=False)) if a != b), len(decoded))
            char = expected[at : at + 1]
            raise ChatError(f"the tokenizer cannot represent {char!r} in {_window(expected, at)!r}: it would be trained as unknown")
        at = next((i for i, (a, b) in enumerate(zip(decoded, expected, strict=False)) if a != b), min(len(decoded), len(expected)))
        raise ChatError(
            f"supervised tokens decode to {_window(decoded, at)!r}, but the template wants {_window(expected, at)!r} supervised: the"
            " tokenizer changes this text, or joins it with what stands before"
        )

    def _expand(self, ids: np.ndarray, supervised: np.ndarray, pictures: Sequence[int | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        if not pictures and self.tokenizer.image_token not in self.tokenizer.special_ids:
            return ids, supervised
        image_id = self.tokenizer.image_token_id
        places = np.flatnonzero(ids == image_id)
        if len(places) != len(pictures):
            raise ChatError(f"{len(places)} placeholders came out of the tokenizer for {len(pictures)} images")
        if not len(places):
            return ids, supervised
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[places] = [len(p) if isinstance(p, np.ndarray) else p for p in pictures]
        expanded = np.repeat(ids, repeats)
        if any(isinstance(p, np.ndarray) for p in pictures):
            own = [p if isinstance(p, np.ndarray) else np.full(p, image_id) for p in pictures]
            expanded[expanded == image_id] = np.concatenate(own)
        return expanded, np.repeat(supervised, repeats)


def _window(text: str, at: int) -> str:
    """What stands round character `at` of a long text."""
    return text if len(text) <= 80 else text[max(at - 30, 0) : at + 40]
