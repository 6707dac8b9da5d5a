"""A process that forks after a load: its children read what was loaded, whatever is saved later."""

import os
from pathlib import Path

import numpy as np
import pytest

import ckptd_client as ckptd
from ckptd_client import hot
from tests.support.node import Node, eventually

VALUES = 500_000
PATIENCE_S = 60.0
SAVES = 6


def test_a_child_reads_what_its_parent_loaded_when_that_memory_has_been_lent_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
):
    """Promise 8: the daemon knows of the parent as a reader, and of the child it knows nothing."""
    monkeypatch.setattr(hot, "OWN_AFTER_S", 0.5)
    node.start()
    for name, value in node.environ.items():
        monkeypatch.setenv(name, value)
    with ckptd.Experiment("run", project="forks", dir=Path(node.runs)) as run:
        run.save({"order": np.full(VALUES, 1.0)}, step=1).wait("verified", PATIENCE_S)
        order = run.load("latest")["order"]
        go_on, told = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.read(go_on[0], 1)
            os.write(told[1], b"%d\n" % int((order != 1.0).sum()))
            os._exit(0)
        try:
            eventually(lambda: not run._session.hot._held, "the parent to give the memory back", PATIENCE_S)
            for step in range(2, 2 + SAVES):
                run.save({"order": np.full(VALUES, float(step))}, step=step).wait("verified", PATIENCE_S)
            os.write(go_on[1], b"x")
            assert os.read(told[0], 100) == b"0\n", "values changed in the child"
            assert (order == 1.0).all()
        finally:
            os.write(go_on[1], b"x")
            os.waitpid(child, 0)
            for fd in (*go_on, *told):
                os.close(fd)
