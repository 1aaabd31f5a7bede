"""FP8 in the linear layers of a built model: which of them, and through what.

Applied beside the model, after it is built: a layer in FP8 has the same parameters, checkpoint keys and communication as before. With
`scaled_mm` the matrix product inside megatron-core's tensor-parallel layers is replaced; with Transformer Engine its layers run inside
its FP8 context, on rows filled up to what its kernels take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer

from megavlm.config.schema import PrecisionConfig
from megavlm.planner.precision import fp8_layers
from megavlm_kernels.fp8_cast import Fp8Matrix
from megavlm_kernels.fp8_linear import Fp8Format, cast_weight, fp8_linear

ROW_UNITS = {"delayed": 16, "current": 16, "blockwise": 128}
"""Rows that Transformer Engine's products are filled up to. blockwise: its block, without which a gather over tensor ranks is in bf16."""
PARTS = {"attention": ("self_attention", "cross_attention"), "mlp": ("mlp",)}


class Fp8Product:
    """The matrix product of one of megatron-core's tensor-parallel layers, in FP8: takes the place of its `_forward_impl`."""

    def __init__(self, form: Fp8Format, *, caches: bool) -> None:
        self.form, self.caches = form, caches
        self.holds = False
        """The weight does not change until this is False again."""
        self.cast: Fp8Matrix | None = None

    def __call__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup | None,
        **_: Any,
    ) -> torch.Tensor:
        """With the arguments that megatron-core's layers give."""
        assert not gradient_accumulation_fusion, "FP8 gradients are not added into main gradients by a kernel"
        many = tp_group is not None and tp_group.size() > 1
        return fp8_linear(
            input,
            weight,
            bias,
            form=self.form,
            cast=self._cast(weight, torch.is_grad_enabled() and input.requires_grad),
            gather=tp_group if sequence_parallel and many else None,
            sum_gradient=tp_group if allreduce_dgrad and many else None,
        )

    def _cast(self, weight: torch.Tensor, transpose: bool) -> Fp8Matrix | None:
        if not (self.caches and self.holds):
            return None
        if self.cast is None or (transpose and self.cast.data_CP is None):
            self.cast = cast_weight(weight, self.form, transpose=transpose)
        return self.cast


def apply_fp8(model: torch.nn.Module, precision: PrecisionConfig, backend: str, *, caches: bool = True) -> list[str]:
    """Switch the linear layers that the recipe does not keep in bf16 to FP8; returns their names. Before any forward pass.

    `model` has children vision, projector and language, any of which may be missing here. `caches`: weights are cast once in
    `constant_weights` and kept, which costs 2 bytes for each of them; no, where parameters are not kept whole either.

    Raises:
        ValueError: a layer's weight cannot be multiplied in FP8.
    """
    chosen = list(_chosen(model, precision))
    if backend == "transformer_engine":
        return _transformer_engine(model, precision, chosen)
    form = Fp8Format(by_row=precision.fp8 == "rowwise", hybrid=precision.fp8_format == "hybrid")
    for name, linear, _ in chosen:
        outputs, inputs = linear.weight.shape
        if outputs % 16 or inputs % 16:
            raise ValueError(
                f"precision.fp8={precision.fp8}: {name} is {outputs} x {inputs} on this rank, and FP8 needs multiples of 16: keep its "
                "module in precision.keep_bf16"
            )
        linear._forward_impl = Fp8Product(form, caches=caches)
    return [name for name, _, _ in chosen]


@contextmanager
def constant_weights(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Weights do not change inside: each is cast to FP8 once for all microbatches. Nothing is kept beyond."""
    products = [p for model in models for m in model.modules() if isinstance(p := m.__dict__.get("_forward_impl"), Fp8Product)]
    for product in products:
        product.holds = True
    try:
        yield
    finally:
        for product in products:
            product.holds, product.cast = False, None


Chosen = tuple[str, Any, TransformerLayer | None]
"""(name in the model, linear layer, transformer layer around it)."""


def _chosen(model: torch.nn.Module, precision: PrecisionConfig) -> Iterator[Chosen]:
    for module, child in model.named_children():
        if module not in ("vision", "projector", "language") or module in precision.keep_bf16:
            continue
        inside: set[str] = set()
        for path, block in child.named_modules():
            if isinstance(block, TransformerBlock):
                layers = fp8_layers(_num_layers(child, path, block), precision)
                for number, layer in enumerate(block.layers):
                    prefix = f"{module}.{path}.layers.{number}"
                    found = [(f"{prefix}.{name}", linear, layer) for name, linear in layer.named_modules() if _is_linear(linear)]
                    inside |= {name for name, _, _ in found}
                    if layer.layer_number in layers:
                        yield from (item for item in found if not _is_kept(item[0].removeprefix(f"{prefix}."), precision))
        if module == "projector":
            for path, linear in child.named_modules():
                name = f"{module}.{path}"
                if _is_linear(linear) and name not in inside:
                    yield name, linear, None


def _num_layers(child: torch.nn.Module, path: str, block: TransformerBlock) -> int:
    """Layers, over all pipeline stages, that run: encoders do not run those above their feature layers."""
    owner: Any = child.get_submodule(path.rpartition(".")[0])
    used = getattr(getattr(owner, "vision", None), "num_used_layers", None)
    return block.config.num_layers if used is None or path.rpartition(".")[2] != "decoder" else int(used)


def _is_kept(name: str, precision: PrecisionConfig) -> bool:
    return any(part in precision.keep_bf16 and name.split(".")[0] in attributes for part, attributes in PARTS.items())


def _is_linear(module: torch.nn.Module) -> bool:
    """A tensor-parallel layer of megatron-core's own, or of Transformer Engine through it."""
    if isinstance(module, ColumnParallelLinear | RowParallelLinear):
        return module.weight is not None
    return any(kind.__module__.startswith("transformer_engine.") and "Linear" in kind.__name__ for kind in type(module).__mro__)


# ----------------------------------------------------------------------------------------------------- Transformer Engine


def _transformer_engine(model: torch.nn.Module, precision: PrecisionConfig, chosen: list[Chosen]) -> list[str]:
    """Contexts around layers (current, blockwise) or around all of a block's layers (delayed), and rows filled up."""
    from megatron.core.fp8_utils import get_fp8_context

    names = {name for name, _, _ in chosen}
    layers = {id(layer): layer for _, _, layer in chosen if layer is not None}
    for layer in layers.values():
        if precision.fp8 != "delayed":
            layer.forward = _inside(partial(get_fp8_context, layer.config), layer.forward)
    for block in (m for m in model.modules() if isinstance(m, TransformerBlock)):
        if precision.fp8 == "delayed" and any(id(layer) in layers for layer in block.layers):
            # A context for each layer would update the history of all of them at its end.
            block.quantised_pass = partial(get_fp8_context, block.config)
    for name, linear in model.named_modules():
        if not _is_linear(linear):
            continue
        if name in names:
            fill_rows(linear, ROW_UNITS[precision.fp8])
        else:
            linear.forward = _inside(_no_fp8, linear.forward)
    return sorted(names)


def _no_fp8() -> AbstractContextManager[Any]:
    from transformer_engine.pytorch import fp8_autocast

    context: AbstractContextManager[Any] = fp8_autocast(enabled=False)
    return context


def _inside(context: Callable[[], AbstractContextManager[Any]], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Also when the layer is run again in the backward pass: recomputation calls this, not only what is inside."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return forward(*args, **kwargs)

    return run


def fill_rows(linear: Any, unit: int) -> None:
    """Let a tensor-parallel layer of Transformer Engine take any number of rows: zeros are added to a multiple of `unit`, and cut off.

    Under sequence parallelism the layer itself gathers rows or scatters sums: each rank's part is filled up, before or behind that.
    """
    ranks = linear.tp_size if linear.sequence_parallel else 1
    parts_in, parts_out = (1, ranks) if linear.parallel_mode == "column" else (ranks, 1)
    forward = linear.forward

    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = x.shape[0] // parts_in
        padding = -rows % unit
        if not padding:
            return forward(x, *args, **kwargs)
        x = torch.nn.functional.pad(x.unflatten(0, (parts_in, rows)), [0, 0] * (x.dim() - 1) + [0, padding]).flatten(0, 1)
        out, bias = forward(x, *args, **kwargs)
        return out.unflatten(0, (parts_out, rows + padding))[:, :rows].flatten(0, 1), bias

    linear.forward = run
