"""docs/reliability.md names a test for every fault, and the tests that it names exist."""

import ast
import re

import pytest

from tests.support import tree

pytestmark = pytest.mark.xdist_group("sources")  # one process reads and parses them

PAGE = "docs/reliability.md"
FAULTS = [f"F{number}" for number in range(1, 31)]
NOT_BUILT = {"F21"}  # object stores: its row says so
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`( \[long\])?")


def rows() -> dict[str, str]:
    """The rows of the table of faults, by number."""
    found = re.findall(r"^\| (F\d+) \| (.*)$", tree.text(PAGE), re.MULTILINE)
    assert len(found) == len(dict(found)), "a fault has two rows"
    return dict(found)


def definitions(path: str) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    return {name: node for name, node in tree.functions(path) if name.startswith("test_")}


def test_every_fault_has_one_row() -> None:
    assert list(rows()) == FAULTS


@pytest.mark.parametrize("fault", FAULTS)
def test_the_tests_that_a_row_names_exist_and_run_when_it_says(fault: str) -> None:
    """[long] stands exactly where a test is left to `make test-faults` as a whole."""
    named = NAMED.findall(rows()[fault])
    assert bool(named) != (fault in NOT_BUILT), rows()[fault]
    for path, name, long in named:
        assert (tree.ROOT / path).exists(), path
        if not name:
            continue
        assert name in definitions(path), f"{path}::{name}"
        assert is_long(path, name) == bool(long), f"{path}::{name}"


def is_long(path: str, name: str) -> bool:
    """Whether a test carries the mark, itself or by its file."""
    marks = [ast.unparse(mark) for mark in definitions(path)[name].decorator_list]
    marks += [
        ast.unparse(node.value)
        for node in tree.parsed(path).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    return any(re.search(r"mark\.faults\b", mark) and "parametrize" not in mark for mark in marks)
