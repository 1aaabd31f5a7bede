"""A chat template that is no text is one clear error, wherever it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.checkpoint.hf.texts import template_of
from megavlm.data.sentencepiece_export import TokenizerError


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\x80\x04bytes")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is damaged"):
        template_of(tmp_path)
