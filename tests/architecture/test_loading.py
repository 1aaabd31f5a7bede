"""Nothing that is loaded from a file may run code: the calls that could are known, one by one, with the reason why they cannot."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ["megavlm", "kernels", "launchers", "tools", "benchmarks", "docs"]

# Modules whose readers run what the file says. A pickle between processes of one's own, through a pipe that nobody else can write to, is no
# file; everything else is listed with what guards it.
PICKLES = {
    "megavlm/checkpoint/reader.py": "an unpickler with an allow-list; torch.load with weights_only=True",
    "megavlm/checkpoint/index.py": "writes torch's index, reads none",
    "megavlm/data/workers.py": "pipe between a rank and its own worker processes",
    "megavlm/data/worker_process.py": "the other end of that pipe",
    "megavlm/data/batch_memory.py": "description of a batch, through that pipe",
    "megavlm/data/token_table.py": "a chat template for processes of our own",
    "megavlm/training/indexes.py": "whether an exception survives the trip to the other ranks",
    "megavlm/testing/pool.py": "functions for the test session's own ranks, through a pipe",
    "megavlm/testing/payloads.py": "makes files that a careless reader would run, and is that reader",
    "kernels/megavlm_kernels/testing/interpreter.py": "arguments for a process of its own",
}
DANGEROUS_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.jit"}
FORBIDDEN_CALLS = {
    "eval": "builtins",
    "exec": "builtins",
    "os.system": "a shell",
    "os.popen": "a shell",
    "yaml.load": "use yaml.safe_load",
    "yaml.load_all": "use yaml.safe_load_all",
    "yaml.unsafe_load": "use yaml.safe_load",
    "yaml.full_load": "use yaml.safe_load",
    "torch.jit.load": "runs the file's code",
    "torch.hub.load": "runs the repository's code",
    "torch.package.PackageImporter": "runs the file's code",
    "pandas.read_pickle": "a pickle",
    "pd.read_pickle": "a pickle",
    "mlflow.pyfunc.load_model": "a pickle",
}


@cache
def _sources() -> list[tuple[str, ast.Module]]:
    paths = sorted(p for folder in FOLDERS for p in (REPOSITORY / folder).rglob("*.py") if "build" not in p.parts)
    return [(p.relative_to(REPOSITORY).as_posix(), ast.parse(p.read_text(encoding="utf-8"))) for p in [*paths, REPOSITORY / "setup.py"]]


def unguarded(name: str, tree: ast.Module) -> Iterator[str]:
    """Calls and imports of a file that may run code from what they read, with the line and what to do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module in DANGEROUS_MODULES and name not in PICKLES:
                    yield f"{name}:{node.lineno}: {module} runs what it reads: read JSON, or tensors by megavlm.checkpoint.reader"
        elif isinstance(node, ast.Call):
            problem = _of_call(name, node)
            if problem:
                yield f"{name}:{node.lineno}: {ast.unparse(node.func)}: {problem}"


def _of_call(name: str, call: ast.Call) -> str | None:
    function = ast.unparse(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if function in FORBIDDEN_CALLS and name != "megavlm/testing/payloads.py":
        return FORBIDDEN_CALLS[function]
    if function == "torch.load" and name != "megavlm/testing/payloads.py" and not _is(given.get("weights_only"), True):
        return "say weights_only=True: a setting of the environment may say otherwise"
    if function.split(".")[-1] in ("load", "open_memmap", "NpzFile") and not _is(given.get("allow_pickle", ast.Constant(False)), False):
        return None if name == "megavlm/testing/payloads.py" else "allow_pickle"
    if _is(given.get("shell"), True):
        return "shell=True: give a list of arguments"
    if "trust_remote_code" in given and not _is(given["trust_remote_code"], False):
        return "code from a model's folder is never run"
    if function.endswith(".from_pretrained"):
        return _of_from_pretrained(function, given)
    return None


def _of_from_pretrained(function: str, given: dict[str | None, ast.expr]) -> str | None:
    """A model's weights may be pickles, and an Auto class asks whether to run the folder's code unless it is told not to."""
    is_text = any(kind in function.lower() for kind in ("tokenizer", "processor", "config"))
    if (is_text or "Auto" in function) and not _is(given.get("trust_remote_code"), False):
        return "say trust_remote_code=False"
    return None if is_text or _is(given.get("use_safetensors"), True) else "say use_safetensors=True"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_unguarded_loading() -> None:
    found = [problem for name, tree in _sources() for problem in unguarded(name, tree)]
    assert not found, "\n".join(found)


def test_every_exception_is_needed() -> None:
    importing = {
        name
        for name, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and any(alias.name in DANGEROUS_MODULES for alias in node.names)
    }
    assert importing == set(PICKLES), importing ^ set(PICKLES)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "model_class.from_pretrained(folder)",
    ],
)
def test_the_rule_finds_it(line: str) -> None:
    assert list(unguarded("megavlm/new.py", ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(file, weights_only=True)",
        "np.load(file, allow_pickle=False)",
        "json.loads(text)",
        "model.eval()",
        "AutoProcessor.from_pretrained(folder, trust_remote_code=False)",
        "LlavaForConditionalGeneration.from_pretrained(folder, use_safetensors=True)",
    ],
)
def test_the_rule_lets_it_be(line: str) -> None:
    assert not list(unguarded("megavlm/new.py", ast.parse(line)))
