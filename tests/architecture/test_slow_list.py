"""tests/slow.txt names tests that there are."""

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_line_is_a_test():
    lines = (TESTS / "slow.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert lines == sorted(set(lines))
    functions: dict[str, set[str]] = {}
    for line in lines:
        path, _, name = line.partition("::")
        if path not in functions:
            tree = ast.parse((TESTS.parent / path).read_text(encoding="utf-8"))
            functions[path] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name.partition("[")[0] in functions[path], line
