"""Text of an answer while its tokens arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megavlm.inference.stop import StopStrings

_REPLACEMENT = "\ufffd"


class TextStream:
    """Calls `emit` with each new piece of text; the pieces joined are the text of the whole answer, up to the first stop string.

    The answer is decoded anew with every token: a token's text may depend on its neighbours, and a character may be spread over several
    tokens (it is held back until it is whole, as is what may be the beginning of a stop string).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], emit: Callable[[str], None], stop: StopStrings | None = None) -> None:
        self._decode, self._emit = decode, emit
        self._stop = stop or StopStrings((), decode)
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token: int) -> None:
        """The next token of the answer."""
        self._ids.append(token)
        text = self._stop.cut(self._decode(self._ids))
        held = self._stop.held_back(text)
        if not text.endswith(_REPLACEMENT):
            self._show(text[: len(text) - held])

    def close(self) -> None:
        """The answer is over: show what was held back."""
        self._show(self._stop.cut(self._decode(self._ids)))

    def _show(self, text: str) -> None:
        if text.startswith(self._shown) and len(text) > len(self._shown):
            self._emit(text[len(self._shown) :])
            self._shown = text
