"""Named chat templates: one table of strings gives the rendered text, its supervised spans and the equal Hugging Face Jinja."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megavlm.data.sample import IMAGE_TOKEN

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
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]
    """Half-open character ranges of the supervised parts."""
    lead: str = ""
    """Spaces that may stand in front of a span and share its first token."""


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

    def jinja(self, image_token: str = IMAGE_TOKEN) -> str:
        """The Hugging Face chat template that renders the same text, with the assistant's parts marked by `{% generation %}`.

        Content may be a string (with "<image>" where a picture goes: exactly what training sees) or Hugging Face's list of
        parts, in which every picture becomes `image_token` and a line break.
        """

        def text(raw: str) -> str:
            pieces = raw.replace(_BOS, f"\0{_BOS}\0").replace(_EOS, f"\0{_EOS}\0").split("\0")
            names = {_BOS: "bos_token", _EOS: "eos_token"}
            return " ~ ".join(names[p] if p in names else json.dumps(p) for p in pieces if p) or '""'

        content = (
            "{%- macro body(m) -%}{%- if m['content'] is string -%}{{- m['content'] -}}{%- else -%}{%- for p in m['content'] -%}"
            "{%- if p['type'] == 'image' -%}{{- PICTURE -}}{%- else -%}{{- p['text'] -}}{%- endif -%}{%- endfor -%}"
            "{%- endif -%}{%- endmacro -%}"
        ).replace("PICTURE", json.dumps(image_token + "\n"))
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
