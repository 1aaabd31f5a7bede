"""Which code a recipe takes on this machine, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megavlm.cli._doctor.check import Check
from megavlm.config.schema import Recipe
from megavlm.planner import compiled
from megavlm.planner.attention import attention_calls
from megavlm.planner.memory import estimate_memory
from megavlm.planner.precision import BF16_CAPABILITY, choose_fp8
from megavlm.topology.grid import RankGrid
from megavlm.topology.table import human_bytes
from megavlm_kernels.context_attention import SharedCall, choose_comm
from megavlm_kernels.packed_attention import Machine, choose


def check_recipe(recipe: Recipe, machine: Machine, world_size: int, memory_bytes: int | None) -> list[Check]:
    """What each part of the recipe is computed by; what cannot be is broken, and needed.

    Args:
        machine: what attention and products may use.
        world_size: ranks of the run.
        memory_bytes: of one rank's device; None: unknown.
    """
    parts: list[tuple[str, Callable[[], str]]] = [
        ("grid", lambda: _grid(recipe, world_size)),
        ("number format", lambda: _format(recipe, machine)),
        *((f"attention of {part}", _attention(recipe, part, machine)) for part in attention_calls(recipe)),
        ("context ranks", lambda: _context(recipe, machine)),
        ("FP8", lambda: _fp8(recipe, machine)),
        ("compiled encoder", lambda: _compiled(recipe, machine)),
        ("decoder", lambda: _decoder(recipe, machine)),
        ("optimizer", lambda: _optimizer(recipe)),
        ("starting weights", lambda: _start(recipe)),
        ("data", lambda: _data(recipe)),
    ]
    found = [_tried(name, ask) for name, ask in parts]
    return [*(check for check in found if check.detail), _memory(recipe, machine, world_size, memory_bytes)]


def _tried(name: str, ask: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", ask(), needed=True)
    except (ValueError, OSError) as error:
        return Check(name, "broken", str(error), "the run is refused", needed=True)


def _grid(recipe: Recipe, world_size: int) -> str:
    from megavlm.training.layout import check_run

    check_run(recipe, world_size)
    grid = RankGrid.from_config(recipe.parallel, world_size)
    axes = {"data": grid.data, "tensor": grid.tensor, "pipeline": grid.pipeline, "context": grid.context, "expert": grid.expert}
    split = ", ".join(f"{name} {size}" for name, size in axes.items() if size > 1)
    return f"{world_size} ranks" + (f": {split}" if split else "")


def _format(recipe: Recipe, machine: Machine) -> str:
    dtype, capability = recipe.precision.dtype, machine.capability
    if dtype == "bf16" and machine.device == "cuda" and capability is not None and capability < BF16_CAPABILITY:
        has = ".".join(map(str, capability))
        raise ValueError(
            f"precision.dtype=bf16 needs compute capability {'.'.join(map(str, BF16_CAPABILITY))}, this GPU has {has}: set fp16"
        )
    return dtype + (", slow on a CPU" if machine.device == "cpu" and dtype != "fp32" else "")


def _attention(recipe: Recipe, part: str, machine: Machine) -> Callable[[], str]:
    def ask() -> str:
        call, forced = attention_calls(recipe)[part], recipe.precision.attention
        choice = choose(call, machine, forced)
        faster = [f"not {backend}: {why}" for backend, why in choice.refused.items()] if forced == "auto" else []
        return "; ".join([choice.backend, *faster])

    return ask


def _context(recipe: Recipe, machine: Machine) -> str:
    parallel, language = recipe.parallel, recipe.model.language
    if parallel.context == 1:
        return ""
    heads, keys = language.num_attention_heads // parallel.tensor, max(1, language.kv_heads // parallel.tensor)
    call = next(call for part, call in attention_calls(recipe).items() if part.startswith("language"))
    shared = SharedCall(call, parallel.context, heads, keys, parallel.context_split)
    return f"keys by {choose_comm(shared, machine, parallel.context_comm, recipe.precision.attention).comm}"


def _fp8(recipe: Recipe, machine: Machine) -> str:
    backend = choose_fp8(recipe.model, recipe.precision, recipe.parallel, machine)
    return "" if backend is None else f"{recipe.precision.fp8} scales through {backend}"


def _compiled(recipe: Recipe, machine: Machine) -> str:
    if not recipe.precision.compile_encoder:
        return ""
    reason = compiled.machine_stops(machine.device)
    if reason is not None:
        raise ValueError(f"precision.compile_encoder=true: {reason}")
    return "its MLPs are one graph"


def _decoder(recipe: Recipe, machine: Machine) -> str:
    if recipe.model.text_only:
        return ""
    from megavlm.data.decode import make_decoder

    return str(make_decoder(recipe.data.image.decoder, machine.device).name)


def _optimizer(recipe: Recipe) -> str:
    """megatron-core takes Transformer Engine's Adam, else Apex's, else torch's."""
    from importlib.util import find_spec

    how = {0: "", 1: ", state shared by data ranks (ZeRO-1)"}.get(recipe.parallel.zero, f", ZeRO-{recipe.parallel.zero}")
    if recipe.parallel.offload_optimizer:
        return f"AdamW in host memory{how}"
    by = next((name for name, module in (("Transformer Engine", "transformer_engine"), ("Apex", "apex")) if find_spec(module)), "torch")
    return f"fused AdamW of {by}{how}"


def _start(recipe: Recipe) -> str:
    from megavlm.checkpoint.hf.load import check_start

    check_start(recipe.init)
    folders = [str(v) for v in recipe.init.model_dump().values() if isinstance(v, str)]
    return ", ".join(folders)


def _data(recipe: Recipe) -> str:
    used = sorted({name for stage in recipe.stages for name in stage.sources} | set(recipe.evaluation.sources))
    missing = [
        f"data.sources.{name}.path={recipe.data.sources[name].path}"
        for name in used
        if "://" not in recipe.data.sources[name].path and not Path(recipe.data.sources[name].path).exists()
    ]
    if missing:
        raise ValueError(f"not there: {', '.join(missing)}")
    return f"{len(used)} sources are there"


def _memory(recipe: Recipe, machine: Machine, world_size: int, memory_bytes: int | None) -> Check:
    from megavlm.training.layout import stage_layout

    name, most, where = "memory of a rank", 0, ""
    try:
        for stage in recipe.stages:
            layout = stage_layout(recipe.parallel, stage, recipe.model)
            grid = RankGrid.from_config(layout, world_size)
            for rank in estimate_memory(recipe.model, stage, recipe.data, grid, layout, recipe.precision, 0, machine.device):
                if rank.total_bytes > most:
                    most, where = (
                        rank.total_bytes,
                        f"stage {stage.name}" + (f", pipeline rank {rank.pipeline_rank}" if grid.pipeline > 1 else ""),
                    )
    except ValueError as error:
        return Check(name, "not tried", str(error))
    detail = f"about {human_bytes(most)} ({where})"
    if memory_bytes is None:
        return Check(name, "ok", detail + "; the device's is unknown")
    detail += f" of {human_bytes(memory_bytes)}"
    if most > memory_bytes:
        remedy = (
            "it does not fit: parallel.zero, parallel.recompute, more ranks for parallel.tensor or pipeline, or fewer micro_batch_packs"
        )
        return Check(name, "broken", detail, remedy, needed=True)
    if most > 0.85 * memory_bytes:
        return Check(name, "note", detail, "workspaces and fragmentation take 10-20 % more: it may not fit")
    return Check(name, "ok", detail)
