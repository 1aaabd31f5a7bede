"""What trains: a stage's `vision`, `projector` and `language` blocks applied to a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megavlm.config.schema import ModuleTraining, StageConfig
from megavlm.models.projectors.qformer import QFormerProjector
from megavlm.models.vision import VisionEncoder

MODULES = ("vision", "projector", "language")


def apply_freezing(chunks: Sequence[torch.nn.Module], stage: StageConfig) -> None:
    """Set requires_grad of every parameter from the stage. Heads of encoder pretraining always train.

    With `last_layers` the top layers and what comes after them (final norm, output head) train. A tied embedding is
    then frozen with its module's bottom on every stage alike, because a copy that trains on one stage only would hang
    the gradient sum of the two.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            module = name.split(".", 1)[0]
            training: ModuleTraining | None = getattr(stage, module) if module in MODULES else None
            parameter.requires_grad = training is None or training.train == "full"
        for module in MODULES:
            part = getattr(chunk, module, None)
            if part is not None and getattr(stage, module).train == "last_layers":
                _unfreeze_top(part, module, getattr(stage, module).last_layers)
        for owner in (m for m in chunk.modules() if isinstance(m, VisionEncoder | QFormerProjector)):
            for parameter in owner.untrained_parameters():
                parameter.requires_grad = False


def _unfreeze_top(part: torch.nn.Module, module: str, last_layers: int) -> None:
    decoder = getattr(part, "decoder", None)
    if decoder is None:
        raise ValueError(f"{module}.train=last_layers: the {module} has no transformer layers; use frozen or full")
    total = part.vision.num_used_layers if isinstance(part, VisionEncoder) else decoder.config.num_layers
    if last_layers > total:
        raise ValueError(f"{module}.last_layers={last_layers}, but the {module} has {total} layers")
    for layer in decoder.layers:
        if layer.layer_number > total - last_layers:
            _set(layer.parameters(), True)
    for name in ("final_layernorm", "final_norm"):
        for owner in (decoder, part):
            norm = getattr(owner, name, None)
            if norm is not None:
                _set(norm.parameters(), True)
    head = getattr(part, "output_layer", None)
    if head is not None and not getattr(part, "share_embeddings_and_output_weights", False):
        _set(head.parameters(), True)
    for other in getattr(part, "beside", ()):  # encoders side by side: the top of each
        _unfreeze_top(other, module, last_layers)


def _set(parameters: Iterator[torch.nn.Parameter], trains: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad = trains


def decays(name: str, parameter: torch.nn.Parameter) -> bool:
    """Weight decay applies to matrices, not to biases, norms, position tables and learned tokens."""
    return parameter.dim() > 1 and not any(
        part in name for part in ("position_embedding", "norm", "latents", "register_tokens", "query_tokens", "probe")
    )
