"""The rules of CONTRIBUTING.md that a machine can check: imports go down, and certain things are known in one place only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = [REPOSITORY / "megavlm", REPOSITORY / "kernels", REPOSITORY / "launchers"]
MAX_LINES = 400
# The typed recipe is one table, read from top to bottom and searched by eye: in two files it would be harder to find a field.
LONG_ON_PURPOSE: set[str] = set()
# megavlm.testing starts the process groups of tests as `parallel` does for runs.
KNOWS_PARALLEL_STATE = ("megavlm/parallel/", "megavlm/testing/")
# A family lists the weights that its files hold and no forward pass reads: they have no name of ours.
KNOWS_HUGGING_FACE_NAMES = ("megavlm/checkpoint/", "megavlm/models/families/")
LOW_FLOORS = ["megavlm.config", "megavlm.topology", "megavlm.planner", "megavlm.tracking", "megavlm_launchers"]


def sources() -> list[Path]:
    return sorted(p for package in PACKAGES for p in package.rglob("*.py") if "build" not in p.parts)


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports, `from a import b` as a.b, with the line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def code_strings(path: Path) -> Iterator[tuple[str, int]]:
    """Text constants of a file that are no docstrings."""
    docs = {id(n.value) for n in ast.walk(tree(path)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value, node.lineno


def calls(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names that a file calls."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def test_the_walk_sees_the_code():
    """A rule over no files would hold."""
    names = {relative(p) for p in sources()}
    assert len(names) > 60
    assert {"megavlm/cli/main.py", "launchers/megavlm_launchers/local.py", "kernels/megavlm_kernels/__init__.py"} <= names


def test_imports_go_down():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kept, 0 broken" in done.stdout


def test_only_parallel_knows_megatrons_process_groups():
    found = [
        f"{relative(p)}:{line}"
        for p in sources()
        if not relative(p).startswith(KNOWS_PARALLEL_STATE)
        for name, line in imports(p)
        if name.startswith("megatron.core.parallel_state")
    ]
    assert not found, f"go through megavlm.parallel instead: {found}"


def test_only_parallel_chooses_the_device():
    others = [p for p in sources() if "/parallel/" not in relative(p)]
    found = [f"{relative(p)}:{line}" for p in others for call, line in calls(p) if call == "torch.cuda.set_device"]
    assert not found, found


def test_only_checkpoint_knows_hugging_face_parameter_names():
    marks = ("self_attn.", "vision_tower.", "language_model.model.", "q_proj", "multi_modal_projector.")
    found = [
        f"{relative(p)}:{line} {text!r}"
        for p in sources()
        if not relative(p).startswith(KNOWS_HUGGING_FACE_NAMES)
        for text, line in code_strings(p)
        if any(mark in text for mark in marks)
    ]
    assert not found, found


def test_only_the_command_line_prints_and_exits():
    talking = {"print", "sys.exit", "exit", "quit"}
    found = [f"{relative(p)}:{n} {c}" for p in sources() if "/cli/" not in relative(p) for c, n in calls(p) if c in talking]
    assert not found, f"return, raise, log or take an `echo`: {found}"


def test_files_stay_readable():
    files = [*sources(), *sorted((REPOSITORY / "tests").rglob("*.py"))]
    lengths = {relative(p): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    long = {name: n for name, n in lengths.items() if n > MAX_LINES and name not in LONG_ON_PURPOSE}
    assert not long, f"a file is one subject and at most {MAX_LINES} lines: {long}"
    assert all(lengths[name] > MAX_LINES for name in LONG_ON_PURPOSE), "an exception that is no longer needed"


def test_entry_scripts_stay_thin():
    lengths = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in (REPOSITORY / "tools").glob("*.py")}
    assert lengths and max(lengths.values()) <= 30, lengths


def test_test_files_have_unique_names():
    """Two of a name hide one another in a traceback, and in pytest's report."""
    names = [p.name for p in (REPOSITORY / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})


@pytest.mark.parametrize("package", LOW_FLOORS)
def test_low_floors_import_no_torch(package):
    """By running it: what a contract on imports cannot see is a library that brings torch along."""
    code = (
        "import importlib, pkgutil, sys\n"
        f"package = importlib.import_module({package!r})\n"
        "for found in pkgutil.iter_modules(getattr(package, '__path__', []), package.__name__ + '.'):\n"
        "    importlib.import_module(found.name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    path = [str(REPOSITORY), str(REPOSITORY / "kernels"), str(REPOSITORY / "launchers")]
    program = f"import sys; sys.path[:0] = {path!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr or f"{package} imported torch"
