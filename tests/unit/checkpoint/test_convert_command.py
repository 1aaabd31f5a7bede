"""`megavlm convert` from the command line: import, export, verify, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from megavlm.testing.hf_models import Kind, make_hf


def megavlm(*arguments: str | Path, code: int = 0) -> str:
    """Output of the command, whose exit code must be `code`."""
    command = [sys.executable, "-m", "megavlm.cli", "convert", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["", "kernels", "launchers"])}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=200, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_there_and_back(tmp_path: Path) -> None:
    make_hf(Kind("siglip", select="full", dtype="bfloat16"), tmp_path / "hf")
    assert "(bf16)" in megavlm("import", tmp_path / "hf", tmp_path / "checkpoint")
    megavlm("export", tmp_path / "checkpoint", tmp_path / "out")
    said = megavlm("verify", tmp_path / "checkpoint", tmp_path / "hf")
    assert "tensors are equal bit for bit" in said
    report = json.loads((tmp_path / "hf" / "megavlm_verify.json").read_text())
    assert report["ok"] and report["num_tensors"] > 100 and report["unequal"] == []
    said = megavlm("import", tmp_path / "hf", tmp_path / "checkpoint", code=2)
    assert "megavlm: error: " in said and "is there already" in said and "Traceback" not in said
