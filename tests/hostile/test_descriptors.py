"""Descriptors that nobody asked for: none is kept, none is waited for, none becomes memory of ours (S4, S5)."""

import os
import random
import select
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import anyio
import pytest

from ckptd.clock import SystemClock
from ckptd.config import Arenas
from ckptd.intake import listener
from ckptd.intake.arenas import ArenaPool
from ckptd_client import control, wire
from tests.support.in_process import Keeper, Wire, daemon, eventually, open_fds
from tests.support.sleepy_disk import sleepy_disk

MESSAGE_MAX = 253  # descriptors of one message; the kernel takes no more
ONE_READER = {"readers": 1}  # else the catalog opens one more, for good, as soon as two questions meet
LAG_S = 20.0  # below the 30 s after which a watchdog would act; what hangs here hangs for ever
SEND = """
import array, os, socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
fd = os.open(sys.argv[2], os.O_RDONLY)
try:
    socket.send_fds(peer, [b'{"v":1,"id":1,"op":"hello","versions":[1]}\\n'], [fd])
    print("sent", flush=True)
except PermissionError:
    print("refused", flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.fixture(params=["refused by the kernel", "closed on arrival"])
def way(request, monkeypatch):
    """Linux 6.16 and later refuse descriptors at the sender; before that they are closed by the receiving kernel."""
    if request.param == "closed on arrival":
        monkeypatch.setattr(listener, "_refuse_descriptors", lambda _: None)
    return request.param


async def send(line: Wire, data: bytes, fds: list[int]) -> None:
    """Send bytes with descriptors; without them where the kernel refuses."""
    while True:
        try:
            sent = socket.send_fds(line.sock, [data], fds)
        except PermissionError:
            sent = 0
        except BlockingIOError:
            await anyio.wait_writable(line.sock)
            continue
        return await line.raw(data[sent:])


async def bombard(directory, tries: int) -> None:
    """Every shape in which descriptors can arrive; each time the frame beside them is answered as ever."""
    rng = random.Random(7)
    async with daemon(directory, front=False, catalog=ONE_READER) as node, node.connect() as line:
        with ExitStack() as stack:
            spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(MESSAGE_MAX)]
            for fd in spare:
                stack.callback(os.close, fd)
            before = open_fds()
            for number in range(10, 10 + tries):
                announced = rng.choice((0, 1, 3, -1, 1 << 40))
                frame = wire.encode({"v": 1, "id": number, "op": "watch", "checkpoints": [], "fds": announced})
                count = rng.choice((1, 1, 2, 16, 17, MESSAGE_MAX if number % 50 == 0 else 3))
                cut = rng.choice((0, 1, len(frame) // 2, len(frame)))
                if cut:
                    await send(line, frame[:cut], spare[:count])
                if cut < len(frame):
                    await send(line, frame[cut:], spare[: rng.choice((0, count))])
                assert (await line.reply(number))["ok"]
            await eventually(lambda: open_fds() <= before)  # an earlier test's threads may have some in hand
            assert line.fds == []


async def test_descriptors_that_nobody_announced_or_in_another_number_leave_nothing_behind(short_dir, way):
    """S4, short form."""
    await bombard(short_dir, 300)


@pytest.mark.faults
@pytest.mark.timeout(280)
async def test_ten_thousand_messages_with_descriptors_leave_nothing_behind(short_dir, way):
    """S4, long form."""
    await bombard(short_dir, 10_000)


async def test_a_connection_that_ends_with_descriptors_on_their_way_leaves_none(short_dir, way):
    """S4: they wait in the socket's queue when both ends close."""
    async with daemon(short_dir, front=False) as node:
        before = open_fds()
        for _ in range(50):
            line = Wire.to(node.directory / "s")
            with open("/dev/null") as null:
                await send(line, b"{", [null.fileno()] * 9)
            line.close()
        await eventually(lambda: not node.parts.listener.peers)
        await eventually(lambda: open_fds() <= before)


def strange(tmp_path, stack: ExitStack) -> dict[str, int]:
    """One descriptor of each kind; the stack closes them."""
    plain = tmp_path / "plain"
    plain.write_bytes(b"x" * 3 * control.PAGE)
    reading, writing = os.pipe()
    one, other = socket.socketpair()
    memory = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    unsealable = os.memfd_create("unsealable")
    for fd in (memory, unsealable):
        os.ftruncate(fd, 1 << 20)
    found = {
        "a pipe's reading end": reading,
        "a pipe's writing end": writing,
        "a socket": one.detach(),
        "its other end": other.detach(),
        "a directory": os.open(tmp_path, os.O_RDONLY),
        "a device": os.open("/dev/zero", os.O_RDWR),
        "a name only": os.open(plain, os.O_PATH),
        "a file on a disk": os.open(plain, os.O_RDWR),
        "a file for writing only": os.open(plain, os.O_WRONLY),
        "memory nobody sealed": memory,
        "memory nobody can seal": unsealable,
        "an event counter": os.eventfd(3),
        "a process": os.pidfd_open(os.getpid()),
        "a set of descriptors": select.epoll().fileno(),
    }
    found["a set of descriptors"] = os.dup(reading)
    if os.path.isdir("/dev/shm"):
        found["a file in memory"] = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
        os.ftruncate(found["a file in memory"], 1 << 20)
    for fd in found.values():
        stack.callback(os.close, fd)
    return found


async def test_no_kind_of_descriptor_is_taken_or_waited_for(short_dir, tmp_path, way):
    """S5: the frame beside it is answered at once, and nothing is open afterwards that was not before."""
    with ExitStack() as stack:
        kinds = strange(tmp_path, stack)
        async with daemon(short_dir, front=False, catalog=ONE_READER) as node, node.connect() as line:
            before = open_fds()
            for number, (kind, fd) in enumerate(kinds.items(), start=10):
                began_s = time.monotonic()
                await send(line, wire.encode({"v": 1, "id": number, "op": "watch", "checkpoints": [], "fds": 1}), [fd])
                assert (await line.reply(number))["ok"], kind
                assert time.monotonic() - began_s < LAG_S, kind
            await eventually(lambda: open_fds() <= before)  # an earlier test's threads may have some in hand


async def test_a_file_whose_close_hangs_holds_up_nobody(short_dir, tmp_path, way):
    """S5: its sender is gone before it is received, so that ours would be the last close."""
    with sleepy_disk(tmp_path) as disk:
        (disk.path / "f").write_bytes(b"x")
        async with daemon(short_dir, front=False) as node, node.connect() as line:
            disk.hang("flush", "release")
            with subprocess.Popen(
                [sys.executable, "-c", SEND, str(node.directory / "s"), str(disk.path / "f")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as sender:
                assert sender.stdout is not None
                said = await anyio.to_thread.run_sync(sender.stdout.readline)
                assert said.strip() == ("refused" if way == "refused by the kernel" else "sent")
                sender.kill()
                for _ in range(20):
                    began_s = time.monotonic()
                    assert await line.ask("watch", checkpoints=[])
                    assert time.monotonic() - began_s < LAG_S
                disk.wake()


def test_what_the_store_hands_back_is_an_arena_or_is_closed(tmp_path):
    """S5, S6: only memory that is sealed against shrinking is ever mapped, whatever name it has."""
    keeper = Keeper()
    pool = ArenaPool(Arenas(), keeper, SystemClock())
    with ExitStack() as stack:
        kinds = strange(tmp_path, stack)
        page = bytearray(control.PAGE)
        control.write_lease(page, b"\x01" * 16, 1, 0)
        for kind in ("memory nobody sealed", "memory nobody can seal", "a file on a disk"):
            os.pwrite(kinds[kind], page, 0)  # it even says that it is one
        before = open_fds()
        for kind, fd in kinds.items():
            assert pool.adopt("arena-" + "01" * 16, os.dup(fd)) is None, kind
        assert open_fds() <= before
    assert pool.bytes_used == 0
