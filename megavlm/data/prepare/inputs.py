"""What the input of a call was, to notice later that it is another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from megavlm.data.prepare.files import PICTURE_SUFFIXES, below, is_folder, suffix, walk
from megavlm.data.prepare.records import RECORD_SUFFIXES
from megavlm.data.prepare.types import PrepareError, PrepareOptions
from megavlm.data.prepare.video import VIDEO_SUFFIXES
from megavlm.data.storage import as_path, stamp

_LISTED = frozenset({"captions", "video", "frames"})


def input_state(options: PrepareOptions) -> dict[str, list[Any]]:
    """Size and time (or etag) of each file that the entries come from.

    A folder of pictures or clips is one item, the number and the hash of its files' names: it may hold millions, and to ask for the
    time of each takes a network file system minutes. Bytes that change under the same name are not noticed there.
    """
    source = options.input
    if not is_folder(source):
        files = [source]
    elif options.format in _LISTED:
        wanted = PICTURE_SUFFIXES | VIDEO_SUFFIXES | {"txt"}
        names = [n for n in walk(source) if suffix(n) in wanted]
        return {source: [len(names), hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()]}
    else:
        suffixes = ("tar",) if options.format == "webdataset" else RECORD_SUFFIXES
        files = below(source, [n for n in walk(source) if suffix(n) in suffixes])
    if options.annotations:
        files.append(options.annotations)
    for file in map(as_path, files):
        if isinstance(file, Path) and not file.is_file():
            raise PrepareError(f"{file}: no plain file; a pipe or device cannot be read twice, and a stopped call could not go on")
    return {file: list(stamp(file)) for file in files}


def changed_inputs(before: dict[str, list[Any]], now: dict[str, list[Any]]) -> list[str]:
    """Names of what came, went or changed."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
