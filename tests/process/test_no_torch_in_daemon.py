"""The node's own processes: no torch, no NumPy, little memory, and nearly no work while nobody saves."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.node import Node
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MIB = 1 << 20
MEMORY_MAX_BYTES = 120 * MIB
IDLE_S, LOOKS_MAX = 12.0, 4  # what was late on a busy machine may still be done in the first
IDLE_SHARE_MAX = 0.005  # of a core that adds a million numbers in ADDED_S; a slower one takes longer for the same
ADDED_S = 0.06
FOREIGN = ("torch", "numpy", "safetensors")
DAEMON_MODULES = "import ckptd.daemon, ckptd.supervisor, sys"
WORKER_MODULES = """
import importlib, sys
from ckptd.worker.__main__ import VERBS
for verb in VERBS.values():
    importlib.import_module(f"ckptd.worker.{verb.module}")
"""


def memory_bytes(pid: int) -> tuple[int, int]:
    """Return a process's resident memory and its proportional share of it (pages of others counted in part)."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    return found["Rss"], found["Pss"]


def cpu_s(pid: int) -> float:
    """CPU time of a process, all threads, user and kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def slowness() -> float:
    """How much longer than ADDED_S a million additions take here and now; at least 1."""
    begun_s, total = time.process_time(), 0
    for number in range(1_000_000):
        total += number
    return max(1.0, (time.process_time() - begun_s) / ADDED_S)


@pytest.mark.parametrize("code", [DAEMON_MODULES, WORKER_MODULES], ids=["daemon", "worker"])
def test_no_module_of_the_node_imports_a_tensor_library(code: str) -> None:
    """Every module that could be imported is; sys.modules of a fresh interpreter says what came along."""
    check = f"{code}\nprint([name for name in sys.modules if name.partition('.')[0] in {FOREIGN!r}])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_node_is_small_knows_no_torch_and_rests(node: Node, nursery: Nursery) -> None:
    """After real work (a save, a verify, a load, a legacy file): what is mapped, how much is resident, what an idle node costs."""
    legacy = node.dir / "legacy"
    legacy.mkdir()
    node.reconcile_s = 60.0  # as shipped: it is what an idle node does
    node.more = f'[[roots]]\npath = "{legacy}"\nkind = "watched"\n'
    node.start()
    trainer = nursery.trainer(node.environ)
    trainer.open(name="small", project="foot", dir=str(node.runs))
    saved = trainer.save(seed=1, step=1)
    node.wait_level(saved["id"])
    trainer.load(selector="latest", seed=1)
    trainer.close()
    trainer.quit()
    node.wait_idle()
    pids = {"daemon": node.daemon_pid, **{f"worker of {w['mount']}": pid for pid, w in node.workers().items()}}
    assert len(pids) == 2
    total = 0
    for name, pid in pids.items():
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert not [
            word for word in ("libtorch", "_multiarray", "site-packages/torch", "site-packages/numpy") if word in mapped
        ]
        resident, share = memory_bytes(pid)
        total += share
        print(f"{name}: {resident / MIB:.0f} MiB resident, {share / MIB:.0f} MiB its share")
    assert total < MEMORY_MAX_BYTES, f"{total / MIB:.0f} MiB"
    assert node.supervisor is not None
    pids["supervisor"] = node.supervisor.pid
    for _ in range(LOOKS_MAX):
        before = {name: cpu_s(pid) for name, pid in pids.items()}
        slow = slowness()
        time.sleep(IDLE_S)  # the measured span itself
        shares = {name: (cpu_s(pid) - before[name]) / IDLE_S for name, pid in pids.items()}
        slow = (slow + slowness()) / 2
        print({name: f"{share:.2%} of a core" for name, share in shares.items()}, f"which is {slow:.1f} times slower")
        if sum(shares.values()) <= IDLE_SHARE_MAX * slow:
            return
    pytest.fail(f"it never rested: {shares}, {slow:.1f} times slower")
