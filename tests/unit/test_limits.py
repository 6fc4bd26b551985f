"""How long and how wide the package's code may be. The numbers are data; a function that needs more is cut."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "accel_moe"
FUNCTION_LINES, FUNCTION_PARAMETERS = 60, 8  # outside kernels; self counts
FILE_LINES = 500
MEDIAN_FUNCTION_LINES = 10  # less than this
KERNEL_PARAMETERS = 20  # constants included

FILES = sorted(PACKAGE.rglob("*.py"))
KERNEL_FILES = {path for path in FILES if "kernels" in path.parts or path.name == "rows_triton.py"}


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    count = len(named) + (given.vararg is not None) + (given.kwarg is not None)
    # a patch has the parameters of the function that it replaces, and that function before them
    return count - any(ast.unparse(decorator).startswith("patch(") for decorator in function.decorator_list)


def is_triton_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.core
def test_functions_and_files_stay_within_their_limits():
    wide = []
    for path in FILES:
        name = path.relative_to(PACKAGE)
        if (count := len(path.read_text().splitlines())) > FILE_LINES:
            wide.append(f"{name} has {count} lines, at most {FILE_LINES}")
        for function in functions(path):
            found = lines(function), parameters(function)
            if path in KERNEL_FILES:
                limits = (found[0], KERNEL_PARAMETERS if is_triton_kernel(function) else found[1])
            else:
                limits = (FUNCTION_LINES, FUNCTION_PARAMETERS)
            for what, count, limit in zip(("lines", "parameters"), found, limits):
                if count > limit:
                    wide.append(f"{name}: {function.name} has {count} {what}, at most {limit}")
    assert not wide, "\n".join(wide)


def test_half_of_all_functions_are_short():
    assert statistics.median(lines(f) for path in FILES for f in functions(path)) < MEDIAN_FUNCTION_LINES


def test_a_wide_function_is_seen(tmp_path):
    file = tmp_path / "wide.py"
    file.write_text("def f(a, b, /, c, *d, e, **g):\n    return 1\n")
    (function,) = functions(file)
    assert (lines(function), parameters(function), is_triton_kernel(function)) == (2, 6, False)
