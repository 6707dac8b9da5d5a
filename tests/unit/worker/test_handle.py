"""The daemon's handle on its workers, against a stand-in child that hangs and crashes on order."""

import contextlib
import errno
import json
import os
import signal
import sys
import time
from dataclasses import replace

import anyio
import anyio.to_thread
import pytest

from ckptd import config, errors
from ckptd.clock import SystemClock
from ckptd.events import EVENTS
from ckptd.worker import Workers, child
from ckptd.worker.handle import Pace, Rig, worker_command
from ckptd.worker.protocol import Usage, Watch
from tests.support.in_process import eventually, open_fds
from tests.support.stand_in_workers import MOUNTS, PATIENT_S, QUICK, Node, is_alive, running

SILENT_S = 0.4  # for who must see a worker being given up


async def test_each_mount_has_its_own_worker_started_on_first_use(tmp_path):
    async with running(tmp_path) as node:
        assert node.workers.state() == []
        home = await node.workers.call(Usage(root="/home/me/runs"))
        other = await node.workers.call(Usage(root="/srv/runs"))
        fast = await node.workers.call(Usage(root="/fast/runs"))
        assert home.filesystem == other.filesystem != fast.filesystem
        assert [state.mount for state in node.workers.state()] == ["/", "/fast"]
        assert node.state().roots == ("/home/me/runs", "/srv/runs")
        assert node.state().pid == int(home.filesystem)
        assert node.state().rss_bytes > 1 << 20
        assert node.names() == ["worker.started", "worker.started"]


async def test_no_worker_outlives_the_handle(tmp_path, monkeypatch):
    """Even one that ignores the end of its socket and SIGTERM."""
    monkeypatch.setattr(child, "EOF_GRACE_S", 0.1)
    monkeypatch.setattr(child, "TERM_GRACE_S", 0.1)
    async with running(tmp_path, flags=("--ignore-eof",)) as node:
        pid = int((await node.workers.call(Usage(root="/a"))).filesystem)
        assert is_alive(pid)
    assert not is_alive(pid)


async def test_a_worker_whose_first_caller_goes_away_as_it_starts_serves_the_next(tmp_path):
    """It had been started and nobody listened: whoever asked it next waited until it was taken for hung."""
    async with running(tmp_path) as node:
        with anyio.CancelScope() as caller:
            node.then = lambda _event: caller.cancel()
            await node.workers.call(Usage(root="/a"))
        assert caller.cancelled_caught
        with anyio.fail_after(40):
            answer = await node.workers.call(Usage(root="/a"))
        assert int(answer.filesystem) == node.state().pid
        assert node.names() == ["worker.started"]


async def test_a_worker_that_comes_up_when_everything_has_ended_ends_too(tmp_path, monkeypatch):
    """Nobody was left to bury it: its process and its socket stayed until the collector found them."""
    made, ended, real = [], anyio.Event(), child.spawn
    outcome = []

    async def held(command):
        made.append(await real(command))
        await ended.wait()
        return made[0]

    async def ask(node: Node) -> None:
        try:
            await node.workers.call(Usage(root="/a"))
        except errors.CkptdError as error:
            outcome.append(type(error))

    monkeypatch.setattr("ckptd.worker.station.spawn", held)
    async with anyio.create_task_group() as outside:
        async with running(tmp_path) as node:
            outside.start_soon(ask, node)
            await eventually(lambda: made)
        ended.set()
    assert outcome == [errors.WorkerLost]
    assert made[0]._process.returncode is not None
    assert made[0]._socket.fileno() == -1


async def test_an_error_of_the_verb_arrives_as_its_own_class(tmp_path):
    async with running(tmp_path) as node:
        with pytest.raises(errors.NoSpace, match="full") as caught:
            await node.workers.call(Usage(root="/refuse"))
        assert caught.value.details == {"file": "a"}
        assert caught.value.hint == "free some"


async def test_a_worker_that_dies_is_replaced_and_the_request_says_so(tmp_path):
    """F24: the caller learns that its request may or may not have been done; it decides."""
    async with running(tmp_path) as node:
        first = await node.workers.call(Usage(root="/a"))
        with pytest.raises(errors.WorkerLost):
            await node.workers.call(Usage(root="/crash"))
        assert (await node.until("worker.lost")).data["why"] == "killed by SIGKILL"
        second = await node.workers.call(Usage(root="/a"))
        assert first.filesystem != second.filesystem
        assert node.state().restarts == 1


async def test_a_worker_outlives_the_thread_that_asked_for_it(tmp_path, monkeypatch):
    """It ends with the thread that started it, which a pool would have retired after ten idle seconds."""
    monkeypatch.setattr("anyio._backends._asyncio.WorkerThread.MAX_IDLE_TIME", 0)
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS)
    rig = Rig(mountinfo=table)  # the real program: it is the one that asks to end with its parent
    workers = Workers(config.Workers(), SystemClock(), lambda _: None, rig=rig)
    async with anyio.create_task_group() as group:
        await group.start(workers.run)
        await workers.call(Usage(root="/"))
        (pid,) = (state.pid for state in workers.state())
        for _ in range(3):  # each retires the threads that idle, whichever they are
            async with anyio.create_task_group() as threads:
                for _ in range(3):
                    threads.start_soon(anyio.to_thread.run_sync, time.sleep, 0.05)
        await anyio.sleep(0.3)
        assert is_alive(pid)
        assert (await workers.call(Usage(root="/"))).filesystem
        assert [state.pid for state in workers.state()] == [pid]
        group.cancel_scope.cancel()


async def test_a_worker_that_cannot_start_is_not_started_in_a_tight_loop(tmp_path):
    slow = Pace(restart_s=0.3, restart_s_max=0.6)
    async with running(tmp_path, flags=("--die-at-start",), pace=slow) as node:
        began = anyio.current_time()
        for _ in range(4):
            with pytest.raises(errors.WorkerLost):
                await node.workers.call(Usage(root="/a"))
            await node.until("worker.lost", node.names().count("worker.started"))
        assert anyio.current_time() - began > 0.3 + 0.6 + 0.6
        assert node.state().pid is None


async def test_a_slow_worker_that_tells_of_progress_is_left_alone(tmp_path, monkeypatch):
    """It takes three times `request_s`, but is never silent for that long."""
    monkeypatch.setattr("ckptd.worker.station.LAST_WORD_S", 0.01)
    for slower in (1, 5, 25):
        async with running(tmp_path) as node:
            await node.workers.call(Usage(root="/a"))  # its start is not measured
            (await node.workers._station("/a")).silence_s = SILENT_S * slower
            with contextlib.suppress(errors.TimedOut):
                await node.workers.call(Usage(root=f"/slow-{0.2 * slower}"))
                assert node.names() == ["worker.started"]
                return
    pytest.fail("given up however long it might be silent")


@pytest.mark.parametrize("request_s", [0.8, 2.0, 120.0])
def test_a_worker_is_told_to_speak_well_within_the_time_it_may_be_silent(request_s):
    """With a short `workers.request_s` a digest of some seconds was taken for a hang, again and again."""
    command = worker_command(config.Workers(request_s=request_s))
    every_s = float(command[command.index("--alive-every-s") + 1])
    assert 0 < every_s <= min(request_s / 4, 10.0)


async def test_a_silent_worker_is_killed_and_only_its_own_mount_notices(tmp_path):
    """F17: one hung disk hangs one disk."""
    async with running(tmp_path) as node:
        pid = int((await node.workers.call(Usage(root="/a"))).filesystem)
        fast = await node.workers.call(Usage(root="/fast/a"))
        station = await node.workers._station("/hang")
        station.silence_s = SILENT_S
        with pytest.raises(errors.TimedOut, match="silent"):
            await node.workers.call(Usage(root="/hang"))
        station.silence_s = PATIENT_S
        assert (await node.workers.call(Usage(root="/fast/a"))).filesystem == fast.filesystem
        assert (await node.workers.call(Usage(root="/a"))).filesystem != str(pid)
        await eventually(lambda: not is_alive(pid))


async def test_what_a_killed_worker_was_doing_besides_ends_with_worker_lost(tmp_path):
    async with running(tmp_path) as node:
        outcomes = []

        async def ask(root: str) -> None:
            try:
                outcomes.append(await node.workers.call(Usage(root=root)))
            except errors.Weather as error:
                outcomes.append(type(error))

        async with anyio.create_task_group() as group:
            group.start_soon(ask, "/hang")
            await eventually(lambda: node.workers.state() and node.state().requests == 1)
            (await node.workers._station("/hang")).silence_s = SILENT_S  # who asks from now on is impatient
            group.start_soon(ask, "/hang")
        assert outcomes.count(errors.TimedOut) == 1
        assert outcomes.count(errors.WorkerLost) == 1


async def test_after_stuck_max_silences_requests_are_refused_at_once_until_a_probe_is_answered(tmp_path):
    async with running(tmp_path, pace=replace(QUICK, probe_answer_s=40.0)) as node:
        root = str(tmp_path / "hang-once")
        station = await node.workers._station(root)
        station.silence_s = SILENT_S
        for _ in range(2):
            with pytest.raises(errors.TimedOut):
                await node.workers.call(Usage(root=root))
        assert node.state().state == "degraded"
        degraded = await node.until("root.degraded")
        assert degraded.data["roots"] == [root]
        assert degraded.data.keys() == set(EVENTS["root.degraded"].keys)
        waited = []
        for _ in range(5):
            began = anyio.current_time()
            with pytest.raises(errors.RootDegraded):
                await node.workers.call(Usage(root=root))
            waited.append(anyio.current_time() - began)
        assert min(waited) < 0.3, "less than one more request would wait"
        await anyio.Path(root).write_text("")  # from now on the stand-in answers
        assert (await node.until("root.recovered")).data.keys() == set(EVENTS["root.recovered"].keys)
        assert node.state().state == "running"
        station.silence_s = PATIENT_S
        await node.workers.call(Usage(root="/a"))


async def test_no_more_than_stuck_max_workers_hang_in_the_kernel(tmp_path, monkeypatch):
    """A process in state D can't die. It can't be made here, so SIGKILL is switched off instead."""
    held: list[child.Child] = []
    monkeypatch.setattr(child, "KILL_GRACE_S", 0.01)
    monkeypatch.setattr(child, "EOF_GRACE_S", 0.01)
    monkeypatch.setattr(child, "TERM_GRACE_S", 0.01)
    async with running(tmp_path, flags=("--ignore-eof",), request_s=0.2) as node:
        real = child.spawn

        async def unkillable(command):
            made = await real(command)
            made._process.kill = made._process.terminate = lambda: (
                None
            )  # it ignores the latter only when it has come up
            held.append(made)
            return made

        monkeypatch.setattr("ckptd.worker.station.spawn", unkillable)
        for _ in range(2):
            with pytest.raises(errors.TimedOut):
                await node.workers.call(Usage(root="/hang"))
        with pytest.raises(errors.RootDegraded):
            await node.workers.call(Usage(root="/a"))
        await anyio.sleep(QUICK.probe_s_max * 4)  # time for probes that must not happen
        assert len(held) == 2
        assert (node.state().stuck, node.state().state) == (2, "degraded")
        assert "root.recovered" not in node.names()
        # Again and again: a probe's own worker may come up too late, too.
        await eventually(
            lambda: [made._process.send_signal(signal.SIGKILL) for made in held] and not node.state().stuck
        )
    for made in held:
        made._process.send_signal(signal.SIGKILL)  # does nothing for those that were reaped
        made._process.wait()


async def test_an_arena_travels_with_the_one_request_that_names_it(tmp_path):
    async with running(tmp_path) as node:
        arenas = []
        for text in ("one", "two"):
            fd = os.memfd_create(text)
            os.write(fd, text.encode())
            arenas.append(fd)
        for fd, text in zip(arenas, ("one", "two"), strict=True):
            assert (await node.workers.call(Usage(root="/arena"), arena_fd=fd)).filesystem == text
        await node.workers.call(Usage(root="/arena"), arena_fd=arenas[0])
        assert [open_fds(f"memfd:{text}") for text in ("one", "two")] == [1, 1]
        for fd in arenas:
            os.close(fd)


async def test_a_socket_that_refuses_to_send_ends_its_worker_and_nobody_waits_for_it(tmp_path, monkeypatch):
    """The frame may be half sent; who waited for its answer had to wait until the worker was taken for hung."""

    def refuses(*_):
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

    async with running(tmp_path) as node:
        before = int((await node.workers.call(Usage(root="/a"))).filesystem)
        with monkeypatch.context() as patched, open(os.devnull, "rb") as arena:
            patched.setattr(child.socket, "send_fds", refuses)
            with anyio.fail_after(40), pytest.raises(errors.WorkerLost):
                await node.workers.call(Usage(root="/arena"), arena_fd=arena.fileno())
        await eventually(lambda: not is_alive(before))
        assert int((await node.workers.call(Usage(root="/a"))).filesystem) != before


async def test_the_worker_inherits_nothing_that_was_meant_for_the_daemon(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", "@x")
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("WATCHFILES_FORCE_POLLING", "1")
    monkeypatch.setenv("CKPTD_FAIL", "a.b=kill")
    async with running(tmp_path) as node:
        used = await node.workers.call(Usage(root="/environment"))
        assert json.loads(used.filesystem) == [[], "a.b=kill", "/"]


async def test_parts_arrive_in_order_and_end_with_the_reply(tmp_path):
    async with running(tmp_path) as node, node.workers.parts(Watch(root="/parts")) as parts:
        assert [part.directories async for part in parts] == [["0"], ["1"], ["2"]]
        assert parts.reply.count == 3


async def test_other_verbs_work_between_two_parts(tmp_path):
    """A scan's reader settles each candidate through the same worker: no deadlock."""
    async with running(tmp_path) as node, node.workers.parts(Watch(root="/parts")) as parts:
        async for _ in parts:
            await node.workers.call(Usage(root="/a"))


async def test_leaving_the_parts_cancels_the_verb_in_the_worker(tmp_path):
    async with running(tmp_path) as node:
        async with node.workers.parts(Watch(root=str(tmp_path / "until-cancelled"))) as parts:
            async for _ in parts:
                break
        await eventually((tmp_path / "cancelled").exists)
        assert node.state().requests == 0


async def test_a_watch_may_be_silent_for_longer_than_any_request(tmp_path):
    async with running(tmp_path, request_s=0.1) as node:
        async with node.workers.parts(Watch(root=str(tmp_path / "until-cancelled"))) as parts:
            await anext(parts)
            with anyio.move_on_after(1.0) as scope:
                await anext(parts)
            assert scope.cancelled_caught
        assert node.names() == ["worker.started"]


async def test_a_reader_that_lags_too_far_behind_gets_busy_not_the_daemons_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "PARTS_BYTES_MAX", 4 << 20)
    async with running(tmp_path, request_s=30) as node, node.workers.parts(Watch(root="/flood")) as parts:
        await eventually(lambda: parts._pending.outcome is not None)
        with pytest.raises(errors.Busy):
            await anext(parts)


async def test_a_reply_of_the_wrong_shape_is_our_bug(tmp_path):
    async with running(tmp_path) as node:
        with pytest.raises(errors.Bug, match="shape"):
            await node.workers.call(Usage(root="/garbage"))


async def test_a_worker_that_stops_reading_pushes_back_without_blocking_the_loop(tmp_path):
    """Requests pile up in their callers, OUTBOX_MAX of them in the daemon, and the loop goes on."""
    async with running(tmp_path, request_s=30) as node:
        pid = int((await node.workers.call(Usage(root="/a"))).filesystem)
        os.kill(pid, signal.SIGSTOP)
        big = "/" + "x" * 100_000
        answers = []

        async def ask() -> None:
            answers.append(await node.workers.call(Usage(root=big)))

        async with anyio.create_task_group() as group:
            for _ in range(150):
                group.start_soon(ask)
            began = anyio.current_time()
            await anyio.sleep(0.3)
            assert anyio.current_time() - began < 25.0
            assert len(node.workers._stations) == 1
            assert len(next(iter(node.workers._stations.values()))._child._outbox) <= child.OUTBOX_MAX
            assert answers == []
            os.kill(pid, signal.SIGCONT)
        assert len(answers) == 150


def test_the_worker_is_told_its_limits_on_its_command_line():
    settings = config.Workers(threads=3, nice=5, idle_io=False, parser_bytes_max=1 << 20)
    command = worker_command(settings)
    assert "--idle-io" not in command
    assert command[command.index("--threads") + 1] == "3"
    assert command[command.index("--parser-bytes-max") + 1] == "1048576"


def test_the_child_does_not_load_the_daemons_event_loop():
    """Importing the package is what `python -m ckptd.worker` does first; anyio there costs 10 MiB a worker."""
    import subprocess

    program = "import sys, ckptd.worker; sys.exit('anyio' in sys.modules or 'asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
