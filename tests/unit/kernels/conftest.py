"""One process for all tests in which Triton's kernels are interpreted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megavlm_kernels.testing.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """`interpreter.run(function, *args)` calls an importable function where kernels run on the CPU."""
    pytest.importorskip("triton")
    process = Interpreter()
    yield process
    process.close()
