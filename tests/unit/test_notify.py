"""The daemon's side of the service manager's protocol, against a socket of our own."""

import array
import os
import socket
import subprocess
import sys

import anyio
import pytest

from ckptd import errors, notify
from ckptd.notify import Notifier, passed_fds
from tests.support.in_process import open_fds


@pytest.fixture
def manager(short_dir):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(short_dir / "n"))
        sock.settimeout(30)
        yield sock


def told(manager: socket.socket) -> tuple[str, list[int]]:
    data, ancillary, _, _ = manager.recvmsg(4096, socket.CMSG_SPACE(4 * 8))
    fds = array.array("i")
    for _, _, content in ancillary:
        fds.frombytes(content)
    return data.decode(), fds.tolist()


def test_every_word_arrives_as_the_protocol_spells_it(manager):
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    notifier.ready()
    notifier.status("12 jobs\nREADY=0")
    notifier.watchdog()
    notifier.extend(1.5)
    notifier.remove("arena-aa")
    notifier.stopping()
    assert [told(manager)[0] for _ in range(6)] == [
        "READY=1",
        "STATUS=12 jobs READY=0",
        "WATCHDOG=1",
        "EXTEND_TIMEOUT_USEC=1500000",
        "FDSTOREREMOVE=1\nFDNAME=arena-aa",
        "STOPPING=1",
    ]
    notifier.close()


def test_what_the_manager_keeps_is_counted_with_what_an_earlier_daemon_left(manager):
    """It drops what is beyond its limit without a word: who wants to know must count."""
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname(), "FDSTORE": "4"})
    notifier.adopted(["a", "b", "b"])
    assert (notifier.stored, notifier.has_room(), notifier.has_room(2)) == (3, True, False)
    notifier.store("c", manager.fileno())
    assert not notifier.has_room()
    notifier.remove("b")  # removes both of them
    notifier.remove("unknown")
    assert (notifier.stored, notifier.has_room(2)) == (2, True)
    notifier.close()
    unsaid = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    assert unsaid.has_room(10_000)
    assert not unsaid.kept
    unsaid.adopted([])
    assert not unsaid.kept
    unsaid.adopted(["a"])
    assert unsaid.kept, "what came back was kept, whatever the manager says"
    unsaid.close()


def test_an_abstract_address_works_too():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")
        notifier = Notifier({"NOTIFY_SOCKET": "@" + sock.getsockname()[1:].decode()})
        notifier.ready()
        assert sock.recv(100) == b"READY=1"
        notifier.close()


def test_a_stored_descriptor_is_a_copy_of_the_same_file(manager):
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    fd = os.memfd_create("x")
    os.write(fd, b"precious")
    notifier.store("arena-aa", fd)
    os.close(fd)
    text, (copy,) = told(manager)
    assert text == "FDSTORE=1\nFDNAME=arena-aa"
    assert os.pread(copy, 100, 0) == b"precious"
    os.close(copy)
    notifier.close()


async def test_without_a_manager_everything_is_a_no_op():
    notifier = Notifier({})
    assert not notifier.enabled
    notifier.ready()
    notifier.store("arena-aa", 0)
    notifier.remove("arena-aa")
    assert await notifier.barrier()
    notifier.close()


def test_the_address_is_taken_out_of_the_environment(manager):
    """Else a worker or a hook could speak in the daemon's name."""
    environ = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier(environ)
    assert environ == {}
    assert notifier.watchdog_s == 2.0
    notifier.close()


@pytest.mark.parametrize("wrong", [{"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}])
def test_a_watchdog_meant_for_another_process_or_without_sense_is_ignored(manager, wrong):
    environ = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "2000000", **wrong}
    notifier = Notifier(environ)
    assert notifier.watchdog_s is None
    notifier.close()


def test_a_manager_that_does_not_read_blocks_nobody_and_loses_no_descriptor(manager):
    """What it does not take waits in order; only signs of life are left out."""
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    count = 0
    memory = os.memfd_create("told-to-the-manager")
    while not notifier._waiting:
        notifier.store(f"a{count}", memory)
        count += 1
    for _ in range(5):
        notifier.watchdog()
        notifier.store(f"a{count}", memory)
        count += 1
    os.close(memory)
    names = []
    while len(names) < count:
        text, (copy,) = told(manager)
        os.close(copy)
        names.append(text.rpartition("=")[2])
        notifier._flush()
    assert names == [f"a{n}" for n in range(count)]
    assert open_fds("memfd:told-to-the-manager") == 0
    notifier.close()


def test_there_is_a_bound_to_what_waits(manager, monkeypatch):
    monkeypatch.setattr(notify, "MESSAGES_WAITING_MAX", 3)
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    with pytest.raises(errors.Busy):
        all(notifier.remove("arena-aa") is None for _ in range(100_000))
    assert len(notifier._waiting) == 3
    notifier.close()


def test_a_manager_that_is_gone_is_noted_and_nothing_is_raised(manager, short_dir):
    notifier = Notifier({"NOTIFY_SOCKET": str(short_dir / "nobody")})
    notifier.ready()
    assert isinstance(notifier.trouble, FileNotFoundError)
    notifier.close()


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "ä", "x" * 256])
def test_a_name_the_manager_would_refuse_is_our_bug(manager, name):
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    with pytest.raises(errors.Bug):
        notifier.store(name, 0)
    notifier.close()


async def test_the_barrier_ends_when_the_manager_has_read_everything_before_it(manager):
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    notifier.ready()
    manager.setblocking(False)
    passed = []

    async def wait() -> None:
        passed.append(await notifier.barrier())

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.wait_readable(manager)
        assert told(manager) == ("READY=1", [])
        await anyio.wait_readable(manager)
        text, fds = told(manager)
        assert (text, passed) == ("BARRIER=1", [])
        os.close(fds[0])
    assert passed == [True]
    assert not await notifier.barrier(0.05)
    notifier.close()


PROGRAM = """
import os, sys
from ckptd.notify import passed_fds
environ = dict(os.environ)
environ["LISTEN_PID"] = os.environ.get("PRETEND_PID") or str(os.getpid())
print(passed_fds(environ), passed_fds(environ), any(k.startswith("LISTEN") for k in environ),
      [os.get_inheritable(fd) for _, fd in passed_fds({**os.environ, "LISTEN_PID": str(os.getpid())})])
"""


def run_with_fds(*names: str, **environ: str) -> str:
    """Run PROGRAM with /dev/null as fd 3, 4, ... as a service manager would pass them."""
    shell = " ".join(f"{3 + n}</dev/null" for n in range(len(names)))
    env = {**os.environ, "LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names), **environ}
    command = ["/bin/sh", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, PROGRAM]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()


def test_passed_descriptors_are_named_and_closed_to_children_and_taken_once():
    said = run_with_fds("ckptd.socket", "arena-aa")
    assert said == "[('ckptd.socket', 3), ('arena-aa', 4)] [] False [False, False]"


def test_descriptors_meant_for_another_process_are_not_taken():
    """S26: LISTEN_PID is checked; the variables go away all the same."""
    assert run_with_fds("ckptd.socket", PRETEND_PID="1").startswith("[] [] False")


def test_a_count_beyond_what_is_open_takes_what_is_there():
    assert run_with_fds("a", LISTEN_FDS="5").startswith("[('a', 3)] []")


def test_a_descriptor_without_a_name_is_unknown():
    assert run_with_fds("a", "b", LISTEN_FDNAMES="a").startswith("[('a', 3), ('unknown', 4)]")


def test_nonsense_is_nothing():
    assert passed_fds({"LISTEN_FDS": "many", "LISTEN_PID": str(os.getpid())}) == []
    assert passed_fds({}) == []
