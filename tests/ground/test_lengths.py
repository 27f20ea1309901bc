"""Modules and functions stay short enough to be read at once (CONTRIBUTING.md)."""

import ast

from tests.conftest import ROOT

MOST_LINES, MOST_OF_A_FUNCTION = 500, 60


def test_files_and_functions_are_short() -> None:
    long = []
    for path in sorted(path for folder in ("stas_core", "workflows") for path in (ROOT / folder).rglob("*.py")):
        text, name = path.read_text(), str(path.relative_to(ROOT))
        long += [name] if text.count("\n") > MOST_LINES else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                long += [f"{name}: {node.name} has {num_lines} lines"] if num_lines > MOST_OF_A_FUNCTION else []
    assert not long, "split these"
