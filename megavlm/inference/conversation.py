"""A conversation with a model: its messages and pictures so far."""

from __future__ import annotations

from collections.abc import Sequence

from megavlm.data.prompt import Prompt
from megavlm.inference.loaded import LoadedModel
from megavlm.inference.prompts import Picture, question


class Conversation:
    """Ask with `prompt`, generate, and tell the answer with `answered`."""

    def __init__(self, model: LoadedModel, system: str | None = None) -> None:
        self.model = model
        self.start: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.start)
        self.pictures: list[Picture] = []

    def prompt(self, text: str, pictures: Sequence[Picture] = ()) -> Prompt:
        """The whole conversation with one more question; nothing is kept before `answered`.

        Raises ChatError, ImageError and ResizingError as `make_prompt`.
        """
        self._asked, self._shown = question(text, len(pictures)), list(pictures)
        return self.model.conversation([*self.messages, *self._asked], [*self.pictures, *self._shown])

    def answered(self, text: str) -> None:
        """Keep the last question and its answer."""
        self.messages += [*self._asked, {"role": "assistant", "content": text}]
        self.pictures += self._shown

    def clear(self) -> None:
        """Begin anew."""
        self.messages, self.pictures = list(self.start), []
