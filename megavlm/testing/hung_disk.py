"""A disk that hangs: a file system whose server does not answer, like a network disk whose machine is gone. Needs root and FUSE."""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

_DEVICE = "/dev/fuse"
_MNT_FORCE_DETACH = 1 | 2
# Of <linux/fuse.h>: fuse_in_header; fuse_out_header and fuse_init_out of protocol 7.31.
_REQUEST = struct.Struct("=IIQQIIII")
_ANSWER = struct.Struct("=IiQ" + "IIIIHHIIHHI28x")
_INIT, _PROTOCOL = 26, (7, 31)


class HungDisk:
    """with HungDisk(folder): whoever looks for anything in the folder waits until the block ends, or it is killed.

    What was open before goes on. Nobody reads the requests of those who wait, so that the kernel lets them be killed. Raises OSError where
    this process may not mount file systems.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._device = -1
        self._undo = ExitStack()

    def __enter__(self) -> HungDisk:
        with ExitStack() as undo:
            self._device = os.open(_DEVICE, os.O_RDWR)
            undo.callback(os.close, self._device)
            options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0"
            self._call("mount", b"hung", self._folder.encode(), b"fuse", 0, options.encode())
            undo.callback(self._call, "umount2", self._folder.encode(), _MNT_FORCE_DETACH)
            self._shake_hands()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._undo.close()

    def _shake_hands(self) -> None:
        """The only request that is answered: the kernel's first."""
        _, code, number, *_ = _REQUEST.unpack_from(os.read(self._device, 1 << 17))
        assert code == _INIT, code
        os.write(self._device, _ANSWER.pack(_ANSWER.size, 0, number, *_PROTOCOL, 4096, 0, 12, 9, 4096, 1, 1, 0, 0))

    def _call(self, name: str, *arguments: object) -> None:
        if getattr(self._libc, name)(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{name} {self._folder}: {os.strerror(number)}")


def can_hang(folder: Path) -> bool:
    """Whether this process may have such a disk: root alone, and not in every container."""
    try:
        with HungDisk(folder):
            return True
    except OSError:
        return False
