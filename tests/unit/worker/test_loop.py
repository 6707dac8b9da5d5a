"""The worker as a process: its frames, its lanes, its end."""

import contextlib
import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event, current_thread

import msgspec
import pytest

from ckptd.errors import Busy, Missing
from ckptd.worker import heap, settle, usage
from ckptd.worker.__main__ import VERBS, Loop, Verb
from ckptd.worker.context import Context, Limits
from ckptd.worker.lane import Lane
from ckptd.worker.parser import Question
from ckptd.worker.protocol import (
    Digest,
    Inspected,
    Link,
    Published,
    Purge,
    Settle,
    Sweep,
    Usage,
    Used,
    Verified,
    Verify,
)
from ckptd_client.wire import Splitter
from tests.support.arena import MIB, publish_request, sealed
from tests.support.in_process import open_fds
from tests.support.node import eventually
from tests.support.worker_process import Died, WorkerProcess


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    with WorkerProcess() as running:
        yield running


def processor(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def await_file(parent: Path, pattern: str) -> None:
    """Wait until a publish has made what `pattern` names; the worker has no event for that."""
    until_s = time.monotonic() + 40
    while not list(parent.glob(pattern)):
        assert time.monotonic() < until_s
        time.sleep(0.005)


def test_an_arena_travels_with_its_request_and_the_answer_is_typed(worker: WorkerProcess, tmp_path: Path) -> None:
    fd, images = sealed({"model.safetensors": bytes(MIB)})
    done = worker.ask(publish_request(tmp_path, images), fd)
    assert isinstance(done, Published)
    assert (Path(done.path) / "model.safetensors").read_bytes() == bytes(MIB)
    verified = worker.ask(Verify(root=str(tmp_path), path=done.path, files=done.files))
    assert isinstance(verified, Verified)
    assert verified.damage == []
    os.close(fd)


def test_each_arena_goes_to_the_request_that_names_it(worker: WorkerProcess, tmp_path: Path) -> None:
    """Many requests in one segment, arenas between requests that have none."""
    numbers = {}
    for i in range(12):
        data = {"f": bytes([i]) * 5000}
        fd, images = sealed(data)
        request = publish_request(tmp_path, images, target=tmp_path / f"s{i}")
        numbers[worker.send(request, fd)] = i
        os.close(fd)
        worker.send(Usage(root=str(tmp_path)))
    replies = [worker.frame() for _ in range(24)]
    assert all(reply["ok"] for reply in replies)
    for i in numbers.values():
        assert (tmp_path / f"s{i}/f").read_bytes() == bytes([i]) * 5000


def test_no_descriptor_is_left_when_a_request_is_done(worker: WorkerProcess, tmp_path: Path) -> None:
    fd, images = sealed({"f": b"x"})
    descriptors = Path(f"/proc/{worker.process.pid}/fd")
    worker.ask(publish_request(tmp_path, images), fd)
    before = len(os.listdir(descriptors))
    for i in range(3):
        worker.ask(publish_request(tmp_path, images, target=tmp_path / str(i)), fd)
        worker.ask(publish_request(tmp_path, images, target=tmp_path / "0"), fd)
        worker.ask(publish_request(tmp_path, images, target="elsewhere"), fd)
        worker.send_raw(b'{"id":%d,"verb":"publish","fds":1,"root":1}\n' % (900 + i), fd)
        assert worker.reply(900 + i)["error"]["code"] == "bad_request"
    eventually(lambda: len(os.listdir(descriptors)) <= before, "what the last request had to be closed")
    os.close(fd)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Digest(root="/nowhere", path="/nowhere/x"), "not_found"),
        (Digest(root="/proc", path="/proc/nothing"), "missing"),
        (Digest(root="/proc", path="/etc"), "bad_path"),
        (Digest(root="/proc", path="/proc/self/cwd"), "bad_path"),
        (Link(root="/proc", name="/proc/x", target="y"), "missing"),
        (Purge(root="/proc", trash="x/y"), "bad_path"),
    ],
)
def test_errors_have_the_code_of_who_must_act(worker: WorkerProcess, request_: Digest, code: str) -> None:
    assert worker.ask(request_)["code"] == code


def test_a_request_of_another_shape_is_refused_and_the_next_one_answered(worker: WorkerProcess, tmp_path: Path) -> None:
    for number, body in enumerate(
        [b'"verb":"usage"', b'"verb":"nothing","root":"/"', b'"verb":"usage","root":"/","more":1'], start=50
    ):
        worker.send_raw(b'{"id":%d,%s}\n' % (number, body))
        assert worker.reply(number)["error"]["code"] == "bad_request"
    assert isinstance(worker.ask(Usage(root=str(tmp_path))), Used)


@pytest.mark.parametrize("frame", [b"nonsense\n", b"[]\n", b'{"verb":"usage"}\n', b'{"id":1,"fds":1,"verb":"usage"}\n'])
def test_a_broken_conversation_ends_the_worker(worker: WorkerProcess, frame: bytes) -> None:
    """It can't be known what the next bytes mean, nor whose the next descriptor is."""
    worker.send_raw(frame)
    with pytest.raises(Died) as died:
        worker.frame()
    assert died.value.status == os.EX_PROTOCOL


def test_the_end_of_the_socket_ends_the_worker_in_the_middle_of_a_publish(tmp_path: Path) -> None:
    """M021. An orphan must not publish after its daemon: the next daemon may decide otherwise."""
    fd, images = sealed({"f": bytes(MIB)})
    with WorkerProcess(fail="copy.fsynced=delay:600") as worker:
        worker.send(publish_request(tmp_path, images), fd)
        await_file(tmp_path, "p/e/.*/f")
        worker.socket.shutdown(socket.SHUT_RDWR)
        assert worker.process.wait(timeout=40) == 0
    assert not (tmp_path / "p/e/step_0000000001").exists()
    os.close(fd)


def test_ctrl_c_and_sigterm_do_not_cut_a_publish_off(tmp_path: Path) -> None:
    """They reach the whole process group while the daemon drains; the daemon says when it is over."""
    fd, images = sealed({"f": bytes(MIB)})
    with WorkerProcess(fail="dir.fsynced=delay:0.5") as worker:
        assert isinstance(worker.ask(Usage(root=str(tmp_path))), Used)
        number = worker.send(publish_request(tmp_path, images), fd)
        for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGIO):
            worker.process.send_signal(which)
        assert worker.reply(number)["ok"]
    os.close(fd)


def test_quick_questions_are_answered_while_heavy_ones_queue(tmp_path: Path) -> None:
    fd, images = sealed({"f": bytes(MIB)})
    plan = tmp_path.with_name("plan")
    plan.write_text("copy.allocated=delay:600")
    with WorkerProcess(fail=f"@{plan}") as worker:
        worker.send(publish_request(tmp_path, images, target=tmp_path / "a"), fd)
        eventually(lambda: not plan.read_text(), "the first to stand there")
        assert isinstance(worker.ask(Usage(root=str(tmp_path))), Used)
        other = worker.send(publish_request(tmp_path, images, target=tmp_path / "b"), fd)
        done = msgspec.convert(worker.reply(other)["result"], Published)
        scrub = Verify(root=str(tmp_path), path=done.path, files=done.files)
        assert worker.ask(scrub).damage == []
        assert isinstance(worker.ask(Sweep(root=str(tmp_path), older_s=3600)), msgspec.Struct)
    os.close(fd)


def test_a_cancelled_request_ends_with_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    fd, images = sealed({"f": bytes(MIB * 64)})
    with WorkerProcess(fail="copy.chunk=delay:5") as worker:
        number = worker.send(publish_request(tmp_path, images), fd)
        await_file(tmp_path, "p/e/.*/f")
        worker.cancel(number)
        assert worker.reply(number)["error"]["code"] == "timeout"
        worker.cancel(number)
        worker.cancel(12345)
        assert isinstance(worker.ask(Usage(root=str(tmp_path))), Used)
    assert list((tmp_path / "p/e").iterdir()) == []
    os.close(fd)


def test_a_descriptor_that_there_is_no_room_for_costs_its_own_request_a_retry_and_nothing_else(tmp_path: Path) -> None:
    """F15. Who is answered what stays certain: requests behind it have their own descriptors, or none."""
    with WorkerProcess() as worker:
        pid = worker.process.pid
        assert isinstance(worker.ask(Usage(root=str(tmp_path))), Used)
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        fd, images = sealed({"f": bytes(MIB)})
        taken = set(map(int, os.listdir(f"/proc/{pid}/fd")))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(1000)) - taken), hard))
        lost, beside = worker.send(publish_request(tmp_path, images), fd), worker.send(Usage(root="/nowhere"))
        error = worker.reply(lost)["error"]
        assert (error["code"], error["retry_after_s"]) == ("busy", 1.0)
        assert "descriptor" in error["message"]
        assert not worker.reply(beside)["ok"]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert isinstance(worker.ask(publish_request(tmp_path, images), fd), Published)
        assert worker.process.poll() is None
        os.close(fd)


def test_a_worker_is_nice_idle_and_small(tmp_path: Path) -> None:
    with WorkerProcess("--nice", "13", "--idle-io") as worker:
        fd, images = sealed({"f": bytes(MIB)})
        worker.ask(publish_request(tmp_path, images), fd)
        os.close(fd)
        threads = Path(f"/proc/{worker.process.pid}/task")
        for thread in threads.iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that hashed has ended
                assert (thread / "stat").read_text().rpartition(")")[2].split()[16] == "13"
        rss = int(processor(worker.process.pid)[21]) * os.sysconf("SC_PAGE_SIZE")
        assert rss < 40 * MIB
        loaded = Path(f"/proc/{worker.process.pid}/maps").read_text()
        assert not any(name in loaded for name in ("numpy", "torch", "pydantic_core", "greenlet", "sqlite3"))


@pytest.fixture
def loop() -> Iterator[tuple[Loop, WorkerProcess]]:
    """A loop in this process, which is never run (it would end us), and what the daemon hears of it."""
    ours, theirs = socket.socketpair()
    heard = WorkerProcess.__new__(WorkerProcess)
    heard.socket, heard._splitter, heard._frames = ours, Splitter(), []
    ours.settimeout(40)
    yield Loop(theirs, Limits(), threads=2), heard
    ours.close()
    theirs.close()


def test_what_a_request_left_is_given_back_to_the_kernel_behind_its_answer(
    loop: tuple[Loop, WorkerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, answered = Event(), Event()
    monkeypatch.setattr(heap, "give_back", lambda: bool(answered.wait(40)) and given.set())
    serving, heard = loop
    serving._start(7, Usage(root=str(tmp_path)), None)
    assert heard.reply(7)["ok"]
    answered.set()
    assert given.wait(40)


def test_a_bug_in_a_verb_is_an_internal_error_with_its_traceback_in_the_log(
    loop: tuple[Loop, WorkerProcess], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    serving, heard = loop
    monkeypatch.setitem(VERBS, Usage, Verb("fault", "coded"))  # takes one argument: called with two
    serving._start(7, Usage(root="/"), None)
    error = heard.reply(7)["error"]
    assert error["code"] == "internal"
    assert "Traceback" not in str(error)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "worker.internal" in line]
    logged = msgspec.json.decode(line)
    assert logged["event"] == "worker.internal"
    assert "TypeError" in logged["traceback"]


@pytest.mark.parametrize("answer", [os.fsdecode(b"\xff"), object()])
def test_what_can_not_be_written_down_is_an_answer_too(
    loop: tuple[Loop, WorkerProcess], monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    """Else the thread would end with it: the request, and those that wait for that thread, would hear nothing."""
    serving, heard = loop
    monkeypatch.setattr(usage, "run", lambda _request, _context: answer)
    for number in (7, 8):
        serving._start(number, Usage(root="/"), None)
        assert heard.reply(number)["error"]["code"] == "internal"


@pytest.mark.parametrize("raised", [Missing, OSError, RuntimeError])
def test_an_error_about_a_name_that_is_no_text_says_which(
    loop: tuple[Loop, WorkerProcess], monkeypatch: pytest.MonkeyPatch, raised: type[Exception]
) -> None:
    serving, heard = loop
    name = os.fsdecode(b"model-\xff.pt")

    def fail(_request: Usage, _context: Context) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", name) if raised is OSError else raised(name)

    monkeypatch.setattr(usage, "run", fail)
    serving._start(7, Usage(root="/"), None)
    assert any(r"model-\udcff.pt" in told for told in heard.reply(7)["error"].values())


def test_a_request_that_finds_no_room_is_refused_and_its_arena_closed(loop: tuple[Loop, WorkerProcess]) -> None:
    serving, heard = loop
    serving._lanes["publish"] = Lane("full", threads_max=1, waiting_max=0)
    fd = os.memfd_create("arena-of-seven")
    serving._start(7, publish_request(Path("/nowhere"), []), fd)
    assert heard.reply(7)["error"]["code"] == "busy"
    assert open_fds("memfd:arena-of-seven") == 0


def test_a_request_that_lives_speaks_for_those_that_wait_behind_it(loop: tuple[Loop, WorkerProcess]) -> None:
    """The daemon abandons a worker that is silent for too long; waiting is no silence."""
    serving, heard = loop
    lane, gate, begun = Lane("test", threads_max=1, waiting_max=9), Event(), Event()
    lane.submit(1, lambda: (begun.set(), gate.wait(60)))
    assert begun.wait(40)
    lane.submit(2, lambda: None)
    Context(send=partial(serving._speak, 1, lane), limits=Limits(alive_every_s=0.0)).alive()
    assert [heard.frame() for _ in range(2)] == [{"id": 1, "alive": True}, {"id": 2, "alive": True}]
    gate.set()


@pytest.mark.usefixtures("sigio_ignored")
def test_a_settle_that_must_read_contents_leaves_its_lane_to_the_quick_ones(
    loop: tuple[Loop, WorkerProcess], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A zip of 20 GB is read for a minute: links, removals and other questions must not wait for it."""
    serving, heard = loop
    serving._lanes["quick"] = Lane("quick", threads_max=1, waiting_max=9)
    gate, begun, threads = Event(), Event(), []

    def examine(question: Question, _context: Context) -> Inspected:
        if question.crc:
            threads.append(current_thread().name)
            begun.set()
            gate.wait(60)
        return Inspected(format="torch-zip", complete=True)

    monkeypatch.setattr(settle, "examine", examine)
    monkeypatch.setattr(settle, "QUICK_BYTES_MAX", 100)
    for name, size_bytes in (("small.pt", 100), ("large.pt", 101)):
        (tmp_path / name).write_bytes(b"x" * size_bytes)
    large = Settle(root=str(tmp_path), path=str(tmp_path / "large.pt"), quiet_s=0.0, told=True)
    serving._start(7, large, None)
    assert begun.wait(40)
    serving._start(8, Usage(root=str(tmp_path)), None)
    assert heard.reply(8)["ok"], "answered while the large one is being read"
    assert 7 in serving._running, "it can be cancelled all the while"
    gate.set()
    assert heard.reply(7)["result"]["reason"] == "told"
    serving._start(9, msgspec.structs.replace(large, path=str(tmp_path / "small.pt")), None)
    assert heard.reply(9)["result"]["reason"] == "told"
    assert threads == ["read", "quick"]


@pytest.mark.usefixtures("sigio_ignored")
def test_a_settle_that_finds_no_room_to_read_in_is_busy_and_asked_again_later(
    loop: tuple[Loop, WorkerProcess], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serving, heard = loop
    serving._lanes["read"] = Lane("full", threads_max=1, waiting_max=0)
    monkeypatch.setattr(settle, "QUICK_BYTES_MAX", 1)
    monkeypatch.setattr(settle, "examine", lambda *_: Inspected(format="torch-zip", complete=True))
    (tmp_path / "large.pt").write_bytes(b"xx")
    serving._start(7, Settle(root=str(tmp_path), path=str(tmp_path / "large.pt"), quiet_s=0.0, told=True), None)
    assert heard.reply(7)["error"]["code"] == "busy"
    assert serving._running == {}


def test_a_request_that_makes_no_progress_says_nothing() -> None:
    """A timer would speak for a thread that hangs in the kernel."""
    said: list[object] = []
    context = Context(send=said.append)
    for _ in range(1000):
        context.alive()
    assert said == []


def test_a_lane_runs_in_order_with_its_threads_and_refuses_what_it_can_not_hold() -> None:
    lane = Lane("test", threads_max=1, waiting_max=2)
    gate, begun, done = Event(), Event(), Event()
    order: list[int] = []

    def first() -> None:
        begun.set()
        gate.wait(60)

    lane.submit(1, first)
    assert begun.wait(40)
    lane.submit(2, lambda: order.append(2))
    lane.submit(3, lambda: (order.append(3), done.set()))
    assert lane.waiting() == [2, 3]
    with pytest.raises(Busy):
        lane.submit(4, lambda: None)
    gate.set()
    assert done.wait(40)
    assert order == [2, 3]
