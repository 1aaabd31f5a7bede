"""Every kernel compiled to machine code for a GPU that is not there, and what that code takes.

`<op>/triton.py` has a function `variants()` that lists its kernels with the types and constants they are launched with; nothing else
registers a kernel. Compiling needs Triton's wheel (it brings ptxas and cuobjdump) and no driver.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import megavlm_kernels

SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may have on compute capability 9.0 (CUDA programming guide, table of technical specifications)."""


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that decides its machine code."""

    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Type of each argument that is no constant: "*bf16" (pointer), "i32", "fp32", ..."""
    constants: Mapping[str, Any]
    """Value of each `tl.constexpr` argument."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """num_warps, num_stages, ...: as the op launches it."""
    divisible_by_16: Sequence[str] | None = None
    """Arguments that a launch would find divisible by 16, which lets loads be wide. None: the pointers, as torch allocates them."""

    @property
    def name(self) -> str:
        types = "-".join(dict.fromkeys(kind.lstrip("*") for kind in self.signature.values() if kind.startswith("*")))
        values = [f"{name}={value}" for name, value in {**self.constants, **self.options}.items()]
        return "-".join([self.kernel.__name__, types, *values])


@dataclass(frozen=True)
class Resources:
    """What the machine code of one kernel takes."""

    registers: int
    """Of one thread."""
    stack_bytes: int
    """Local memory of one thread: spilled registers and arrays with computed indices."""
    local_bytes: int
    shared_bytes: int
    """Of one block, with what is allocated at launch."""


def kernel_modules() -> dict[str, ModuleType]:
    """Name of each op -> its module `triton`."""
    found = {}
    for op in pkgutil.iter_modules(megavlm_kernels.__path__):
        if op.ispkg and any((Path(path) / op.name / "triton.py").is_file() for path in megavlm_kernels.__path__):
            found[op.name] = importlib.import_module(f"megavlm_kernels.{op.name}.triton")
    return found


def kernels_of(module: ModuleType) -> list[Any]:
    """The kernels that `module` defines: by convention what is launched ends in `_kernel`, helpers do not."""
    return [
        value for name, value in vars(module).items() if name.endswith("_kernel") and getattr(value, "__module__", "") == module.__name__
    ]


def registered_variants() -> Iterator[tuple[str, Variant]]:
    """(op, variant) of all ops."""
    for op, module in kernel_modules().items():
        for variant in module.variants():
            yield op, variant


def compile_ahead(variant: Variant, capability: int = 90) -> Resources:
    """Compile for CUDA compute capability `capability` / 10.

    Raises whatever Triton or ptxas say of a kernel that does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    missing = set(names) ^ (set(variant.signature) | set(variant.constants))
    assert not missing, f"{variant.kernel.__name__}: signature and constants must name every argument once: {sorted(missing)}"
    wide = variant.divisible_by_16
    if wide is None:
        wide = [name for name, kind in variant.signature.items() if kind.startswith("*")]
    source = ASTSource(
        variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in wide},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(usage["REG"], usage["STACK"], usage["LOCAL"], max(int(compiled.metadata.shared), usage["SHARED"]))


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of the one function in `cubin`."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
