"""Files that run a program when a careless reader opens them: each touches a canary, and is proven alive by a careless reader.

For tests that show that nothing of a checkpoint, an export, a data set or a run is opened carelessly.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shlex
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

Make = Callable[[Path], bytes]
"""Contents of a file whose careless reader touches the path."""


class _Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {shlex.quote(str(self.canary))}",)


def raw_pickle(canary: Path) -> bytes:
    return pickle.dumps(_Bomb(canary), protocol=2)


def framed_pickle(canary: Path) -> bytes:
    return pickle.dumps({"step": 1, "modules": _Bomb(canary)}, protocol=4)


def torch_zip(canary: Path) -> bytes:
    return _saved({"weight": torch.zeros(2), "more": _Bomb(canary)}, zipped=True)


def torch_legacy(canary: Path) -> bytes:
    return _saved([_Bomb(canary)], zipped=False)


def numpy_objects(canary: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([_Bomb(canary)], dtype=object), allow_pickle=True)
    return stream.getvalue()


def yaml_apply(canary: Path) -> bytes:
    return f'run: !!python/object/apply:os.system ["touch {canary}"]\n'.encode()


def jinja_escape(canary: Path) -> bytes:
    """Server-side template injection: from a string's class to every function that Python has loaded; the first that will do is called."""
    touch = f"touch {canary}"
    return (
        "{% set found = namespace(done=false) %}{% for c in ''.__class__.__mro__[1].__subclasses__() %}"
        "{% if not found.done and c.__init__.__globals__ is defined and c.__init__.__globals__['__builtins__'] is defined %}"
        "{% set found.done = true %}"
        "{{ c.__init__.__globals__['__builtins__']['__import__']('os').system(" + json.dumps(touch) + ") }}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    ).encode()


def tar_of_pickles(canary: Path) -> bytes:
    """A shard whose samples are pickles, by the names that WebDataset's decoders unpickle."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("000.pyd", "000.pickle", "000.json", "000.pth", "000.jpg"):
            data = raw_pickle(canary)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def postscript(canary: Path) -> bytes:
    """A picture that Ghostscript would be started for."""
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch {canary}) (w) file\nshowpage\n".encode()


PICKLES: dict[str, Make] = {
    "pickle": raw_pickle,
    "pickle in a dictionary": framed_pickle,
    "torch.save": torch_zip,
    "torch.save, before 1.6": torch_legacy,
    "numpy objects": numpy_objects,
}
EVERYWHERE: dict[str, Make] = {**PICKLES, "YAML tag": yaml_apply, "Jinja escape": jinja_escape, "tar of pickles": tar_of_pickles}
_FITTING: dict[str, Make] = {
    ".tar": tar_of_pickles,
    ".yaml": yaml_apply,
    ".jinja": jinja_escape,
    ".pt": torch_zip,
    ".distcp": torch_zip,
    ".safetensors": torch_zip,
}


def fitting(file: Path) -> Make:
    """The payload that its format's careless reader would run."""
    return _FITTING.get(file.suffix, raw_pickle)


CARELESS: dict[str, Callable[[bytes], Any]] = {
    "pickle": pickle.loads,
    "pickle in a dictionary": pickle.loads,
    "torch.save": lambda data: torch.load(io.BytesIO(data), weights_only=False),
    "torch.save, before 1.6": lambda data: torch.load(io.BytesIO(data), weights_only=False),
    "numpy objects": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
    "YAML tag": lambda data: yaml.load(data, Loader=yaml.UnsafeLoader),
    "Jinja escape": lambda data: _careless_template(data.decode()),
    "tar of pickles": lambda data: _careless_tar(data),
}
"""What each payload is made for."""


def _saved(value: Any, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    assert zipped == zipfile.is_zipfile(stream)
    return stream.getvalue()


def _careless_template(text: str) -> str:
    import jinja2

    return jinja2.Environment(autoescape=False).from_string(text).render(messages=[])


def _careless_tar(data: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.extractfile("000.pyd")
        assert member is not None
        pickle.loads(member.read())
