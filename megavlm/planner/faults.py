"""What a recipe does about faults, in words."""

from __future__ import annotations

from megavlm.config.schema import Recipe


def faults_table(recipe: Recipe, world_size: int) -> str:
    """What the recipe's faults block comes to, for --dry-run."""
    faults, limits = recipe.faults, recipe.faults.watchdog
    bounds = {"skip": f", at most {faults.max_skips}", "rollback": f", at most {faults.max_rollbacks}"}
    window = f" within {faults.window_steps} steps"
    bad = faults.on_nonfinite + (bounds[faults.on_nonfinite] + window if faults.on_nonfinite in bounds else "")
    factors = {"loss": faults.loss_spike_factor, "gradient norm": faults.grad_norm_spike_factor}
    spikes = " or ".join(f"{name} above {factor:g} x" for name, factor in factors.items() if factor is not None)
    spike = (
        f"{spikes} the median of {faults.spike_window_steps} steps: {faults.on_spike}{bounds[faults.on_spike]}{window}"
        if faults.on_spike in bounds
        else "not looked for"
    )
    times = {"setup": limits.setup_s, "first step": limits.first_step_s, "step": limits.step_s, "evaluation": limits.evaluation_s}
    hangs = ", ".join(f"{name} {'no limit' if limit is None else f'{limit:g} s'}" for name, limit in times.items())
    slow = "not looked for"
    if faults.straggler_factor is not None and world_size > 1:
        slow = (
            f"from {faults.straggler_factor:g} x the median on"
            if recipe.tracking.step_parts
            else "not looked for (tracking.step_parts=false)"
        )
    copies = "never compared"
    if faults.replica_hash_every_steps is not None:
        copies = (
            f"compared every {faults.replica_hash_every_steps} steps, then {faults.on_divergence}"
            if world_size > 1
            else "one rank has none"
        )
    return (
        f"faults\n  loss or gradient not a number: {bad}\n  spikes: {spike}\n  hangs: {hangs}, save {recipe.checkpoint.timeout_s:g} s\n"
        f"  slow ranks: {slow}\n  copies of parameters: {copies}"
    )
