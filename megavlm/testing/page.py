"""Tables that tests write into pages of docs/, from what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def put_between(begin: str, end: str, table: str, page: Path) -> None:
    """Replace what stands between the page's two marks."""
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def arguments() -> tuple[Any, Path]:
    """Of a command RESULTS.json PAGE.md: the results, and the page."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
