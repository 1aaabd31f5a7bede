"""The disk that hangs leaves nothing mounted and nothing open, whatever fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megavlm.testing import hung_disk
from megavlm.testing.hung_disk import HungDisk


@pytest.mark.parametrize("fails", ["mount", "hand shake", "umount2"])
def test_what_fails_leaves_nothing_behind(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "device").touch()
    called: list[str] = []

    def call(self: HungDisk, name: str, *arguments: object) -> None:
        called.append(name)
        if name == fails:
            raise OSError(name)

    def shake_hands(self: HungDisk) -> None:
        if fails == "hand shake":
            raise OSError(fails)

    monkeypatch.setattr(hung_disk, "_DEVICE", str(tmp_path / "device"))
    monkeypatch.setattr(HungDisk, "_call", call)
    monkeypatch.setattr(HungDisk, "_shake_hands", shake_hands)
    closed: list[int] = []
    close = os.close

    def note(handle: int) -> Any:
        closed.append(handle)
        close(handle)

    disk = HungDisk(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=fails):
        patch.setattr(os, "close", note)
        with disk:
            pass
    assert called == (["mount"] if fails == "mount" else ["mount", "umount2"]) and closed == [disk._device]
