"""The manager in whose hands the other tests put the daemon, held against what systemd's pages say. F23"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.service_manager import ServiceManager, Unit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

HEAD = """
import os, signal, socket, subprocess, sys, time
from ckptd.notify import Notifier, passed_fds
passed = passed_fds()
notifier = Notifier()
def memfd(text):
    fd = os.memfd_create(text)
    os.write(fd, text.encode())
    return fd
def serve():
    notifier.status(" ".join(f"{name}={os.pread(fd, 99, 0).decode()}" for name, fd in passed[1:]))
    notifier.ready()
    time.sleep(60)
"""
Made = Callable[..., ServiceManager]


@pytest.fixture
def made(short_dir: Path) -> Iterator[Made]:
    """Makes the manager of a service that is a few lines of Python."""
    managers: list[ServiceManager] = []

    def make(code: str, **given: Any) -> ServiceManager:
        unit = Unit([sys.executable, "-c", HEAD + code], dict(os.environ), **given)
        managers.append(ServiceManager(short_dir, short_dir / "door", short_dir / "log", unit))
        return managers[-1]

    yield make
    print((short_dir / "log").read_text())
    for manager in managers:
        manager.close()


def names(manager: ServiceManager) -> list[str]:
    return [name for name, _ in manager.store]


def test_stored_descriptors_come_back_newest_first_after_a_crash_and_go_with_a_stop(made: Made) -> None:
    code = "if len(passed) == 1:\n    for n in 'ab': notifier.store(n, memfd('in-' + n))\n    notifier.ready()\n"
    manager = made(code + "    os.kill(os.getpid(), 9)\nserve()")
    manager.start(ready=False)
    manager.until(lambda: manager.status == "b=in-b a=in-a", "the second process")
    assert manager.journal.results == ["signal 9"]
    manager.stop()
    assert names(manager) == []


def test_a_store_that_is_preserved_outlives_a_stop(made: Made) -> None:
    manager = made("len(passed) > 1 or notifier.store('a', memfd('x'))\nserve()", preserve=True)
    manager.start()
    manager.stop()
    manager.start()
    assert manager.status == "a=x"


def test_names_repeat_files_do_not_and_what_is_no_name_becomes_stored(made: Made) -> None:
    manager = made(
        "same = memfd('s')\n"
        "for name in ('twin', 'other'): notifier.store(name, same)\n"
        "notifier.store('twin', memfd('t'))\n"
        "notifier._send('FDSTORE=1\\nFDNAME=with:colon', fd=memfd('u'))\n"
        "notifier._send('FDSTORE=1\\nFDNAME=' + 'n' * 256, fd=memfd('v'))\n"
        "serve()"
    )
    manager.start()
    assert names(manager) == ["stored", "stored", "twin", "twin"]


def test_a_store_that_is_full_or_off_refuses_without_a_word(made: Made) -> None:
    manager = made("for n in 'abc': notifier.store(n, memfd(n))\nnotifier.remove('a')\nserve()", store_max=2)
    manager.start()
    assert (names(manager), manager.journal.refused) == (["b"], ["c"])


def test_only_the_main_process_is_heard(made: Made) -> None:
    manager = made(
        "code = 'import socket,sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); '\n"
        "code += 's.sendto(b\"READY=1\", sys.argv[1])'\n"
        "subprocess.run([sys.executable, '-c', code, notifier._address], check=True)\n"
        "time.sleep(0.2)\nserve()"
    )
    manager.start()
    assert manager.journal.strangers == 1


STOP = """
def stop(*_):
    notifier.stopping()
    {}
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
serve()
"""


def test_a_stop_that_is_late_is_killed_and_not_started_again(made: Made) -> None:
    manager = made(STOP.format("time.sleep(60)"), stop_s=0.4)
    manager.start()
    manager.stop()
    assert (manager.state, manager.journal.killed, manager.journal.results) == ("failed", 1, ["timeout"])


def test_a_stop_that_asks_for_time_has_it(made: Made) -> None:
    manager = made(STOP.format("notifier.extend(60); time.sleep(10.0)"), stop_s=8.0)
    manager.start()
    manager.stop()
    assert (manager.state, manager.journal.killed, manager.journal.results) == ("inactive", 0, ["exit-code 0"])


def test_a_watchdog_that_is_not_fed_aborts_and_starts_again(made: Made) -> None:
    manager = made("serve()", watchdog_s=0.3)
    manager.start()
    manager.until(lambda: manager.journal.aborted >= 1 and manager.journal.results, "the abort")
    assert manager.journal.results[0] == "watchdog"
    manager.wait("active")


def test_a_start_that_is_never_ready_is_ended(made: Made) -> None:
    manager = made("time.sleep(60)", start_s=0.5)
    manager.start(ready=False)
    manager.until(lambda: manager.journal.results, "the end of the start")
    assert manager.journal.results[0] == "timeout"


def test_a_wrong_configuration_is_not_tried_again(made: Made) -> None:
    manager = made("sys.exit(78)")
    manager.start(ready=False)
    manager.wait("failed")
    assert manager.journal.results == ["exit-code 78"]
