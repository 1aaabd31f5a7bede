"""The dynamic loss scale of fp16: megatron-core's, seen from the loop and from checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import MegatronOptimizer


def scaler_of(optimizer: MegatronOptimizer) -> DynamicGradScaler | None:
    """The optimizer's loss scaler; None outside fp16.

    Ranks that train nothing have one too, which hears of every overflow: the last pipeline stage may be frozen, and it scales the loss.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    scalers = [part.grad_scaler for part in parts if getattr(part, "grad_scaler", None) is not None]
    # Several would see other overflows and drift apart; only experts that are spread over ranks make several, and those are refused.
    assert len(scalers) <= 1, f"{len(scalers)} loss scalers"
    scaler: DynamicGradScaler | None = scalers[0] if scalers else None
    return scaler


def scale_of(optimizer: MegatronOptimizer) -> float | None:
    """The present loss scale; None outside fp16."""
    scaler = scaler_of(optimizer)
    return None if scaler is None else float(scaler.scale)


def scaler_state(optimizer: MegatronOptimizer) -> dict[str, float]:
    """What a checkpoint keeps, as JSON; {} outside fp16. Equal on all ranks."""
    scaler = scaler_of(optimizer)
    return {} if scaler is None else {name: float(value) for name, value in scaler.state_dict().items()}


def restore_scaler(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Go on with the scale of a checkpoint."""
    scaler = scaler_of(optimizer)
    if scaler is None or not state:
        return
    scaler.load_state_dict(
        {
            "scale": torch.tensor([state["scale"]], dtype=torch.float32),
            "growth_tracker": int(state["growth_tracker"]),
            "hysteresis_tracker": int(state["hysteresis_tracker"]),
        }
    )
