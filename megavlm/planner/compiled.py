"""Where precision.compile_encoder can be had: a function of the recipe, and of what a machine has. Imports no torch."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from megavlm.config.schema import Recipe
from megavlm.config.tensor_split import encoder_tensor_ranks
from megavlm.planner.precision import PrecisionError


def check_compiled(recipe: Recipe) -> None:
    """Raises PrecisionError where the recipe wants a compiled encoder and no machine could compile it."""
    if not recipe.precision.compile_encoder:
        return
    reason = recipe_stops(recipe)
    if reason is not None:
        raise PrecisionError(f"precision.compile_encoder=true cannot be done: {reason}, or set compile_encoder=false")


def recipe_stops(recipe: Recipe) -> str | None:
    """What of the recipe does not go with a compiled encoder, and what to set instead; None when all does."""
    model, precision, parallel = recipe.model, recipe.precision, recipe.parallel
    if model.text_only:
        return "the model has no encoder: take precision.compile_encoder out"
    if precision.fp8 != "none" and "vision" not in precision.keep_bf16:
        return "its products are in FP8, which is not traced: name vision in precision.keep_bf16"
    if encoder_tensor_ranks(model, parallel) > 1:
        return "tensor ranks share its layers, and what they exchange is not traced: set parallel.encoder_tensor=1"
    if parallel.overlap_param_gather or parallel.zero >= 2:
        return "its parameters are gathered by hooks inside the graph: set parallel.overlap_param_gather=false and parallel.zero to 0 or 1"
    if parallel.encoder_recompute == "selective" and "mlp" in parallel.recompute_modules:
        return "its MLPs are one graph, of which no part is recomputed: set parallel.recompute_encoder to none or full"
    if parallel.offload_activations:
        return "what its graphs keep is not offloaded: set parallel.offload_activations=0"
    return None


def machine_stops(device: str) -> str | None:
    """Why nothing is compiled for `device` (cpu or cuda) on this machine; None when it is."""
    if device == "cuda":
        return None if find_spec("triton") is not None else "torch.compile needs Triton for a GPU, and it is not installed"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler for a CPU, and {compiler} is not there (CXX names one)"
