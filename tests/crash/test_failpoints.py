"""The named steps are complete: each in the sources is declared, documented and killed at, and no other is."""

import ast

from ckptd import failpoint
from tests.crash import (
    test_catalog_crash,
    test_kill_at_the_edges,
    test_kill_everywhere,
    test_kill_fetches,
    test_kill_giveup,
    test_kill_repairs,
    test_kill_rescue,
    test_kill_strips,
)
from tests.support import tree


def in_sources() -> set[str]:
    """Every name that the sources hand to failpoint.hit(), themselves or through a fsync that hits it."""
    found = set()
    for path in tree.files():
        if not path.startswith("ckptd/") or not path.endswith(".py") or path == "ckptd/failpoint.py":
            continue
        for node in ast.walk(ast.parse(tree.text(path))):
            if isinstance(node, ast.Call) and _name(node.func) in {"hit", "fsync_file", "fsync_directory", "_hit"}:
                texts = [each.value for each in node.args if isinstance(each, ast.Constant) and each.value]
                found |= {text for text in texts if isinstance(text, str) and "." in text and " " not in text}
    return found


def _name(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def test_every_point_of_the_sources_is_declared_and_every_declared_one_is_in_them() -> None:
    """F1: a step that nobody wrote down is a step that nobody kills at."""
    assert in_sources() == failpoint.POINTS.keys()


def test_the_kill_suites_kill_at_every_point() -> None:
    """F1: exhaustive, each in a test that fails when the point is not reached."""
    suites = (
        test_kill_everywhere,
        test_kill_at_the_edges,
        test_catalog_crash,
        test_kill_fetches,
        test_kill_giveup,
        test_kill_repairs,
        test_kill_rescue,
        test_kill_strips,
    )
    killed = {point.partition(":")[0] for suite in suites for point in suite.POINTS}
    assert killed == failpoint.POINTS.keys()


def test_every_point_says_who_reaches_it_and_what_is_true_there() -> None:
    for point, (process, meaning) in failpoint.POINTS.items():
        assert process in {"daemon", "worker", "supervisor"}, point
        assert len(meaning) > 10, point
