"""Fail points: what a test arms happens, where and when it said, once; nothing else ever does."""

import errno
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ckptd import failpoint

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Read the variable as a fresh process does; afterwards nothing is armed."""

    def loaded(plan: str) -> ModuleType:
        monkeypatch.setenv(failpoint.VARIABLE, plan)
        return importlib.reload(failpoint)

    yield loaded
    monkeypatch.delenv(failpoint.VARIABLE)
    importlib.reload(failpoint)


def test_the_second_hit_fails_and_only_that(load: Load) -> None:
    points = load("a.b:2=eio,c=enospc")
    points.hit("a.b")
    with pytest.raises(OSError) as raised:
        points.hit("a.b")
    assert raised.value.errno == errno.EIO
    points.hit("a.b")
    points.hit("nobody.knows")
    assert points.armed() == ("a.b", "c")


def test_a_plan_in_a_file_arms_a_running_process_and_an_entry_acts_once(load: Load, tmp_path: Path) -> None:
    """Taken out before it acts: the process that follows a killed one goes on, and the tester sees that it was reached."""
    plan = tmp_path / "plan"
    points = load(f"@{plan}")
    points.hit("a.b")
    plan.write_text("a.b:2=eio,c=enospc\n")
    points.hit("a.b")
    assert plan.read_text() == "c:1=enospc,a.b:1=eio"
    with pytest.raises(OSError) as raised:
        points.hit("a.b")
    assert raised.value.errno == errno.EIO
    assert plan.read_text() == "c:1=enospc"
    points.hit("a.b")
    points.hit("")
    assert points.armed() == (f"@{plan}",)


def test_a_plan_in_a_file_counts_the_hits_of_all_processes(tmp_path: Path) -> None:
    """The daemon and its workers share one plan: the third hit anywhere is the one that kills."""
    plan = tmp_path / "plan"
    plan.write_text("a.b:3=kill")
    environ = {**os.environ, failpoint.VARIABLE: f"@{plan}"}
    code = "from ckptd import failpoint; failpoint.hit('a.b')"
    ends = [subprocess.run([sys.executable, "-c", code], env=environ, check=False).returncode for _ in range(4)]
    assert ends == [0, 0, -signal.SIGKILL, 0]


def test_a_worker_can_take_its_daemon_with_it(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    plan.write_text("a.b=kill-parent")
    environ = {**os.environ, failpoint.VARIABLE: f"@{plan}"}
    inner = "from ckptd import failpoint; failpoint.hit('a.b')"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    assert subprocess.run([sys.executable, "-c", outer], env=environ, check=False).returncode == -signal.SIGKILL
    assert plan.read_text() == ""
