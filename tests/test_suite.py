"""A rule for all tests: no clock decides whether a test passes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = sorted(Path(__file__).parent.rglob("*.py"))
CLOCKS = {"perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time", "thread_time", "time_ns"}


def reads_clock(tree, tainted):
    """Whether an expression calls a clock of `time`, or uses a variable with the value of a clock."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (node.attr in CLOCKS or ast.unparse(node) == "time.time"):
            return True
        if isinstance(node, ast.Name) and (
            node.id in CLOCKS or (isinstance(node.ctx, ast.Load) and node.id in tainted)
        ):
            return True
    return False


def tainted_names(function):
    """Variables of a function whose value comes from a clock, directly or through other variables."""
    tainted: set[str] = set()
    while True:
        before = len(tainted)
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
                if reads_clock(node.value, tainted):
                    tainted.update(names)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
                owner = node.func.value
                if isinstance(owner, ast.Name) and any(reads_clock(each, tainted) for each in node.args):
                    tainted.add(owner.id)
        if len(tainted) == before:
            return tainted


def asserts_on_a_clock(source):
    """The lines of all asserts that compare times."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            tainted = tainted_names(function)
            asserts = [node for node in ast.walk(function) if isinstance(node, ast.Assert)]
            found += [node.lineno for node in asserts if reads_clock(node.test, tainted)]
    return sorted(set(found))


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["assert time.perf_counter() < 3"], [2]),
        (["began = time.time()", "work()", "assert time.time() - began < 1"], [4]),
        (["began = process_time()", "took = 5 - began", "assert took < 1"], [4]),
        (["times.append(perf_counter())", "assert min(times) < 0.6"], [3]),
        (["began = time.monotonic()", "assert work()"], []),
        (["time.sleep(1)", "assert fitted.seconds == 3"], []),
    ],
)
def test_asserts_on_a_clock_are_found(lines, found):
    assert asserts_on_a_clock("\n    ".join(["def test():", *lines])) == found


def test_no_test_asserts_on_a_clock():
    wrong = {str(file): lines for file in TESTS if (lines := asserts_on_a_clock(file.read_text()))}
    assert not wrong
