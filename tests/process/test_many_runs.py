"""One process, one run after another, as a sweep has them: what was lent to a run is the daemon's again after its end."""

import contextlib
import os
from pathlib import Path

import pytest

import ckptd_client as ckptd
from ckptd_client import control
from ckptd_client.leases import Lease
from tests.bench_load.swarm import ARENA_BYTES, Talker
from tests.support.node import Node, eventually
from tests.support.saving import state

PATIENCE_S = 30.0


@pytest.fixture
def here(node: Node, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A running node that the client of this process finds."""
    node.start()
    for name, value in node.environ.items():
        monkeypatch.setenv(name, value)
    return node


def leased(node: Node) -> int:
    return int(node.status()["arenas"]["leased"])


def begin(node: Node, name: str) -> ckptd.Experiment:
    run = ckptd.Experiment(name, project="sweep", dir=Path(node.runs))
    eventually(lambda: run.prepare(state(1), wait_s=20.0), "memory", PATIENCE_S)
    return run


def test_memory_is_lent_on_after_the_end_of_a_run_until_the_thread_that_took_it_lets_go(here: Node):
    """Neither sooner, for somebody else would write over what that thread writes, nor only when the process ends."""
    run = begin(here, "first")
    taken, why = run._session.leases.take(1, PATIENCE_S)
    assert taken is not None, why
    kept: Lease = taken
    run.close()
    eventually(lambda: leased(here) == 1, "all memory but that one to be back", PATIENCE_S)
    with begin(here, "second") as other:
        assert other.save(state(2), step=1).wait("verified", timeout=PATIENCE_S)
        lent = {lease.name for lease in other._session.leases._ready}
        assert kept.name not in lent
    assert kept.is_writable()
    run._session.leases.give_back(kept)
    eventually(lambda: leased(here) == 0, "all memory to be back while the process lives", PATIENCE_S)


def test_an_answer_that_crosses_the_end_of_a_run_leaves_nothing_lent(here: Node):
    """Whoever asked is gone, its process lives on: nobody else would ever give that memory back."""
    talker = Talker(here.socket, here.runs, 1)
    try:
        talker.open()
        assert talker.ask("lease", experiment=talker.experiment, size_bytes=ARENA_BYTES, wait_s=PATIENCE_S)
        assert leased(here) == 1
        talker.ask("experiment.close", experiment=talker.experiment, status="completed", error=None)
    finally:
        talker.close()
    eventually(lambda: leased(here) == 0, "all memory to be back while the process lives", PATIENCE_S)


def test_what_a_run_mapped_is_in_use_again_after_its_end_while_the_process_lives(here: Node):
    """Every run of a sweep that resumes maps a copy; each that kept its place would take an arena out of use."""
    with begin(here, "first") as run:
        assert run.save(state(1), step=1).wait("verified", timeout=PATIENCE_S)
    kept = []
    for _ in range(3):
        with ckptd.Experiment("first", project="sweep", dir=Path(here.runs)) as run:
            eventually(lambda run=run: run._session.wait_open(1.0), "it to be open", PATIENCE_S)
            kept += [run.load(), run.load(keys=["epoch", "model"])]
            assert run._session.hot._held, "it is mapped, not read from the disk"
    assert all(kept)

    def read() -> bool:
        return "lease" in here.ask("show", selector="latest", project="sweep", name="first")["checkpoint"]["holds"]

    eventually(lambda: not read(), "every hold to be given back while the process lives", PATIENCE_S)
    assert all(readers == 0 for readers in readers_of(here)), "no arena is kept for a run that ended"


def readers_of(node: Node) -> list[int]:
    """How many readers each arena of a node has, by its control page."""
    pid, found = node.status()["daemon"]["pid"], []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed between the listing and the look
            if "memfd:ckptd-arena" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                with open(f"/proc/{pid}/fd/{fd}", "rb") as arena:
                    found.append(control.readers(arena.read(control.PAGE)))
    return found
