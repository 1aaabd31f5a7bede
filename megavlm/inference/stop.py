"""Texts that end an answer: found in the answer as text, wherever its tokens happen to be cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megavlm.inference.sampling import GenerationError


class StopStrings:
    """An answer is over as soon as its text holds one of `texts`; `cut` then gives the text before it.

    Raises GenerationError for an empty text.
    """

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        if any(not text for text in texts):
            raise GenerationError("a stop string is empty: it would end every answer before it begins")
        self.texts, self._decode = tuple(texts), decode

    def is_over(self, sequence: int, ids: Sequence[int]) -> bool:
        """For `generate`. Decodes the whole answer: a text may begin in any token, and a token's text may depend on its neighbours."""
        del sequence
        return bool(self.texts) and self._first(self._decode(ids)) is not None

    def cut(self, text: str) -> str:
        """The text up to the first stop string."""
        first = self._first(text)
        return text if first is None else text[:first]

    def held_back(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop string: not to be shown yet."""
        longest = 0
        for stop in self.texts:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _first(self, text: str) -> int | None:
        places = [place for stop in self.texts if (place := text.find(stop)) >= 0]
        return min(places, default=None)
