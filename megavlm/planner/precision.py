"""What multiplies linear layers in FP8, and which of them: a function of the recipe and of what a machine has. Imports no torch.

A machine that is not at hand (a login node plans for a cluster) is left open: only what no machine could do is refused then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megavlm.config.model import ModelConfig
from megavlm.config.precision import PrecisionConfig
from megavlm.config.schema import LanguageConfig, ParallelConfig, Recipe, VisionConfig
from megavlm.config.tensor_split import encoder_tensor_ranks
from megavlm.planner.parameters import ParameterBlock
from megavlm.topology.table import text_table
from megavlm_kernels.packed_attention.selection import Machine

Backend = Literal["transformer_engine", "scaled_mm"]
BACKENDS: tuple[Backend, ...] = ("transformer_engine", "scaled_mm")
RECIPES = ("delayed", "current", "rowwise", "blockwise")
ALIGNMENT = 16
"""Every dimension of an FP8 product is a multiple of this."""
FP8_CAPABILITY, BLOCKWISE_CAPABILITY = (8, 9), (9, 0)
BF16_CAPABILITY = (8, 0)
OLDEST_TRANSFORMER_ENGINE = {"delayed": (1, 0), "current": (2, 2), "blockwise": (2, 3)}
"""Versions from which megatron-core 0.16.1 takes these (its fp8_utils.get_fp8_recipe)."""


class PrecisionError(ValueError):
    """This machine or this model cannot compute in the precision that the recipe asks for."""


@dataclass(frozen=True)
class LinearShape:
    """A linear layer as one tensor rank holds it."""

    name: str
    outputs: int
    inputs: int


def machine_stops(backend: str, recipe: str, machine: Machine) -> str | None:
    """Why `machine` cannot run an FP8 recipe (delayed, ...) through `backend`; None when it can."""
    if backend == "scaled_mm":
        if recipe in ("delayed", "blockwise"):
            return f"{recipe} scales are only in Transformer Engine"
        return _gpu_stops(machine, FP8_CAPABILITY) if machine.device == "cuda" else None
    if recipe == "rowwise":
        return "rowwise scales are only in scaled_mm"
    if machine.device != "cuda":
        return "Transformer Engine needs a CUDA device"
    reason = _gpu_stops(machine, BLOCKWISE_CAPABILITY if recipe == "blockwise" else FP8_CAPABILITY)
    if reason is not None:
        return reason
    if machine.transformer_engine is None:
        return "Transformer Engine is not installed, or does not load"
    oldest = OLDEST_TRANSFORMER_ENGINE[recipe]
    if machine.transformer_engine < oldest:
        has = ".".join(map(str, machine.transformer_engine))
        return f"it needs Transformer Engine {oldest[0]}.{oldest[1]}, this is {has}"
    return None


def _gpu_stops(machine: Machine, capability: tuple[int, int]) -> str | None:
    if machine.capability is not None and machine.capability >= capability:
        return None
    has = "none that torch can use" if machine.capability is None else "{}.{}".format(*machine.capability)
    return f"it needs compute capability {capability[0]}.{capability[1]}, this GPU has {has}"


def model_stops(backend: str, model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig) -> str | None:
    """Why `backend` cannot serve this model on any machine; None when it can."""
    if backend == "scaled_mm":
        return None
    if "projector" not in precision.keep_bf16 and not model.text_only:
        return "the projector is not of its layers: name projector in precision.keep_bf16"
    if "language" not in precision.keep_bf16:
        if model.language.moe is not None:
            return "the experts are not of its layers"
        if model.language.cross_attention is not None:
            return "the cross-attention layers are not of its layers"
    if precision.fp8 == "delayed" and "vision" not in precision.keep_bf16 and not model.text_only:
        return (
            "ranks exchange the largest values of delayed scales, and microbatches without a picture have none of the encoder's to "
            "exchange: name vision in precision.keep_bf16"
        )
    if precision.fp8 == "delayed" and parallel.recompute == "full":
        return "recomputing whole layers would count their largest values twice: set parallel.recompute to none or selective"
    return None


def choose_fp8(model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, machine: Machine) -> Backend | None:
    """The backend that this machine takes for the model; None without FP8.

    Raises:
        PrecisionError: none can, or not the one that precision.fp8_backend names; with the reason of each.
    """
    if precision.fp8 == "none":
        return None
    _check_that_something_is_left(model, precision)
    check_shapes(model, precision, parallel)
    wanted = BACKENDS if precision.fp8_backend == "auto" else (precision.fp8_backend,)
    reasons = {}
    for backend in wanted:
        reason = model_stops(backend, model, precision, parallel) or machine_stops(backend, precision.fp8, machine)
        if reason is None:
            return backend
        reasons[backend] = reason
    told = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
    raise PrecisionError(f"precision.fp8={precision.fp8} cannot be computed here: {told}. Set precision.fp8=none, or run elsewhere")


def check_fp8(recipe: Recipe) -> None:
    """What no machine could do, before any is asked. Raises PrecisionError."""
    if recipe.precision.fp8 == "none":
        return
    best = Machine("cuda", (9, 0), transformer_engine=(99,)) if recipe.run.device != "cpu" else Machine("cpu")
    choose_fp8(recipe.model, recipe.precision, recipe.parallel, best)


def _check_that_something_is_left(model: ModelConfig, precision: PrecisionConfig) -> None:
    in_bf16 = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
    encoders = [] if model.text_only else [e.num_layers for e in model.encoders]
    layers = {"vision": max(encoders, default=0), "projector": 0 if model.text_only else in_bf16 + 1, "language": model.language.num_layers}
    if not any(number > in_bf16 for module, number in layers.items() if module not in precision.keep_bf16):
        raise PrecisionError(
            f"precision.fp8={precision.fp8}: keep_bf16=[{', '.join(precision.keep_bf16)}] and {in_bf16} layers in bf16 at the ends "
            "leave nothing of this model to multiply in FP8: set fp8=none, or keep less"
        )


def check_shapes(model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig) -> None:
    """Raises PrecisionError naming a layer whose part on a tensor rank no FP8 product takes."""
    for shape in fp8_shapes(model, precision, parallel):
        for side, width in (("outputs", shape.outputs), ("inputs", shape.inputs)):
            if width % ALIGNMENT:
                raise PrecisionError(
                    f"precision.fp8={precision.fp8}: {shape.name} has {width} {side} on a tensor rank "
                    f"(parallel.tensor={parallel.tensor}), and FP8 needs multiples of {ALIGNMENT}: keep it in precision.keep_bf16, "
                    "or change the width or the tensor ranks"
                )


def fp8_shapes(model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig) -> Iterator[LinearShape]:
    """Linear layers of the encoders' and the LLM's transformer layers that run in FP8, one of each kind."""
    if precision.fp8 == "none":
        return
    if not model.text_only and "vision" not in precision.keep_bf16:
        tensor = encoder_tensor_ranks(model, parallel)
        for number, encoder in enumerate(model.encoders):
            yield from _encoder_shapes("vision" if number == 0 else f"vision_beside[{number - 1}]", encoder, precision, tensor)
    if "language" not in precision.keep_bf16:
        language, tensor = model.language, parallel.tensor
        ffns = {language.ffn_hidden_size}
        if language.moe is not None:
            ffns = {language.moe.ffn_hidden_size * (tensor if parallel.expert > 1 else 1)}
            if language.moe.dense_layers:
                ffns.add(language.ffn_hidden_size)
        for ffn in sorted(ffns):
            yield from _language_shapes(language, precision, tensor, ffn)


def _encoder_shapes(name: str, encoder: VisionConfig, precision: PrecisionConfig, tensor: int) -> Iterator[LinearShape]:
    width = encoder.hidden_size
    return _layer_shapes(name, precision, tensor, width, 3 * width, width, encoder.ffn_hidden_size, encoder.gated_mlp)


def _language_shapes(language: LanguageConfig, precision: PrecisionConfig, tensor: int, ffn: int | None) -> Iterator[LinearShape]:
    queries = language.num_attention_heads * language.head_width
    qkv = queries + 2 * max(language.kv_heads, tensor) * language.head_width
    return _layer_shapes("language", precision, tensor, language.hidden_size, qkv, queries, ffn, language.gated_mlp)


def _layer_shapes(
    name: str, precision: PrecisionConfig, tensor: int, width: int, qkv: int, attended: int, ffn: int | None, gated: bool
) -> Iterator[LinearShape]:
    """`ffn` None: the MLP is elsewhere."""
    if "attention" not in precision.keep_bf16:
        yield LinearShape(f"{name} linear_qkv", qkv // tensor, width)
        yield LinearShape(f"{name} linear_proj", width, attended // tensor)
    if "mlp" not in precision.keep_bf16 and ffn is not None:
        yield LinearShape(f"{name} linear_fc1", (2 if gated else 1) * ffn // tensor, width)
        yield LinearShape(f"{name} linear_fc2", width, ffn // tensor)


def fp8_layers(total: int, precision: PrecisionConfig) -> range:
    """Numbers, from 1, of those of `total` layers that run in FP8."""
    return range(1 + precision.num_layers_at_start_in_bf16, 1 + max(total - precision.num_layers_at_end_in_bf16, 0))


def fp8_parts(module: str, layer: int | None, encoder: int, model: ModelConfig, precision: PrecisionConfig) -> tuple[bool, bool]:
    """Whether the linear layers around attention, and those of the MLP, run in FP8 in a transformer layer (counted from 0)."""
    if precision.fp8 == "none" or layer is None or module in precision.keep_bf16:
        return False, False
    total = model.language.num_layers if module == "language" else model.encoders[encoder].num_used_layers
    if layer + 1 not in fp8_layers(total, precision):
        return False, False
    return "attention" not in precision.keep_bf16, "mlp" not in precision.keep_bf16


def fp8_weights(block: ParameterBlock, model: ModelConfig, precision: PrecisionConfig, tensor: int, encoder_tensor: int) -> int:
    """Weights of a block, on one rank, that are multiplied in FP8."""
    attention, mlp = fp8_parts(block.module, block.layer, block.encoder, model, precision)
    if block.part == "experts":
        return block.local if mlp else 0
    if block.part != "layer" or not (attention or mlp):
        return 0
    if block.module == "language":
        sparse = model.language.moe is not None and block.layer not in model.language.moe.dense_layers
        shapes = _language_shapes(model.language, precision, tensor, None if sparse else model.language.ffn_hidden_size)
    else:
        shapes = _encoder_shapes("vision", model.encoders[block.encoder], precision, encoder_tensor)
    return sum(shape.outputs * shape.inputs for shape in shapes)


def precision_table(recipe: Recipe) -> str:
    """For --dry-run: the format of each part's products, and through what."""
    precision, model = recipe.precision, recipe.model
    parts = [] if model.text_only else [("vision", max(e.num_used_layers for e in model.encoders)), ("projector", 0)]
    rows: list[tuple[str, str]] = []
    for part, layers in (*parts, ("language", model.language.num_layers)):
        if precision.fp8 == "none" or part in precision.keep_bf16:
            compiled = ", MLPs compiled" if part == "vision" and precision.compile_encoder else ""
            rows.append((part, precision.dtype + compiled))
            continue
        numbers = fp8_layers(layers, precision)
        kept = [name for name in ("attention", "mlp") if name in precision.keep_bf16]
        which = "" if not layers else f", layers {numbers.start} to {numbers.stop - 1} of {layers}" if len(numbers) else ", no layer"
        rows.append((part, f"fp8 ({precision.fp8}, {precision.fp8_format}){which}" + (f" but {kept[0]}" if kept else "")))
    rows.append(("embeddings, norms, attention, LM head", precision.dtype))
    through = ""
    if precision.fp8 != "none":
        backends = [b for b in BACKENDS if model_stops(b, model, precision, recipe.parallel) is None and _knows(b, precision)]
        through = f"; FP8 through {' or '.join(backends)}"
    return text_table(("products of", "in"), rows, f"precision: {precision.dtype}{through}")


def _knows(backend: str, precision: PrecisionConfig) -> bool:
    best = Machine("cuda", (9, 0), transformer_engine=(99,))
    return precision.fp8_backend in ("auto", backend) and machine_stops(backend, precision.fp8, best) is None


def formats_here(machine: Machine) -> dict[str, str]:
    """For `megavlm doctor`: number format -> how this machine computes it, or why it cannot ("not here: ...")."""
    found = {"fp32": "torch" + (", without TF32" if machine.device == "cuda" else "")}
    bf16 = machine.device != "cuda" or (machine.capability is not None and machine.capability >= BF16_CAPABILITY)
    found["bf16"] = "torch" if bf16 else "not here: " + str(_gpu_stops(machine, BF16_CAPABILITY)) + "; use fp16"
    found["fp16"] = "torch, with a dynamic loss scale"
    for recipe in RECIPES:
        reasons = {backend: machine_stops(backend, recipe, machine) for backend in BACKENDS}
        able = [backend for backend, reason in reasons.items() if reason is None]
        slow = "" if machine.device == "cuda" else ", right but slow on a CPU"
        why = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
        found[f"fp8 {recipe}"] = ", ".join(able) + slow if able else f"not here: {why}"
    return found
