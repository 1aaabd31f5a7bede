"""Goals beside figures. A goal of speed is open (met: None) where a CPU ran at tiny size, or where its figure is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BF16_MFU, FP8_SPEED_UP, DECODE_SPEED_UP = 0.55, 1.3, 10.0


def _goal(goal: str, figure: Any, met: bool | None, remark: str = "") -> dict[str, Any]:
    return {"goal": goal, "figure": figure, "met": met, **({"remark": remark} if remark else {})}


def goals(sections: Mapping[str, Any], tiny: bool) -> dict[str, dict[str, Any]]:
    """What was asked for, what was found, and whether it was met."""
    results = {name: found.get("results", {}) for name, found in sections.items()}
    remark = "tiny size on a CPU: says nothing of speed" if tiny else ""

    def of_speed(goal: str, figure: float | None, least: float) -> dict[str, Any]:
        met = None if figure is None or tiny else figure >= least
        return _goal(goal, figure, met, remark or ("not measured" if figure is None else ""))

    decoded = decode_speed_up(results.get("decode", {}))
    local, engine = results.get("training_local", {}), results.get("training_te", {})
    mfus = {f"{kind} {name}": run["mfu"] for kind, runs in (("local", local), ("te", engine)) for name, run in runs.items()}
    bf16 = [mfu for name, mfu in mfus.items() if name in ("local bf16", "te bf16") and mfu is not None]
    return {
        "bf16_mfu": of_speed(f"MFU of bf16 training >= {BF16_MFU:.0%} of the measured matmul rate", max(bf16, default=None), BF16_MFU),
        "fp8_speed_up": of_speed(
            f"FP8 training >= {FP8_SPEED_UP} x the tokens/s of the best bf16", fp8_speed_up(local, engine), FP8_SPEED_UP
        ),
        "decode_speed_up": of_speed(f"decoding >= {DECODE_SPEED_UP:g} x the pictures/s of Pillow on a core", decoded, DECODE_SPEED_UP),
        "tests": _tests(results.get("tests", {}).get("pytest")),
        "bit_exact_resume": _resume(results.get("resume", {}).get("bit-exact")),
        "loss_gap": _goal("loss of FP8 - bf16 over the same steps and data: to be stated", loss_gaps(local, engine) or None, None),
    }


def fp8_speed_up(*kinds: Mapping[str, Any]) -> float | None:
    """Tokens a second of the fastest FP8 run over those of the fastest bf16 one; None where either is missing."""
    rates = [(name, run["tokens_per_s"]) for runs in kinds for name, run in runs.items()]
    fp8, bf16 = ([rate for name, rate in rates if name.startswith(kind)] for kind in ("fp8", "bf16"))
    return max(fp8) / max(bf16) if fp8 and bf16 else None


def loss_gaps(local: Mapping[str, Any], engine: Mapping[str, Any]) -> dict[str, float]:
    """Relative gap of each FP8 run's mean loss to that of the bf16 run with the same layers, over the second half of the steps."""
    gaps: dict[str, float] = {}
    for kind, runs in (("local", local), ("te", engine)):
        if "bf16" not in runs:
            continue
        base = _late(runs["bf16"]["losses"])
        gaps |= {f"{kind} {name}": _late(run["losses"]) / base - 1 for name, run in runs.items() if name.startswith("fp8")}
    return gaps


def _late(losses: list[float]) -> float:
    late = losses[len(losses) // 2 :]
    return sum(late) / len(late)


def decode_speed_up(rates: Mapping[str, Any]) -> float | None:
    """The fastest decoder's pictures a second over those of Pillow on a core."""
    alone = rates.get("pillow, one core")
    others = [found["pictures_per_s"] for name, found in rates.items() if not name.startswith(("pillow", "tiles"))]
    return max(others) / alone["pictures_per_s"] if alone and others else None


def _tests(found: Mapping[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return _goal("no test marked gpu fails", None, None, "not run")
    figure = {name: found[name] for name in ("collected", "passed", "skipped", "failed")}
    if found["ended_early"]:
        return _goal("no test marked gpu fails", figure, False if found["failed"] else None, "the time limit came before the last test")
    met = False if found["failed"] else True if found["passed"] else None
    return _goal("no test marked gpu fails", figure, met, "" if found["passed"] else found["note"])


def _resume(found: Mapping[str, Any] | None) -> dict[str, Any]:
    goal = "a resumed run has the losses, gradient norms, weights and optimizer state of an unbroken one, bit by bit"
    return _goal(goal, found, None if found is None else bool(found["same"]), "not measured" if found is None else "")
