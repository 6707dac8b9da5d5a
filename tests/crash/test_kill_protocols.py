"""A process is killed before every single operation of every protocol; who comes after finds whole things, and ends it.

The kernel lives on, so this says nothing about fsync; it says that every order of operations may stop anywhere.
"""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from ckptd.intake import spooled
from ckptd.worker import sweep
from ckptd.worker.context import Context
from ckptd.worker.protocol import Sweep
from tests.support import deaths, protocols, tally
from tests.support.interrupt import Interrupter
from tests.support.protocols import PROTOCOLS, Protocol

LONG_ROUNDS = int(os.environ.get("CKPTD_FAULT_KILL_ROUNDS", "8"))


def operations(protocol: Protocol, home: Path) -> list[str]:
    """What a protocol does when nobody kills it."""
    stage = protocols.opened(home / "learn" / protocol.name)
    stage.root.parent.mkdir(parents=True, exist_ok=True)
    try:
        protocol.prepare(stage)
        with Interrupter() as watched:
            protocol.act(stage)
        assert list(protocol.wrong(stage, done=True)) == []
    finally:
        os.close(stage.fd)
    return watched.operations


def killed(protocol: Protocol, home: Path, at: int, before: str) -> list[str]:
    """Kill a process before one operation; return what is wrong then, after a second try, and after a sweep."""
    stage = protocols.opened(home / "run")
    try:
        protocol.prepare(stage)
        child = deaths.Child(deaths.act, protocol, stage, at)
        status = child.ended()
        tally.add("kills")
        found = [] if status == -signal.SIGKILL else [f"it ended by itself: {status}"]
        found += protocol.wrong(stage, done=False)
        protocol.act(stage)
        found += [f"asked again: {each}" for each in protocol.wrong(stage, done=True)]
        if stage.root.exists():
            sweep.run(Sweep(root=str(stage.root), older_s=0.0), Context())
        spooled._listing(str(stage.spool))
        left = (*stage.root.rglob("*.ckptd-tmp-*"), *stage.spool.glob("*.tmp-*"))
        found += [f"not swept: {path}" for path in left]
    finally:
        os.close(stage.fd)
    for path in (stage.root, stage.spool):
        shutil.rmtree(path, ignore_errors=True)
    tally.add("violations", len(found))
    return [f"{protocol.name} killed before {before} ({at}): {each}" for each in found]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_a_process_killed_before_any_operation_leaves_whole_things_that_another_can_end(
    tmp_path: Path, protocol: Protocol
) -> None:
    """F1, F24, I2, I3, I11: exhaustive over the operations."""
    wrong = []
    for at, before in enumerate(operations(protocol, tmp_path)):
        wrong += killed(protocol, tmp_path, at, before)
    assert not wrong, "\n".join(wrong)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_the_same_over_and_over_in_any_order(tmp_path: Path) -> None:
    """F1, long."""
    seed = int(os.environ.get("CKPTD_FAULT_SEED", "1"))
    deals = [(p, at, before) for p in PROTOCOLS for at, before in enumerate(operations(p, tmp_path))] * LONG_ROUNDS
    print(f"seed {seed}, {len(deals)} kills")
    random.Random(seed).shuffle(deals)
    wrong = []
    for protocol, at, before in deals:
        wrong += killed(protocol, tmp_path, at, before)
    assert not wrong, "\n".join(wrong)
