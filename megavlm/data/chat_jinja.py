"""Hugging Face chat templates: rendered by transformers' own Jinja environment, with the supervised spans found and proven.

A template with `{% generation %}` says itself what is supervised. In any other, each assistant text is put between two characters that
occur nowhere else, the template is rendered a second time, and the spans lie between them. Both renderings must be the same but for those
characters: a template that trims or rewrites an assistant's text is found out that way, and the conversation refused.
"""

from __future__ import annotations

import datetime
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megavlm.data.chat_sources import SOURCES
from megavlm.data.chat_templates import ChatError, Rendered
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.token_files import read_text
from megavlm.data.tokenizer import Tokenizer

TODAY = datetime.datetime(2024, 7, 26)
"""What `strftime_now` shows: Llama 3.1's own default. A conversation's tokens must not depend on the day they are made."""
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_SYSTEM, _USER, _ASSISTANT = "Zsystem1", "Zuser2", "Zassistant3"  # words that no template contains

# transformers keeps the place where `{% generation %}` blocks are noted in the compiled template: one thread at a time. Held over forks, or
# a child would start with it taken.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def read_template(template: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """(name for messages, source) of data.chat_template "tokenizer", a name in SOURCES, or *.jinja.

    Raises:
        ChatError: the tokenizer brings no template, or there is no such file.
        TokenizerError: the file is no text.
    """
    if template == "tokenizer":
        source = tokenizer.chat_template()
        if source is None:
            raise ChatError("data.chat_template=tokenizer, but the tokenizer brings no chat template: name one, or give a *.jinja file")
        return "tokenizer", source
    if template in SOURCES:
        return template, SOURCES[template]
    file = Path(template)
    if not file.is_file():
        raise ChatError(f"data.chat_template={template!r}: there is no such file")
    return file.name, read_text(file)


class JinjaTemplate:
    """A Hugging Face chat template bound to a tokenizer. Thread-safe; can be pickled.

    `special_texts` are the special tokens that it writes, `stop_texts` those that end an answer.

    Raises:
        ChatError: it does not compile, or cannot render a question and an answer.
    """

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, written: str = "") -> None:
        self.name, self.source = name, source
        self.image_token = written or tokenizer.image_token
        """What the template writes for a picture: data.image.marks.written, else data.image_token."""
        self._variables = dict(tokenizer.named_tokens)
        self._marks_spans = _GENERATION.search(source) is not None
        self._special = re.compile(r"\s*(" + ("|".join(re.escape(t) for t in _structural(tokenizer)) or "(?!)") + ")")
        self._as_parts: dict[str, bool] = {}
        self._images_as_parts = False
        self._image_problem = ""
        self._probe()

    def jinja(self) -> str:
        """The template itself."""
        return self.source

    def render(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool = False) -> Rendered:
        """Text of `messages`; spans only without `generation_prompt`.

        Raises:
            ChatError: the template refuses the conversation, changes an assistant's text, or ends it with no special token.
        """
        prepared = [self._prepared(m, m["content"]) for m in messages]
        text, spans = self._run(prepared, prompt=generation_prompt, track=not generation_prompt)
        self._check_all_said(messages, text)
        if generation_prompt:
            return Rendered(text, [])
        if self._marks_spans:
            self._check_marked_spans(messages, text, spans)
            return Rendered(text, spans, lead=self.lead)
        return Rendered(text, self._found_spans(messages, text))

    # ------------------------------------------------------------------------------------------------------------ rendering

    def _run(self, messages: list[dict[str, Any]], prompt: bool = False, track: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Text and generation spans, as transformers.utils.chat_template_utils.render_jinja_template makes them."""
        compiled = _compiled(self.name, self.source)
        values = {"tools": None, "documents": None, "add_generation_prompt": prompt, "strftime_now": TODAY.strftime, **self._variables}
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        try:
            if not self._marks_spans:
                return compiled.render(messages=messages, **values), []
            with _lock:
                if not track:
                    return compiled.render(messages=messages, **values), []
                with compiled.environment.activate_tracker(blocks, spans):
                    for block in compiled.generate(messages=messages, **values):
                        blocks.append(block)
        except Exception as error:  # templates raise what they like: jinja2's errors, TypeError, KeyError
            raise ChatError(f"chat template {self.name!r} refuses the conversation: {type(error).__name__}: {error}") from error
        return "".join(blocks), [(begin, end) for begin, end in spans if end > begin]

    def _prepared(self, message: Mapping[str, str], content: str) -> dict[str, Any]:
        """The message as the template takes it: its content a string, or Hugging Face's list of parts."""
        role = message["role"]
        if IMAGE_TOKEN not in content:
            return {"role": role, "content": [_text(content)] if self._as_parts.get(role, False) else content}
        if self._image_problem:
            raise ChatError(self._image_problem)
        if not self._images_as_parts:
            content = content.replace(IMAGE_TOKEN, self.image_token)
            return {"role": role, "content": [_text(content)] if self._as_parts.get(role, False) else content}
        first, *others = content.split(IMAGE_TOKEN)
        parts = [_text(first)] if first else []
        for text in others:
            parts.append({"type": "image"})
            # The line break that data write behind "<image>" belongs to the mark: templates set their own.
            text = text.removeprefix("\n")
            parts += [_text(text)] if text else []
        return {"role": role, "content": parts}

    # ---------------------------------------------------------------------------------------------------------------- spans

    def _check_all_said(self, messages: Sequence[Mapping[str, str]], text: str) -> None:
        """Templates may trim a question, but not leave it out (Mistral's drops a system turn unless the last message is a question)."""
        for i, message in enumerate(messages):
            for said in message["content"].split(IMAGE_TOKEN) if message["role"] != "assistant" else ():
                if said.strip() not in text:
                    raise ChatError(
                        f"chat template {self.name!r} leaves out or changes message {i} ({message['role']}): {said.strip()[:60]!r} is not"
                        " in its text. Change the data, or choose a built-in template"
                    )

    def _found_spans(self, messages: Sequence[Mapping[str, str]], text: str) -> list[tuple[int, int]]:
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        opening, closing = _unused_characters(text + "".join(answers))
        marked = [self._prepared(m, opening + m["content"] + closing if m["role"] == "assistant" else m["content"]) for m in messages]
        pieces = re.split(f"[{opening}{closing}]", self._run(marked)[0])
        if "".join(pieces) != text or pieces[1::2] != answers:
            raise ChatError(self._changed(text, "".join(pieces)))
        spans, place = [], 0
        for outside, answer in zip(pieces[0::2], pieces[1::2], strict=False):
            begin = place + len(outside)
            place = begin + len(answer)
            end = self._end_of_answer(text, place)
            spans.append((begin - len(self.lead) if outside.endswith(self.lead) else begin, end))
        return spans

    def _end_of_answer(self, text: str, place: int) -> int:
        ended = self._special.match(text, place)
        if ended is None:
            raise ChatError(
                f"chat template {self.name!r} ends an answer without a special token (it goes on with {text[place : place + 20]!r}): a"
                " model trained on it would not learn to stop. Choose a built-in template (LLaVA: llava-v1), or a *.jinja that writes one"
            )
        return ended.end()

    def _check_marked_spans(self, messages: Sequence[Mapping[str, str]], text: str, spans: list[tuple[int, int]]) -> None:
        marked, place = "".join(text[begin:end] for begin, end in spans), 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            found = marked.find(message["content"], place)
            if found < 0:
                raise ChatError(
                    f"chat template {self.name!r} changes message {i} or leaves a part of it out of {{% generation %}}: it supervises"
                    f" {marked[place : place + 60]!r} where the data say {message['content'][:60]!r}"
                )
            place = found + len(message["content"])
            ended = self._special.match(marked, place)
            if ended is None:
                raise ChatError(
                    f"chat template {self.name!r} leaves the token that ends an answer out of {{% generation %}}: a model trained on it"
                    " would not learn to stop. Choose a built-in template (LLaVA-1.5: llava-v1), or a *.jinja whose block contains it"
                )
            place = ended.end()

    def _changed(self, plain: str, expected: str) -> str:
        at = next((i for i, (a, b) in enumerate(zip(plain, expected, strict=False)) if a != b), min(len(plain), len(expected)))
        window = slice(max(at - 20, 0), at + 30)
        return (
            f"chat template {self.name!r} changes an assistant message (templates trim texts, or drop earlier thoughts): it writes"
            f" {plain[window]!r} where the data's text would give {expected[window]!r}. Change the data, or choose a built-in template"
        )

    # --------------------------------------------------------------------------------------------------------------- probing

    def _probe(self) -> None:
        """How this template takes content, what it writes round it, and how an answer ends."""
        _compiled(self.name, self.source)
        user = self._form("user", [])
        assistant = self._form("assistant", [user])
        self._form("system", [], [user, assistant], required=False)
        prompt = self._run([user], prompt=True)[0]
        text = self._run([user, assistant])[0]
        place = text.index(_ASSISTANT)
        between = text[len(prompt) : place] if text.startswith(prompt) else ""
        # What generation must write before the answer's first letter: " " behind "ASSISTANT:".
        self.lead = between if between.isspace() else ""
        ended = self._special.match(text, place + len(_ASSISTANT))
        self.stop_texts = (ended.group(1),) if ended is not None else ()
        seen = text + self._probe_images(user)
        if self._as_parts.get("system") is not None:
            seen += self._run([self._said("system", _SYSTEM), user, assistant])[0]
        names = [v for k, v in self._variables.items() if k in ("bos_token", "eos_token")]
        self.special_texts = tuple(dict.fromkeys([m.group(1) for m in self._special.finditer(seen)] + names + [self.image_token]))

    def _said(self, role: str, content: str) -> dict[str, Any]:
        return {"role": role, "content": [_text(content)] if self._as_parts[role] else content}

    def _form(self, role: str, before: list[Any], after: Sequence[Any] = (), required: bool = True) -> dict[str, Any]:
        """A message of this role in the form that the template shows: a string if it can, else a list of parts."""
        word = {"system": _SYSTEM, "user": _USER, "assistant": _ASSISTANT}[role]
        problem = "its text does not appear"
        for as_parts in (False, True):
            self._as_parts[role] = as_parts
            message = self._said(role, word)
            try:
                text = self._run([*before, message, *after])[0]
            except ChatError as error:
                problem = str(error)
                continue
            if text.count(word) == 1 and "'type'" not in text:
                return message
        del self._as_parts[role]
        if required:
            raise ChatError(f"chat template {self.name!r} cannot render a message of role {role}: {problem}")
        return {}

    def _probe_images(self, user: dict[str, Any]) -> str:
        """Whether pictures are parts that the template writes as data.image_token; the text of one."""
        try:
            text = self._run([{"role": "user", "content": [{"type": "image"}, _text(_USER)]}])[0]
            without = self._run([{"role": "user", "content": [_text(_USER)]}])[0]
        except ChatError:
            return ""
        if text.count(_USER) != 1 or "'type'" in text or text == without:
            return ""
        written = text.removesuffix(without[without.index(_USER) :]).removeprefix(without[: without.index(_USER)])
        if written.count(self.image_token) == 1:
            self._images_as_parts = True
            return written
        self._image_problem = (
            f"chat template {self.name!r} writes a picture as {written!r}, which does not hold data.image_token={self.image_token!r} once:"
            " set data.image_token to the token in it that stands for the picture's features"
        )
        return ""


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _structural(tokenizer: Tokenizer) -> list[str]:
    """Special tokens that are no mere white space (SentencePiece models have runs of spaces among theirs), longest first."""
    return sorted((t for t in tokenizer.special_ids if t.strip()), key=len, reverse=True)


def _unused_characters(text: str) -> tuple[str, str]:
    """Two characters of a private plane that `text` does not contain."""
    free = (c for c in map(chr, range(0xF0E00, 0xFFFFD)) if c not in text)
    return next(free), next(free)


def _compiled(name: str, source: str) -> Any:
    """The template compiled in transformers' environment: its extensions, filters and white space rules. Cached there."""
    from transformers.utils import chat_template_utils

    try:
        return chat_template_utils._compile_jinja_template(source)
    except Exception as error:
        raise ChatError(f"chat template {name!r} is not valid Jinja: {type(error).__name__}: {error}") from error
