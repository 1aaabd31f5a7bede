"""One script for the first minutes on a GPU: what is there, whether it is right, how fast it is, and what of the goals that meets.

    python benchmarks/gpu_validate.py [--sections ceilings,kernels] [--budget-s 540] [--out benchmarks/results/gpu_validate.json]

Sections, in this order; each has processes of its own and a time limit:
    environment     megavlm doctor, versions
    ceilings        bf16 and FP8 matrix products and a copy: what the others are measured against
    training_local  4 layers of Qwen3-8B's shape and InternViT-300M on packs of 8192 tokens, on megatron-core's own layers: bf16, its
                    attention a call a segment, own FP8 with a scale a tensor and a scale a row
    training_te     the same on Transformer Engine's layers: bf16, FP8 with current and with blockwise scales
    kernels         every op of megavlm_kernels: time, share of a ceiling, error against fp64, beside plain torch
    head            target-only LM head against full positions, full logits, and Liger's
    resume          is a resumed run the same to the bit?
    decode          pictures a second: Pillow on a core, nvImageCodec and DALI with 4, 8 and 16 threads
    tests           pytest -m gpu

The JSON is written again after every task. What raises, crashes or reaches its limit is in it with its traceback; the rest goes on, and
the exit code is 1. Without a CUDA device every section runs at tiny size on the CPU, and says so: figures of speed mean nothing then.

The packages that megavlm needs must be importable (setup.py), of megatron-core the version that it names. Transformer Engine, DALI, Liger
and pytest-xdist are used where they are there. The data are made on the spot.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu.goals import goals
from gpu.runner import Place, Section, SectionRun, work

SECTIONS = (
    Section("environment", "gpu.basics", 60),
    Section("ceilings", "gpu.basics", 60),
    Section("training_local", "gpu.training", 150, hides=("transformer_engine",)),
    Section("training_te", "gpu.training", 150),
    Section("kernels", "gpu.kernel_table", 90),
    Section("head", "gpu.head_table", 60),
    Section("resume", "gpu.resume", 90),
    Section("decode", "gpu.decoding", 60),
    Section("tests", "gpu.basics", 240),
)
LEAST_S = 5.0
"""With less of the budget left a section does not begin."""
BUDGET_S = {"cuda": 540.0, "cpu": 3600.0}
CPU_PATIENCE = 10.0
"""A CPU run, which others may share, has limits that are so many times longer."""
NOTES = {"cuda": "measured on the GPU", "cpu": "no CUDA device: every section ran at tiny size on the CPU; its speed means nothing"}
MARKS = {True: "met", False: "NOT MET", None: "open"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(s.name for s in SECTIONS), help="names, with commas between")
    parser.add_argument("--budget-s", type=float, help="for everything together: 540, on a CPU 3600")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_validate.json, on a CPU gpu_validate-cpu.json")
    parser.add_argument("--steps", type=int, help="training steps behind the warm-up")
    parser.add_argument("--layers", type=int, help="of the LLM, on a GPU: 4")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    for name in ("--place", "--rows", "--skip"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        section = next(s for s in SECTIONS if s.name == arguments.child)
        return work(section, Place(**json.loads(Path(arguments.place).read_text())), Path(arguments.rows), json.loads(arguments.skip))
    known = {section.name: section for section in SECTIONS}
    wanted = arguments.sections.split(",")
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"--sections: {', '.join(unknown)} is none of {', '.join(known)}")
    options = {name: value for name in ("steps", "layers") if (value := getattr(arguments, name)) is not None}
    validation = Validation(options, arguments.budget_s, arguments.out)
    return validation.run([s for s in SECTIONS if s.name in wanted])


class Validation:
    """Runs sections one after the other; the report on disk is never behind by more than the task under way."""

    def __init__(self, options: dict[str, Any], budget_s: float | None, out: Path | None) -> None:
        self._start = time.monotonic()
        self.device, name = find_device()
        results = Path(__file__).parent / "results"
        self.out = out or results / ("gpu_validate.json" if self.device == "cuda" else "gpu_validate-cpu.json")
        self.report: dict[str, Any] = {
            "command": " ".join(["python", "benchmarks/gpu_validate.py", *sys.argv[1:]]),
            "device": name,
            "tiny": self.device == "cpu",
            "note": NOTES[self.device],
            "budget_s": budget_s or BUDGET_S[self.device],
            "options": options,
            "sections": {},
        }

    def run(self, sections: Sequence[Section]) -> int:
        """Returns the exit code: 0 where every section did all its tasks."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.say(f"{self.report['device']}: {self.report['note']}")
        with tempfile.TemporaryDirectory(prefix="gpu-validate-") as folder:
            for section in sections:
                found = self._run_section(section, Path(folder))
                self._write()
                self.say(f"{section.name}: {found['status']} after {found['seconds']} s")
        self._write()
        for goal in self.report["goals"].values():
            figure = f"{goal['figure']:.3g}" if isinstance(goal["figure"], float) else json.dumps(goal["figure"])[:200]
            self.say(f"{MARKS[goal['met']]:8}{goal['goal']}: {figure} {goal.get('remark', '')}")
        self.say(f"wrote {self.out}")
        return int(any(found["status"] != "ok" for found in self.report["sections"].values()))

    def _run_section(self, section: Section, folder: Path) -> dict[str, Any]:
        left_s = self.report["budget_s"] - (time.monotonic() - self._start)
        known: dict[str, Any] = self.report["sections"]
        if left_s < LEAST_S:
            known[section.name] = {"status": "no time", "seconds": 0.0, "errors": {"section": "the budget was spent before it began"}}
            return known[section.name]
        limit_s = min(section.limit_s * (1.0 if self.device == "cuda" else CPU_PATIENCE), left_s)
        facts = {name: found.get("results", {}) for name, found in known.items()}
        settings = folder / f"{section.name}.place.json"
        settings.write_text(json.dumps(asdict(Place(self.device, str(folder), facts, self.report["options"], limit_s))))
        command = [sys.executable, str(Path(__file__).resolve()), "--child", section.name, "--place", str(settings)]

        def on_row(row: dict[str, Any]) -> None:
            known[section.name] = run.report
            self._write()
            self.say(f"{section.name} / {row['task']}: {told(row)} ({row.get('seconds', 0):.1f} s)")

        run = SectionRun(section, command, folder / f"{section.name}.log", limit_s, on_row)
        known[section.name] = run.run()
        return known[section.name]

    def _write(self) -> None:
        self.report["seconds"] = round(time.monotonic() - self._start, 1)
        self.report["goals"] = goals(self.report["sections"], self.report["tiny"])
        partial = self.out.with_name(self.out.name + ".partial")
        partial.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.out)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.0f} s] {text}", file=sys.stderr, flush=True)


def told(row: dict[str, Any]) -> str:
    """A task's end in a line."""
    if "unavailable" in row:
        return f"not here: {row['unavailable']}"
    return f"FAILED: {row['error'].strip().splitlines()[-1]}" if "error" in row else "done"


def find_device() -> tuple[str, str]:
    """(cuda or cpu, its name). Asked in a process of its own: this one holds no memory of the GPU."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    name = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return ("cuda", name) if name else ("cpu", "CPU")


if __name__ == "__main__":
    sys.exit(main())
