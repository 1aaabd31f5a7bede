"""Chat templates: one table of strings gives the rendered text, its supervised spans and the equal Hugging Face Jinja.

A conversation is rendered and tokenised once, as a whole. Which tokens are supervised follows from character spans, never from
tokenising parts: parts tokenise differently from the whole. Every sample's mask is then checked by decoding it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megavlm.data.tokenizer import IMAGE_TOKEN, Tokenizer

_BOS, _EOS = "{bos}", "{eos}"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class ChatError(ValueError):
    """A conversation that the template cannot render, or whose mask would be wrong."""


@dataclass(frozen=True)
class Role:
    """Text around one role's content. For the assistant, `lead` + content + `end` is supervised; `header` and `trail` are not."""

    header: str
    end: str
    lead: str = ""
    trail: str = ""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. `spans` are half-open character ranges of the supervised parts."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class ChatTemplate:
    """A conversation format. `{bos}` and `{eos}` stand for the tokenizer's own tokens ("" where it has none)."""

    name: str
    roles: Mapping[str, Role]
    start: str = ""
    default_system: str | None = None
    """System text used where the conversation has none."""
    special_tokens: tuple[str, ...] = field(default=())
    """Tokens that the tokenizer must have."""

    @property
    def stop_token(self) -> str:
        """Token that ends an answer (may be "{eos}")."""
        return self.roles["assistant"].end

    def render(self, messages: Sequence[Mapping[str, str]], *, bos: str, eos: str, generation_prompt: bool = False) -> Rendered:
        """Text of `messages` ({"role", "content"}) and its supervised spans.

        Raises:
            ChatError: unknown role, or a system message that is not the first.
        """

        def fill(text: str) -> str:
            return text.replace(_BOS, bos).replace(_EOS, eos)

        parts, spans = [fill(self.start)], []
        length = len(parts[0])

        def add(text: str) -> int:
            nonlocal length
            parts.append(text)
            length += len(text)
            return length

        if self.default_system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.default_system}, *messages]
        for i, message in enumerate(messages):
            role = self.roles.get(message["role"])
            if role is None:
                raise ChatError(f"message {i} has role {message['role']!r}; template {self.name!r} knows {', '.join(self.roles)}")
            if message["role"] == "system" and i > 0:
                raise ChatError(f"message {i} is a system message; template {self.name!r} takes one only as the first message")
            begin = add(fill(role.header))
            stop = add(role.lead + message["content"] + fill(role.end))
            if message["role"] == "assistant":
                spans.append((begin, stop))
            add(fill(role.trail))
        if generation_prompt:
            add(fill(self.roles["assistant"].header))
        return Rendered("".join(parts), spans)

    def jinja(self) -> str:
        """The Hugging Face chat template that renders the same text, with the assistant's parts marked by `{% generation %}`.

        Content may be a string (with "<image>" where a picture goes: exactly what training sees) or Hugging Face's list of
        parts, in which every picture becomes "<image>" and a line break.
        """

        def text(raw: str) -> str:
            pieces = raw.replace(_BOS, f"\0{_BOS}\0").replace(_EOS, f"\0{_EOS}\0").split("\0")
            names = {_BOS: "bos_token", _EOS: "eos_token"}
            return " ~ ".join(names[p] if p in names else json.dumps(p) for p in pieces if p) or '""'

        content = (
            "{%- macro body(m) -%}{%- if m['content'] is string -%}{{- m['content'] -}}{%- else -%}{%- for p in m['content'] -%}"
            "{%- if p['type'] == 'image' -%}{{- \"<image>\\n\" -}}{%- else -%}{{- p['text'] -}}{%- endif -%}{%- endfor -%}"
            "{%- endif -%}{%- endmacro -%}"
        )
        out = [content, "{{- " + text(self.start) + " -}}"]
        if self.default_system is not None:
            system = self.roles["system"]
            fixed = text(system.header + system.lead + self.default_system + system.end + system.trail)
            out.append("{%- if not messages or messages[0]['role'] != 'system' -%}{{- " + fixed + " -}}{%- endif -%}")
        out.append("{%- for m in messages -%}")
        for i, (name, role) in enumerate(self.roles.items()):
            out.append(f"{{%- {'if' if i == 0 else 'elif'} m['role'] == '{name}' -%}}")
            inner = "{{- " + text(role.lead) + " ~ body(m) ~ " + text(role.end) + " -}}"
            if name == "assistant":
                inner = "{%- generation -%}" + inner + "{%- endgeneration -%}"
            out.append("{{- " + text(role.header) + " -}}" + inner + "{{- " + text(role.trail) + " -}}")
        out.append("{%- else -%}{{- raise_exception('unknown role ' ~ m['role']) -}}{%- endif -%}{%- endfor -%}")
        out.append("{%- if add_generation_prompt -%}{{- " + text(self.roles["assistant"].header) + " -}}{%- endif -%}")
        return "".join(out)


def _chatml_role(role: str) -> Role:
    return Role(header=f"<|im_start|>{role}\n", end="<|im_end|>", trail="\n")


TEMPLATES: dict[str, ChatTemplate] = {
    "megavlm": ChatTemplate(
        name="megavlm",
        roles={r: Role(header=f"<|{r}|>", end="<|end|>") for r in ("system", "user", "assistant")},
        special_tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", IMAGE_TOKEN),
    ),
    "chatml": ChatTemplate(
        name="chatml",
        roles={r: _chatml_role(r) for r in ("system", "user", "assistant")},
        special_tokens=("<|im_start|>", "<|im_end|>", IMAGE_TOKEN),
    ),
    # Vicuna v1 as LLaVA-1.5 uses it (LLaVA, llava/conversation.py, conv_vicuna_v1); the space before an answer is part of it.
    "llava-v1": ChatTemplate(
        name="llava-v1",
        start=_BOS,
        roles={"system": Role("", " "), "user": Role("USER: ", " "), "assistant": Role("ASSISTANT:", _EOS, lead=" ")},
        default_system=VICUNA_SYSTEM,
        special_tokens=(_EOS, IMAGE_TOKEN),
    ),
    "llama3": ChatTemplate(
        name="llama3",
        start=_BOS,
        roles={r: Role(f"<|start_header_id|>{r}<|end_header_id|>\n\n", "<|eot_id|>") for r in ("system", "user", "assistant")},
        special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", IMAGE_TOKEN),
    ),
    # Picture and caption (LLaVA's alignment stage), with eos instead of a line break so that generation knows where to stop.
    "plain": ChatTemplate(
        name="plain",
        start=_BOS,
        roles={"user": Role("", ""), "assistant": Role("", _EOS)},
        special_tokens=(_EOS, IMAGE_TOKEN),
    ),
}


@dataclass(frozen=True)
class EncodedConversation:
    """Tokens of one sample, placeholders expanded. Shape legend: L tokens of the sample."""

    ids_L: np.ndarray
    """int64."""
    supervised_L: np.ndarray
    """bool; true where the token is part of an assistant text or its end token."""

    @property
    def num_targets(self) -> int:
        return int(self.supervised_L.sum())


class Chat:
    """A chat template bound to a tokenizer.

    Raises:
        ChatError: unknown template name.
        TokenizerError: the tokenizer lacks a special token that the template needs.
    """

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        if template not in TEMPLATES:
            raise ChatError(f"chat template {template!r} is not one of {', '.join(TEMPLATES)}")
        self.template = TEMPLATES[template]
        self.tokenizer = tokenizer
        self.special_texts = tuple(tokenizer.eos_token if t == _EOS else t for t in self.template.special_tokens)
        for token in self.special_texts:
            if not token:
                raise ChatError(f"template {template!r} ends answers with the tokenizer's eos token, and this tokenizer names none")
            tokenizer.token_id(token)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer during generation."""
        stop = self.template.stop_token.replace(_EOS, self.tokenizer.eos_token)
        ids = {self.tokenizer.token_id(stop)} | ({self.tokenizer.eos_id} if self.tokenizer.eos_id is not None else set())
        return sorted(i for i in ids if i is not None)

    def jinja(self) -> str:
        """See ChatTemplate.jinja."""
        return self.template.jinja()

    def encode_conversation(self, messages: Sequence[Mapping[str, str]], tokens_per_image: Sequence[int]) -> EncodedConversation:
        """Tokens of a training sample; "<image>" number i becomes tokens_per_image[i] placeholders.

        Raises:
            ChatError: wrong number of "<image>", a template token inside a content, no or only supervised tokens, or supervised
                tokens that do not decode to the assistant texts and end tokens.
        """
        self._check_contents(messages, len(tokens_per_image))
        rendered = self._render(messages, generation_prompt=False)
        encoded = self.tokenizer.encode(rendered.text)
        ids = np.asarray(encoded.ids, dtype=np.int64)
        offsets = np.asarray(encoded.offsets, dtype=np.int64).reshape(-1, 2)
        supervised = np.zeros(len(ids), dtype=bool)
        for begin, end in rendered.spans:
            inside = (offsets[:, 0] < end) & (offsets[:, 1] > begin)
            supervised |= inside
            self._check_span(rendered.text[begin:end], ids[inside])
        if not supervised.any():
            raise ChatError("no token is supervised: the conversation has no assistant message")
        if supervised.all() or supervised[0]:
            raise ChatError("the first token is supervised, and no token stands before it to predict it from: start with a user message")
        return EncodedConversation(*self._expand(ids, supervised, tokens_per_image))

    def encode_prompt(self, messages: Sequence[Mapping[str, str]], tokens_per_image: Sequence[int]) -> np.ndarray:
        """int64 ids of `messages` and the assistant's header: what generation continues. Raises ChatError as encode_conversation."""
        self._check_contents(messages, len(tokens_per_image))
        ids = np.asarray(self.tokenizer.encode(self._render(messages, generation_prompt=True).text).ids, dtype=np.int64)
        return self._expand(ids, np.zeros(len(ids), dtype=bool), tokens_per_image)[0]

    def _render(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool) -> Rendered:
        return self.template.render(
            messages, bos=self.tokenizer.bos_token, eos=self.tokenizer.eos_token, generation_prompt=generation_prompt
        )

    def _check_contents(self, messages: Sequence[Mapping[str, str]], num_images: int) -> None:
        found = sum(m["content"].count(IMAGE_TOKEN) for m in messages)
        if found != num_images:
            raise ChatError(f'the messages hold {found} "{IMAGE_TOKEN}" but the sample has {num_images} images')
        for i, message in enumerate(messages):
            for token in self.special_texts:
                if token in message["content"] and (token != IMAGE_TOKEN or message["role"] == "assistant"):
                    raise ChatError(
                        f"message {i} ({message['role']}) contains {token!r}, which would be read as a special token: remove it"
                    )
            if message["role"] == "assistant" and not message["content"].strip():
                raise ChatError(f"message {i} is an assistant message without text")

    def _check_span(self, expected: str, ids: np.ndarray) -> None:
        decoded = self.tokenizer.decode(ids.tolist())
        if decoded != expected:
            raise ChatError(f"supervised tokens decode to {decoded!r}, but the template wants {expected!r} supervised")

    def _expand(self, ids: np.ndarray, supervised: np.ndarray, tokens_per_image: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        repeats = np.ones(len(ids), dtype=np.int64)
        places = np.flatnonzero(ids == self.tokenizer.image_token_id)
        if len(places) != len(tokens_per_image):
            raise ChatError(f"{len(places)} placeholders came out of the tokenizer for {len(tokens_per_image)} images")
        repeats[places] = tokens_per_image
        return np.repeat(ids, repeats), np.repeat(supervised, repeats)
