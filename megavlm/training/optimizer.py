"""AdamW through megatron-core's optimizers, with a learning rate and weight decay per module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megavlm.config.schema import ParallelConfig, PrecisionConfig, StageConfig
from megavlm.models.freezing import MODULES, decays
from megavlm.models.layers.configs import DTYPES
from megavlm.parallel.host_adam import HostAdam
from megavlm.training.schedule import learning_rate

NO_CLIPPING = 1e30
"""megatron-core computes the gradient norm only when it clips; this clips nothing and keeps the norm in the metrics."""


def module_of(name: str) -> str:
    """vision, projector, language or vision_head, from a (possibly wrapped) parameter's name."""
    return name.removeprefix("module.").split(".", 1)[0]


def lr_scale(stage: StageConfig, module: str) -> float:
    """Multiplier of the schedule for a module; heads that a stage adds train at the schedule's rate."""
    return float(getattr(stage, module).lr_scale) if module in MODULES else 1.0


def weight_decay(stage: StageConfig, module: str) -> float:
    """Weight decay of a module's matrices."""
    own = getattr(stage, module).weight_decay if module in MODULES else None
    return stage.optimizer.weight_decay if own is None else float(own)


def build_optimizer(
    chunks: Sequence[torch.nn.Module], stage: StageConfig, precision: PrecisionConfig, parallel: ParallelConfig
) -> MegatronOptimizer:
    """An optimizer over what trains in `chunks` (already wrapped for data parallelism).

    Groups are told apart by (lr_mult, wd_mult), which is also how megatron-core matches them when a checkpoint is loaded.
    A rank with nothing to train still takes part in the gradient norm.
    """
    settings = stage.optimizer
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=0.0,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad_norm or NO_CLIPPING,
        # Sharded parameters are their own fp32 masters.
        bf16=precision.dtype == "bf16" and parallel.zero < 2,
        fp16=precision.dtype == "fp16",
        initial_loss_scale=precision.loss_scale.initial,
        min_loss_scale=precision.loss_scale.minimum,
        loss_scale_window=precision.loss_scale.window_steps,
        hysteresis=precision.loss_scale.hysteresis,
        params_dtype=DTYPES[precision.dtype] if parallel.zero < 2 else torch.float32,
        use_distributed_optimizer=parallel.zero == 1,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, list(chunks), config_overrides=_group_overrides(stage))
    if parallel.offload_optimizer:
        _use_host_adam(optimizer)
    else:
        _use_fused_adam(optimizer)
    return optimizer


def _group_overrides(stage: StageConfig) -> dict[ParamKey, Any]:
    overrides: dict[ParamKey, Any] = {}
    for module in (*MODULES, "vision_head"):
        for decayed in (True, False):

            def belongs(parameter: torch.nn.Parameter, name: str, module: str = module, decayed: bool = decayed) -> bool:
                return module_of(name) == module and decays(name, parameter) is decayed

            key = ParamKey(with_name_predicate=ParamWithNamePredicate(name=f"{module}/{'decay' if decayed else 'no_decay'}", fn=belongs))
            overrides[key] = {"lr_mult": lr_scale(stage, module), "wd_mult": weight_decay(stage, module) if decayed else 0.0}
    return overrides


def _use_fused_adam(optimizer: MegatronOptimizer) -> None:
    """One fused kernel per tensor instead of a dozen: on a CPU the update of a small model becomes several times faster."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = getattr(part, "optimizer", None)
        if isinstance(adam, torch.optim.Adam):
            for group in adam.param_groups:
                group["fused"], group["foreach"] = True, False
            adam.defaults["fused"], adam.defaults["foreach"] = True, False


def _use_host_adam(optimizer: MegatronOptimizer) -> None:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "optimizer", None) is not None:
            part.optimizer = HostAdam(part.optimizer)


def set_learning_rate(optimizer: MegatronOptimizer, stage: StageConfig, stage_step: int) -> dict[str, float]:
    """Write this update's rates into the groups; returns learning rate by module that trains."""
    rate = learning_rate(stage, stage_step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = group["wd_mult"]
    modules = [m for m in MODULES if getattr(stage, m).train != "frozen"]
    return {m: rate * lr_scale(stage, m) for m in modules}
