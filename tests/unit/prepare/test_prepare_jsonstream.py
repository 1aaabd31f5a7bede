"""The JSON stream against Python's json, whatever the size of its blocks."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.prepare import PrepareError, jsonstream
from megavlm.data.prepare.jsonstream import JsonStream

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Every token is cut somewhere."""
    monkeypatch.setattr(jsonstream, "_BLOCK_BYTES", 3)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(VALUES, max_size=6), st.sampled_from([None, 1, "\t"]), st.booleans())
def test_arrays_equal_json_loads(values, indent, ascii_only):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        text.decode()
    except UnicodeDecodeError:
        return
    for block in (1, 7, 1 << 20):
        jsonstream._BLOCK_BYTES, before = block, jsonstream._BLOCK_BYTES
        try:
            stream = JsonStream(io.BytesIO(text), "x")
            assert list(stream.array()) == json.loads(text)
            stream.end()
        finally:
            jsonstream._BLOCK_BYTES = before


def test_objects_key_by_key(small_blocks):
    whole = {"skip": [1, {"a": "]"}], "n": 12345, "list": [1.5, 'a\\"b', None], "deep": {"x": [[]]}}
    stream = JsonStream(io.BytesIO(json.dumps(whole, indent=2).encode()), "x")
    got = {}
    for key in stream.object():
        if key == "skip":
            stream.skip()
        elif key == "list":
            got[key] = list(stream.array())
        else:
            got[key] = stream.value()
    stream.end()
    assert got == {k: v for k, v in whole.items() if k != "skip"}


@pytest.mark.parametrize(
    "text", [b"[1, 2", b"[1 2]", b'[{"a": tru}, 1]', b'["abc', b'[{"a" 1}]', b"[1,]", b"[1] x", b'["\xff"]', b"", b"{", b'[{"a": 1},\n}]']
)
def test_broken_text_is_named(text, small_blocks):
    with pytest.raises(PrepareError, match=r"^data\.json: not "):
        stream = JsonStream(io.BytesIO(text), "data.json")
        list(stream.array())
        stream.end()


def test_a_fault_is_found_without_reading_on():
    """A file of gigabytes with a fault at its beginning must not be read into memory to say so."""
    file = io.BytesIO(b'[{"a" 1},' + b'{"b": 2},' * 1_000_000)
    with pytest.raises(PrepareError, match="about character 6"):
        list(JsonStream(file, "x").array())
    assert file.tell() <= 1 << 20
