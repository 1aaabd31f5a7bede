"""`megavlm doctor`: what of this machine megavlm can use, and what each missing part costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megavlm.cli._parts import Finding
    from megavlm.data.decode import DecoderReport


TAKEN = "auto takes this one"


def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False) -> None:
    """Tell which optional parts are here, their versions, and what is lost without the others."""
    import json
    import os
    import sys

    from rich.console import Console

    from megavlm.cli import _parts

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    findings = []
    with Console(file=sys.stderr).status("importing ...") as status:
        for part in _parts.PARTS:
            status.update(f"importing {part.name} ...")
            findings.append(_parts.examine(part))
            if part.name == "torch":
                findings.append(_parts.examine_cuda())
        status.update("decoding a picture ...")
        decoders = _decoders()
        status.update("asking for attention ...")
        attention, context, precision = _attention(), _context(), _precision()
    if as_json:
        here = {"decoders": [d._asdict() for d in decoders], "attention": attention, "context": context, "precision": precision}
        typer.echo(json.dumps({**_parts.as_json(findings), **here}, indent=2))
    else:
        _print(findings, _parts.machine(), decoders, attention, context, precision)


def _decoders() -> list[DecoderReport]:
    """Nothing where torch itself does not load: the table of parts says that already."""
    try:
        from megavlm.data.decode import decoders_here

        return decoders_here()
    except Exception:
        return []


def _attention() -> dict[str, str]:
    """Backend of precision.attention -> why it cannot be taken here, `TAKEN` or "" when it can; for bf16 and heads of 128."""
    try:
        from megavlm_kernels.packed_attention import BACKENDS, Call, choose, machine_of

        choice = choose(Call("bf16", 128), machine_of("cuda"))
    except Exception:
        return {}
    return {b: choice.refused.get(b, TAKEN if b == choice.backend else "") for b in BACKENDS}


def _context() -> dict[str, str]:
    """Way of parallel.context_comm -> the same; for two ranks, plain bf16 layers of 32 and 8 heads and context_split=zigzag."""
    try:
        from megavlm_kernels.context_attention import COMMS, SharedCall, choose_comm
        from megavlm_kernels.packed_attention import Call, machine_of

        choice = choose_comm(SharedCall(Call("bf16", 128), 2, 32, 8, "zigzag"), machine_of("cuda"))
    except Exception:
        return {}
    return {way: choice.refused.get(way, TAKEN if way == choice.comm else "") for way in COMMS}


def _precision() -> dict[str, str]:
    """Number format -> through what this machine computes it, or "not here: " and why."""
    try:
        from megavlm.planner.precision import formats_here
        from megavlm_kernels.packed_attention import machine_of

        return formats_here(machine_of("cuda"))
    except Exception:
        return {}


def _print(
    findings: list[Finding],
    machine: dict[str, str],
    decoders: list[DecoderReport],
    attention: dict[str, str],
    context: dict[str, str],
    precision: dict[str, str],
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    memory = "" if machine["memory_gib"] == "unknown" else f", {machine['memory_gib']} GiB of memory"
    console.print(f"Python {machine['python']} on {machine['system']}: {machine['cores']} cores{memory}", highlight=False)
    table = Table("part", "", "version", "remarks", title_justify="left")
    for finding in findings:
        colour = {"ok": "green", "missing": "red" if finding.required else "yellow", "broken": "red"}[finding.status]
        remarks = [finding.detail] if finding.detail else []
        if finding.status != "ok":
            remarks.append(("needed: " if finding.required else "") + finding.without)
        table.add_row(finding.name, f"[{colour}]{finding.status}[/]", finding.version, "; ".join(remarks))
    console.print(table)
    table = Table("picture decoder", "", "remarks", title_justify="left")
    for decoder in decoders:
        table.add_row(decoder.name, "[green]ok[/]" if decoder.usable else "[yellow]not here[/]", decoder.remark)
    console.print(table)
    for title, conditions, ways in (
        ("attention", "bf16, heads of 128", attention),
        ("keys of context ranks", "bf16, context_split=zigzag", context),
    ):
        table = Table(title, "", f"remarks ({conditions})", title_justify="left")
        for backend, remark in ways.items():
            usable = remark in ("", TAKEN)
            table.add_row(backend, "[green]ok[/]" if usable else "[yellow]not here[/]", remark)
        console.print(table)
    table = Table("precision", "", "through", title_justify="left")
    for name, through in precision.items():
        missing = through.startswith("not here: ")
        table.add_row(name, "[yellow]not here[/]" if missing else "[green]ok[/]", through.removeprefix("not here: "))
    console.print(table)
    lacking = [f.name for f in findings if f.required and f.status != "ok"]
    if lacking:
        console.print(f"[red]Needed and not usable: {', '.join(lacking)}.[/] Install megavlm again with `make install`.")
