"""Tests that share a node run in one process."""

import pytest


@pytest.mark.xdist_group("kept_together")
def test_the_runner_knows_of_groups(request: pytest.FixtureRequest) -> None:
    """A runner that does not gives each process a node of its own, without a word: pytest 9.2 with xdist 3.8."""
    spread = request.config.getoption("loadgroup", default=False)  # only a process that was told of groups has it
    assert request.node.nodeid.endswith("@kept_together") == spread
