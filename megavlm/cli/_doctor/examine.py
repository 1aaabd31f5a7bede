"""The doctor's round, with a word to whoever waits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megavlm.cli._doctor import parts
from megavlm.cli._doctor.check import Check
from megavlm.cli._doctor.disk import check_disk
from megavlm.cli._doctor.mlflow import check_mlflow
from megavlm.cli._doctor.reach import check_between, check_here
from megavlm.cli._doctor.report import TAKEN, Report
from megavlm.cli._doctor.slurm import check_slurm
from megavlm.config.cluster import ClusterConfig
from megavlm.config.schema import Recipe, TrackingConfig
from megavlm_launchers.environment import found_ranks, num_visible_gpus

Say = Callable[[str], None]


def examine_machine(say: Say) -> Report:
    """Packages, and what of them pictures, attention and number formats can use."""
    report = Report()
    for part in parts.PARTS:
        say(f"importing {part.name} ...")
        report.parts.append(parts.examine(part))
        if part.name == "torch":
            report.parts.append(parts.examine_cuda())
    say("decoding a picture ...")
    report.decoders = _or_nothing(_decoders, [])
    say("asking for attention ...")
    report.attention, report.context = _or_nothing(_attention, {}), _or_nothing(_context, {})
    report.precision = _or_nothing(_precision, {})
    return report


def examine_surroundings(
    report: Report, recipe: Recipe | None, cluster: ClusterConfig | None, ranks: bool, say: Say, world_size: int | None = None
) -> bool:
    """Ranks, disk, MLflow and SLURM; False on a rank that has nothing to tell, because rank 0 tells it."""
    tells = True
    if ranks and not any(f.required and f.status != "ok" for f in report.parts if f.name == "torch"):
        tells = _examine_ranks(report, recipe, say)
    if not tells:
        return bool(report.problems)
    run_dir = Path(recipe.run.dir) if recipe is not None else Path.cwd()
    say("writing to the disk ...")
    report.checks += [check_disk(run_dir, needed=False)] if recipe is None else _check_tiers(recipe, cluster, world_size)
    say("asking MLflow ...")
    report.checks.append(check_mlflow(recipe.tracking if recipe is not None else TrackingConfig(), run_dir))
    say("asking SLURM ...")
    report.checks.append(check_slurm(cluster))
    return True


def examine_recipe(report: Report, recipe: Recipe, world_size: int | None, say: Say) -> None:
    """What the recipe takes here."""
    say("reading the recipe against this machine ...")
    try:
        from megavlm.cli._doctor.recipe import check_recipe
        from megavlm_kernels.packed_attention import machine_of

        device = "cuda" if _uses_gpu(recipe) else "cpu"
        size = _num_ranks(recipe, world_size)
        report.recipe = check_recipe(recipe, machine_of(device), size, _memory_of(device, size))
    except ImportError as error:  # torch is broken: the table of parts says that
        report.recipe = [Check("recipe", "not tried", f"{type(error).__name__}: {error}")]


def _num_ranks(recipe: Recipe, world_size: int | None) -> int:
    """Of the run: as asked, or as the environment, the recipe or the GPUs say."""
    told = world_size or int(os.environ.get("WORLD_SIZE") or 0) or recipe.run.num_ranks
    return told or (max(1, num_visible_gpus(os.environ)) if _uses_gpu(recipe) else 1)


def _check_tiers(recipe: Recipe, cluster: ClusterConfig | None, world_size: int | None) -> list[Check]:
    """The disks that checkpoints are written to: of the run's folder, and of this node's own tier."""
    from megavlm.cli._doctor.room import durable_room, local_room

    durable = durable_room(recipe)
    found = [check_disk(durable.folder, True, durable.wanted_bytes, durable.replaced_bytes)]
    if cluster is not None and world_size is None:
        world_size = cluster.world_size
    size = _num_ranks(recipe, world_size)
    local = local_room(recipe, size, min(size, cluster.ranks if cluster is not None else int(os.environ.get("LOCAL_WORLD_SIZE") or size)))
    if local is not None:
        lost = "no local checkpoint can be written, and a restart goes on from run.dir: choose another checkpoint.local.dir"
        short = "local checkpoints are left out: make room, or choose another checkpoint.local.dir"
        found.append(check_disk(local.folder, False, local.wanted_bytes, local.replaced_bytes, lost, short))
    return found


def _examine_ranks(report: Report, recipe: Recipe | None, say: Say) -> bool:
    gpus = num_visible_gpus(os.environ) if recipe is None or _uses_gpu(recipe) else 0
    backends = ["gloo", *(["nccl"] if gpus and _has_cuda() else [])]
    around = found_ranks(os.environ)
    if around is None:
        for backend in backends:
            say(f"letting ranks talk over {backend} ...")
            report.checks.append(check_here(backend, gpus if backend == "nccl" else 2))
        return True
    os.environ.update(around)
    tells = True
    for backend in backends:
        say(f"letting {around['WORLD_SIZE']} ranks talk over {backend} ...")
        check, tells = check_between(backend)
        report.checks.append(check)
        if check.is_problem:
            break  # ranks that do not meet over one would wait for each other in the next
    return tells


def _uses_gpu(recipe: Recipe) -> bool:
    return recipe.run.device == "cuda" or (recipe.run.device == "auto" and _has_cuda())


def _has_cuda() -> bool:
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:
        return False


def _memory_of(device: str, num_ranks: int) -> int | None:
    """Bytes of a GPU; on a CPU, the machine's shared by the ranks."""
    if device == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_ranks
    except (ValueError, OSError):
        return None


def _or_nothing(ask: Callable[[], Any], nothing: Any) -> Any:
    """Where torch itself does not load, the table of parts says that already."""
    try:
        return ask()
    except Exception:
        return nothing


def _decoders() -> Any:
    from megavlm.data.decode import decoders_here

    return decoders_here()


def _attention() -> dict[str, str]:
    from megavlm_kernels.packed_attention import BACKENDS, Call, choose, machine_of

    choice = choose(Call("bf16", 128), machine_of("cuda"))
    return {b: choice.refused.get(b, TAKEN if b == choice.backend else "") for b in BACKENDS}


def _context() -> dict[str, str]:
    from megavlm_kernels.context_attention import COMMS, SharedCall, choose_comm
    from megavlm_kernels.packed_attention import Call, machine_of

    choice = choose_comm(SharedCall(Call("bf16", 128), 2, 32, 8, "zigzag"), machine_of("cuda"))
    return {way: choice.refused.get(way, TAKEN if way == choice.comm else "") for way in COMMS}


def _precision() -> dict[str, str]:
    from megavlm.planner.compiled import machine_stops
    from megavlm.planner.precision import formats_here
    from megavlm_kernels.packed_attention import machine_of

    machine = machine_of("cuda")
    reason = machine_stops(machine.device)
    return {**formats_here(machine), "compiled encoder": "torch.compile" if reason is None else f"not here: {reason}"}
