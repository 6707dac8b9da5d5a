"""The socket against peers that are slow, many, broken or hostile (reliability S1, S2, S4, S8, S9)."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, suppress

import anyio
import pytest

from ckptd.clock import SystemClock
from ckptd.config import Intake
from ckptd.intake.listener import Listener, Peer
from ckptd_client import wire
from tests.support.in_process import Wire, eventually, open_fds


class Host:
    """A listener whose handler answers every frame with its size; `gone` is counted."""

    def __init__(self, path, **settings) -> None:
        self.path = path
        self.gone: list[Peer] = []
        self.listener = Listener(Intake(**settings), SystemClock(), self.handle, self.leave)

    async def handle(self, peer: Peer, frame: bytes) -> None:
        peer.send({"v": 1, "id": len(frame), "ok": True})

    async def leave(self, peer: Peer) -> None:
        self.gone.append(peer)

    def connect(self) -> Wire:
        return Wire.to(self.path)


@asynccontextmanager
async def serving(directory, host_type=Host, **settings):
    host = host_type(directory / "s", **settings)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(host.path))
    async with anyio.create_task_group() as group:
        await group.start(host.listener.run, sock)
        yield host
        group.cancel_scope.cancel()
    sock.close()


async def test_a_peer_is_who_the_kernel_says_it_is(short_dir):
    """S9: nothing the peer says changes its identity."""
    async with serving(short_dir) as host:
        line = host.connect()
        await line.raw(b'{"uid":0,"pid":1}\n')
        await line.reply(17)
        [peer] = host.listener.peers
        assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.getuid(), os.getgid())
        line.close()


async def test_a_frame_that_is_too_long_is_refused_before_it_is_buffered(short_dir):
    """S1: the answer has a stable code, then the connection ends."""
    async with serving(short_dir) as host:
        line = host.connect()
        with anyio.fail_after(30):
            with suppress(BrokenPipeError, ConnectionResetError):
                await line.raw(b"x" * (2 * wire.FRAME_BYTES_MAX))
            assert (await line.reply(None))["error"]["code"] == "frame_too_large"
        await eventually(lambda: host.gone)
        line.close()


async def test_a_frame_that_is_never_finished_ends_its_connection_however_it_trickles(short_dir):
    """S8: one byte now and then must not hold a place for ever; the limit counts from the frame's first byte."""
    async with serving(short_dir, idle_frame_s=0.4) as host:
        line = host.connect()
        with anyio.fail_after(60):
            while not host.gone:
                with anyio.move_on_after(0.1):
                    try:
                        await line.raw(b"a")
                    except BrokenPipeError:
                        break
                await anyio.sleep(0.1)
        assert (await line.reply(None))["error"]["code"] == "timeout"
        line.close()


async def test_an_idle_connection_with_no_frame_begun_is_left_alone(short_dir):
    async with serving(short_dir, idle_frame_s=0.1) as host:
        line = host.connect()
        await line.raw(b"{}\n")
        await line.reply(2)
        await anyio.sleep(0.3)
        await line.raw(b"{}\n")
        await line.reply(2)
        line.close()


async def test_frames_in_one_packet_are_answered_in_order(short_dir):
    async with serving(short_dir) as host:
        line = host.connect()
        await line.raw(b"1\n22\n333\n")
        for number in (1, 2, 3):
            await line.reply(number)
        line.close()


async def test_a_peer_that_closes_its_sending_half_still_gets_what_it_asked_for(short_dir):
    async with serving(short_dir) as host:
        line = host.connect()
        await line.raw(b"{}\n")
        line.sock.shutdown(socket.SHUT_WR)
        await line.reply(2)
        await eventually(lambda: host.gone)
        line.close()


async def test_descriptors_sent_by_a_peer_are_never_kept(short_dir):
    """S4: whatever rides along, announced or not, the number of open descriptors does not change."""
    async with serving(short_dir) as host:
        line = host.connect()
        await line.raw(b"{}\n")
        await line.reply(2)
        before = open_fds()
        extra = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
        refused = 0
        for _ in range(20):
            try:
                socket.send_fds(line.sock, [b"{}\n"], extra)
            except PermissionError:  # the kernel refuses them at the sender
                refused += 1
                await line.raw(b"{}\n")
            await line.reply(2)
        for fd in extra:
            os.close(fd)
        await eventually(lambda: open_fds() <= before)  # an earlier test's threads may have some in hand
        assert refused in {0, 20}
        line.close()


async def test_caps_per_user_refuse_with_a_code_and_others_are_served(short_dir):
    """S8: too many connections of one user cost that user, and come free again."""
    async with serving(short_dir, connections_per_uid_max=4) as host:
        lines = [host.connect() for _ in range(4)]
        for line in lines:
            await line.raw(b"{}\n")
            await line.reply(2)
        extra = host.connect()
        assert (await extra.reply(None))["error"]["code"] == "busy"
        extra.close()
        lines.pop().close()
        await eventually(lambda: len(host.listener.peers) == 3)
        again = host.connect()
        await again.raw(b"{}\n")
        await again.reply(2)
        for line in (*lines, again):
            line.close()
        await eventually(lambda: not host.listener.peers)
        assert not host.listener._per_uid


async def test_a_storm_of_connections_leaves_no_descriptor_and_no_task(short_dir):
    async with serving(short_dir) as host:
        before = open_fds()
        for _ in range(300):
            line = host.connect()
            line.close()
            await anyio.lowlevel.checkpoint()
        await eventually(lambda: len(host.gone) == 300)
        await eventually(lambda: open_fds() <= before)  # an earlier test's threads may have some in hand
        assert host.listener.peers == set()


async def test_running_out_of_descriptors_pauses_accepting_and_never_ends_it(short_dir):
    """The ready-made listeners die here for good."""
    async with serving(short_dir) as host:
        first = host.connect()
        await first.raw(b"{}\n")
        await first.reply(2)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = [host.connect() for _ in range(3)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_fds() - 1, hard))
        try:
            await anyio.sleep(0.2)
            await first.raw(b"22\n")
            await first.reply(2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for line in waiting:
            await line.raw(b"{}\n")
            await line.reply(2)
        for line in (first, *waiting):
            line.close()


async def test_a_peer_that_reads_nothing_is_cut_off_and_slows_nobody(short_dir):
    """S8: back-pressure is bounded by bytes, and a push never waits."""
    async with serving(short_dir, send_bytes_max=1 << 20) as host:
        deaf = host.connect()
        await deaf.raw(b"{}\n")
        await deaf.reply(2)
        [peer] = host.listener.peers
        other = host.connect()
        for _ in range(100):  # it is no coroutine: one that waited for the reader would wait for ever
            peer.push({"push": "event", "event": {"text": "x" * 50_000}})
        assert peer.closed
        await other.raw(b"{}\n")
        await other.reply(2)
        for line in (deaf, other):
            line.close()


async def test_a_push_that_fits_into_no_frame_is_left_out_and_ends_nothing(short_dir):
    """A damage map of a terabyte must not take the task down that serves every follower."""
    async with serving(short_dir) as host:
        line = host.connect()
        await line.raw(b"{}\n")
        await line.reply(2)
        [peer] = host.listener.peers
        peer.push({"push": "level", "error": "x" * (2 * wire.FRAME_BYTES_MAX)})
        peer.push({"push": "level", "checkpoint": "after"})
        assert (await line.push("level"))["checkpoint"] == "after"
        line.close()


async def test_a_descriptor_that_never_left_is_closed_and_told(short_dir):
    """An arena lent to a connection that ends first must not stay lent."""
    async with serving(short_dir) as host:
        line = host.connect()
        await line.raw(b"{}\n")
        await line.reply(2)
        [peer] = host.listener.peers
        before = open_fds()
        lost: list[str] = []
        while not peer._out:  # until the socket's buffer is full
            peer.send({"fill": "x" * 60_000})
        with open("/dev/null") as null:
            peer.send({"v": 1}, null.fileno(), lambda: lost.append("arena"))
            line.close()
            await eventually(lambda: lost)
            peer.send({"v": 1}, null.fileno(), lambda: lost.append("late"))
        assert lost == ["arena", "late"]
        await eventually(lambda: open_fds() < before)


async def test_a_dead_trainer_is_noticed_although_its_child_keeps_the_socket_open(short_dir):
    """M119: the kernel names the process that connected; a forked data loader is not it."""
    async with serving(short_dir) as host:
        code = (
            "import os, socket, time\n"
            f"s = socket.socket(socket.AF_UNIX); s.connect({str(host.path)!r}); s.sendall(b'{{}}\\n'); s.recv(99)\n"
            "if os.fork() == 0: time.sleep(60)\n"
        )
        trainer = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        try:
            await eventually(lambda: host.gone, patience_s=30)
        finally:
            os.killpg(trainer.pid, signal.SIGKILL)
            trainer.wait()


@pytest.mark.parametrize("number", sorted({errno.ECONNABORTED, errno.EMFILE}))
async def test_errors_of_accept_that_pass_are_survived(short_dir, monkeypatch, number):
    failures = [number, number]

    class Flaky(socket.socket):
        def accept(self):
            if failures:
                raise OSError(failures.pop(), "as told")
            return super().accept()

    host = Host(short_dir / "s")
    with Flaky(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(host.path))
        async with anyio.create_task_group() as group:
            await group.start(host.listener.run, sock)
            line = host.connect()
            await line.raw(b"{}\n")
            await line.reply(2)
            line.close()
            group.cancel_scope.cancel()
