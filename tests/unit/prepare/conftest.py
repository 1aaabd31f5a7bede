"""Real pictures (scanned digits), and shards read back by the webdataset package and by our own catalog."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from megavlm.data.catalog import load_catalog
from megavlm.data.prepare import PrepareOptions, PrepareReport, prepare
from megavlm.data.sample import Sample
from megavlm.data.shards import ShardReader

SCANS = load_digits().images


def digit(number: int, kind: str = "PNG", size: tuple[int, int] = (24, 16)) -> bytes:
    """A scanned digit as an encoded picture."""
    out = io.BytesIO()
    scan = Image.fromarray((SCANS[number] * 15).astype(np.uint8)).resize(size).convert("RGB")
    scan.save(out, kind)
    return out.getvalue()


@dataclass
class Prepared:
    """An output folder as two readers see it."""

    report: PrepareReport
    samples: list[dict[str, Any]]
    """What the webdataset package reads: the JSON of each sample, with "pictures" (bytes, in order) and "key"."""
    folder: Path

    @property
    def texts(self) -> list[list[str]]:
        """Contents of all messages."""
        return [[m["content"] for m in s["messages"]] for s in self.samples]

    @property
    def refused(self) -> dict[str, int]:
        """Count by reason."""
        return {reason: r.count for reason, r in self.report.tally.refused.items()}


def read_back(folder: Path) -> list[dict[str, Any]]:
    """All samples by webdataset, checked against our own reader by byte offset."""
    paths = [str(p) for p in sorted(folder.glob("shard-*.tar"))]
    samples = []
    for item in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False):
        sample = json.loads(item["json"])
        Sample.model_validate(sample)
        names = [i["file"].partition(".")[2] for i in sample.get("images", [])]
        samples.append({**sample, "key": item["__key__"], "pictures": [item[n] for n in names]})
    catalog = load_catalog(folder)
    assert catalog is not None
    rows = catalog.table.to_pylist()
    assert [r["key"] for r in rows] == [s["key"] for s in samples]
    reader = ShardReader(folder, catalog.shard_names)
    for row, sample in zip(rows, samples, strict=True):
        assert row["problem"] is None
        shard = catalog.shard_names.index(row["shard"])
        assert [reader.read(shard, o, s) for o, s in zip(row["image_offset"], row["image_size"], strict=True)] == sample["pictures"]
        sizes = [Image.open(io.BytesIO(p)).size for p in sample["pictures"]]
        assert sizes == list(zip(row["image_width"], row["image_height"], strict=True))
    return samples


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Prepared]:
    """Prepare in this process into a new folder: run(format, input, **options)."""
    calls = 0

    def call(kind: str, source: Path | str, /, **options: Any) -> Prepared:
        nonlocal calls
        calls += 1
        folder = tmp_path / f"out-{calls}"
        allowed = {"max_refused_fraction": 1.0, "workers": 0, "output": str(folder), **options}
        report = prepare(PrepareOptions(format=kind, input=str(source), **allowed))
        return Prepared(report, read_back(Path(allowed["output"])), Path(allowed["output"]))

    return call


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with 0.png ... 5.png and 6.jpg."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(digit(i, size=(24 + i, 16)))
    (folder / "6.jpg").write_bytes(digit(6, "JPEG"))
    return folder


@pytest.fixture
def make_digit() -> Callable[..., bytes]:
    """An encoded picture of a scan."""
    return digit


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Write records as JSONL."""

    def write(*records: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        return path

    return write
