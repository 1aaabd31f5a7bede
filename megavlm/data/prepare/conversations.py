"""Conversations: LLaVA's JSON and ShareGPT- or OpenAI-style messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megavlm.data.prepare.records import RecordFormat, identity, read_record
from megavlm.data.prepare.types import Draft, Entry, Picture, Refused
from megavlm.data.sample import IMAGE_TOKEN

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bing"), "assistant"),
    "system": "system",
}
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_PICTURE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text", "output_text")


def check_messages(messages: list[dict[str, str]], num_pictures: int) -> list[dict[str, str]]:
    """The messages, when training can learn from them.

    Raises:
        Refused: no assistant turn, one without text or with a picture, a system turn that is not the first, an assistant's first
            turn, or a number of "<image>" that is not the number of pictures.
    """
    marks = 0
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        found = content.count(IMAGE_TOKEN)
        marks += found
        if role == "system" and i > 0:
            raise Refused("system turn in the middle", f"message {i} is a system turn; only the first can be one")
        if role == "assistant":
            if not content.strip():
                raise Refused("empty answer", f"message {i} of the assistant holds no text")
            if found:
                raise Refused("picture in an answer", f'message {i} of the assistant holds "{IMAGE_TOKEN}"')
    spoken = [m["role"] for m in messages if m["role"] != "system"]
    if "assistant" not in spoken:
        raise Refused("no answer", f"none of the {len(messages)} messages is the assistant's")
    if spoken[0] != "user":
        raise Refused("no question", "the assistant speaks first, and nothing stands before its answer")
    if marks != num_pictures:
        raise Refused(f'wrong number of "{IMAGE_TOKEN}"', f'{marks} "{IMAGE_TOKEN}" in the texts, {num_pictures} pictures')
    return messages


def role_of(name: Any, i: int) -> str:
    """Our role for theirs. Raises Refused for any other."""
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise Refused("unknown role", f"message {i} is from {name!r:.60}; known are {', '.join(_ROLES)}")
    return role


def as_list(value: Any) -> list[Any]:
    """None -> [], one thing -> [it]."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


class _Records(RecordFormat):
    """Shared by formats with one record a sample."""

    options = frozenset({"columns"})
    fields = ("id", "image", "images", "conversations", "messages")

    def convert(self, entry: Entry) -> Iterator[Draft | Refused]:
        record = read_record(entry)
        for name in _OTHER_MEDIA:
            if record.get(name):
                raise Refused(f"sample with {name}", f"field {name!r}: this format holds pictures; see the format video")
        turns = next((v for n in ("conversations", "messages") if (v := record.get(self.column(n))) is not None), None)
        if isinstance(turns, str):  # CSV files and some Parquet files hold the turns as JSON
            turns = _parsed(turns)
        if not isinstance(turns, list) or not turns:
            raise Refused(
                "no conversation", f"neither conversations nor messages is a list with turns (fields: {', '.join(map(str, record))})"
            )
        addresses = [*as_list(record.get(self.column("image"))), *as_list(record.get(self.column("images")))]
        messages, inline = self.turns(turns)
        if addresses and inline:
            raise Refused("pictures named twice", "both the parts of the messages and the field images name pictures")
        messages = check_messages(messages, len(addresses) + len(inline))
        loaded = [Picture(self.pictures.load(a)) for a in addresses or inline]
        yield Draft(messages, loaded, meta=identity(record, self.column("id")))

    def turns(self, turns: list[Any]) -> tuple[list[dict[str, str]], list[Any]]:
        """Our messages, and the addresses of pictures that stand inside them."""
        messages, inline = [], []
        for i, turn in enumerate(turns):
            if not isinstance(turn, dict):
                raise Refused("turn that is no object", f"message {i} is {turn!r:.80}")
            role = role_of(turn.get("from", turn.get("role")), i)
            content = turn.get("value", turn.get("content"))
            if isinstance(content, list):
                content, found = self.parts(content, i)
                inline += found
            if not isinstance(content, str):
                raise Refused("turn without text", f"message {i} holds {content!r:.80}")
            messages.append({"role": role, "content": content})
        return messages, inline

    def parts(self, parts: list[Any], i: int) -> tuple[str, list[Any]]:
        raise Refused("turn without text", f"message {i} is a list of parts: see the format messages")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused("conversation that is not JSON", str(error)) from None


class Llava(_Records):
    """LLaVA's own: `conversations` from human and gpt, `<image>` in the text, `image` or `images`."""

    name = "llava"
    help = 'LLaVA JSON: "conversations" from human/gpt with <image> in the text, "image" or "images".'
    default_task = "conversation"


class Messages(_Records):
    """ShareGPT or OpenAI messages; contents are texts or lists of parts."""

    name = "messages"
    help = 'ShareGPT- or OpenAI-style "messages" whose content is text or parts (text, image, image_url).'
    default_task = "conversation"

    def parts(self, parts: list[Any], i: int) -> tuple[str, list[Any]]:
        """Parts as one text. A picture becomes "<image>" and a line break, as the chat templates write it for generation."""
        texts, found = [], []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(part, str) or kind in _TEXT_PARTS:
                text = part if isinstance(part, str) else part.get("text")
                if not isinstance(text, str):
                    raise Refused("turn without text", f"message {i} has a text part that holds {text!r:.80}")
                if IMAGE_TOKEN in text:
                    raise Refused(f'"{IMAGE_TOKEN}" as text', f'message {i}: a text part spells "{IMAGE_TOKEN}"')
                texts.append(text)
            elif kind in _PICTURE_PARTS:
                address = next((part[k] for k in ("image", "image_url", "url", "path", "data") if part.get(k)), None)
                found.append(address)
                texts.append(f"{IMAGE_TOKEN}\n")
            else:
                raise Refused("unknown part", f"message {i} has a part of type {kind!r}")
        return "".join(texts), found
