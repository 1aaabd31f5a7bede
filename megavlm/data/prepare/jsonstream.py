"""JSON files of any size, element by element: Python's own decoder over a window that moves through the file."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import IO, Any

from megavlm.data.prepare.types import PrepareError

_BLOCK_BYTES = 1 << 20
_MAX_ELEMENT_CHARS = 1 << 28
_NEAR_END = 16
"""An error so close to the window's end may come from the cut: no JSON token but a string is longer."""
_NUMBER_TAIL = 4
"""A number so close to the window's end may go on: "1", "1.", "1e" and "1e+" are all read as 1."""
_SPACE = " \t\r\n"


class JsonStream:
    """Reads one JSON text forwards. Memory: the largest element and some blocks of 1 MiB.

    Raises:
        PrepareError: from all methods, text that is not JSON, with the file and about where.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._gone = "", 0, 0
        self._is_over = False
        self.num_bytes = 0
        """Bytes taken from the file so far."""

    def peek(self) -> str:
        """Next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> None:
        """Go over one character."""
        found = self.peek()
        if found != wanted:
            raise self._error(f"{wanted!r} is expected, but {'the file ends' if not found else f'there is {found!r}'}")
        self._at += 1

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR_END
                if not cut or len(self._text) - self._at > _MAX_ELEMENT_CHARS or not self._more():
                    raise self._error(error.msg, error.pos) from None
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists in lists without end
                raise self._error(str(error)) from None
            length = end - self._at
            if isinstance(value, int | float) and end > len(self._text) - _NUMBER_TAIL and self._more():
                continue
            self._at += length  # the window may have moved
            return value

    def array(self) -> Iterator[Any]:
        """Elements of the array that comes next."""
        self.take("[")
        yield from self._items("]", self.value)

    def object(self) -> Iterator[str]:
        """Keys of the object that comes next; the caller takes each value before the next key."""
        self.take("{")
        yield from self._items("}", self._key)

    def skip(self) -> None:
        """Go over a value; an array's elements one by one."""
        if self.peek() == "[":
            for _ in self.array():
                pass
        else:
            self.value()

    def end(self) -> None:
        """Check that nothing more comes."""
        if self.peek():
            raise self._error("there is more text after the end of the JSON")

    def _key(self) -> str:
        key = self.value()
        if not isinstance(key, str):
            raise self._error(f"the key {key!r} is not a text")
        self.take(":")
        return key

    def _items(self, close: str, read: Callable[[], Any]) -> Iterator[Any]:
        if self.peek() != close:
            yield read()
            while self.peek() == ",":
                self.take(",")
                yield read()
        self.take(close)

    def _more(self) -> bool:
        """Append a block, larger as the window grows so that a huge element is not scanned too often; False at the end."""
        if self._is_over:
            return False
        rest = self._text[self._at :]
        block = self._file.read(max(_BLOCK_BYTES, len(rest)))
        self.num_bytes += len(block)
        self._is_over = not block
        try:
            new = self._decode.decode(block, final=self._is_over)
        except UnicodeDecodeError as error:
            raise PrepareError(f"{self._name}: not UTF-8 text ({error.reason}) before byte {self.num_bytes}") from None
        self._gone += self._at
        self._text, self._at = rest + new, 0
        return bool(new) or not self._is_over

    def _error(self, problem: str, at: int | None = None) -> PrepareError:
        position = self._gone + (self._at if at is None else at)
        return PrepareError(f"{self._name}: not valid JSON: {problem}, about character {position}. Mend or fetch the file again")
