"""The client's connection: whom it trusts, what it refuses to read, how it comes back."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd_client import channel, finder
from ckptd_client import connection as connecting
from ckptd_client.connection import Callbacks, Connection
from ckptd_client.errors import NotFound, Refused, TimedOut, Unavailable
from ckptd_client.places import PlaceError, SocketPlace
from tests.support.fake_daemon import FakeDaemon
from tests.support.in_process import open_fds
from tests.support.node import eventually
from tests.support.saving import BOUND_S, LONG_S


@pytest.fixture
def daemon(short_dir: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(short_dir / "s") as fake:
        yield fake


@pytest.fixture
def connection(daemon: FakeDaemon) -> Iterator[Connection]:
    found = Connection(str(daemon.path))
    yield found
    found.close()


def test_a_request_gets_the_reply_with_its_own_id(connection: Connection, daemon: FakeDaemon):
    daemon.raw["status"] = b'{"v":1,"id":12345,"ok":true,"who":"not me"}\n{"v":1,"id":ID,"ok":true,"who":"me"}\n'
    assert connection.request("status", 30)["who"] == "me"


def test_replies_may_come_in_any_order(connection: Connection, daemon: FakeDaemon):
    assert connection.wait_up(30)
    daemon.silent_on.add("wait")
    with pytest.raises(TimedOut):
        connection.request("wait", 0.05)
    assert connection.request("status", 30)["ok"] is True


def test_errors_become_exceptions_with_their_code(connection: Connection, daemon: FakeDaemon):
    daemon.refuse.update(show="not_found", lease="quota")
    with pytest.raises(NotFound):
        connection.request("show", 30)
    with pytest.raises(Refused) as caught:
        connection.request("lease", 30, size_bytes=1, wait_s=0)
    assert caught.value.code == "quota"


def test_no_daemon_is_said_at_once_and_why(short_dir: Path):
    connection = Connection(str(short_dir / "nobody"))
    began_s = time.monotonic()
    with pytest.raises(Unavailable, match="No such file"):
        connection.request("status", LONG_S)
    assert time.monotonic() - began_s < BOUND_S
    connection.close()


def test_a_server_of_another_user_is_refused_before_a_byte_is_read(
    daemon: FakeDaemon, connection: Connection, monkeypatch: pytest.MonkeyPatch
):
    """S27: someone else may listen where our daemon should."""
    monkeypatch.setattr(channel, "peer_uid", lambda _sock: 4242)
    with pytest.raises(Unavailable, match="served by uid 4242"):
        connection.request("status", 30)
    assert not daemon.requests, "something was said to a stranger"


def test_root_may_serve_the_system_s_socket_and_a_named_one_and_no_other(
    short_dir: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(channel, "peer_uid", lambda _sock: 0)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    named = connecting.named_place(str(daemon.path))
    channel.dial(named).close()
    with pytest.raises(channel.ChannelLost, match="uid 0"):
        channel.dial(SocketPlace(str(daemon.path), (1000,), own=True))


def test_a_line_of_a_gibibyte_is_refused_long_before_it_is_read(daemon: FakeDaemon, connection: Connection):
    """S27: the reader's memory is bounded whatever the server sends."""
    connection.wait_up(30)
    sent = 0
    ended = threading.Event()
    (peer,) = daemon._peers

    def flood() -> None:
        nonlocal sent
        try:
            while sent < 1 << 30:
                sent += peer.send(b"x" * (1 << 16))
        except OSError:
            ended.set()

    thread = threading.Thread(target=flood)
    thread.start()
    assert ended.wait(40)
    thread.join()
    assert sent < 16 << 20
    assert "frame over" in connection.problem or connection.is_up


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\xfe\n",
        b"[1,2]\n",
        b'{"id":ID,"id":ID}\n',
        b'{"id":ID,"ok":NaN}\n',
        b"[" * 100_000 + b"\n",
        b'{"id":ID,"ok":true,"fds":1}\n',
        b'{"id":ID,"ok":true,"fds":-1}\n',
        b'{"id":ID,"ok":true,"fds":"many"}\n',
    ],
)
def test_a_reply_that_breaks_the_framing_ends_the_connection(connection: Connection, daemon: FakeDaemon, answer: bytes):
    daemon.raw["status"] = answer
    with pytest.raises(Unavailable):
        connection.request("status", 30)
    del daemon.raw["status"]
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        if connection.wait_up(1):
            break
        time.sleep(0.02)
    assert connection.request("status", 30)["ok"] is True, "the session did not come back"


@pytest.mark.parametrize("answer", [b"", b'{"id":5}\n{"v":1', b'{"push":1}\n{"id":"x","ok":true}\n{"id":true}\n'])
def test_a_reply_that_never_becomes_whole_is_a_timeout(connection: Connection, daemon: FakeDaemon, answer: bytes):
    assert connection.wait_up(30)
    daemon.raw["status"] = answer
    with pytest.raises(TimedOut):
        connection.request("status", 0.1)


def test_a_version_this_client_does_not_speak_is_refused(daemon: FakeDaemon, connection: Connection):
    daemon.raw["hello"] = b'{"v":1,"id":0,"ok":true,"version":2}\n'
    with pytest.raises(Unavailable, match="unsupported_version"):
        connection.request("status", 30)


def test_descriptors_arrive_closed_on_exec_and_belong_to_the_taker(connection: Connection, daemon: FakeDaemon):
    reply = connection.request("lease", 30, size_bytes=8192, wait_s=1)
    (fd,) = reply["fds"]
    assert os.fstat(fd).st_size == 8192
    assert not os.get_inheritable(fd)
    os.close(fd)


def held(inode: int) -> int:
    """How many descriptors of this process are of that file."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # an earlier test's thread closes what it has
            found += os.stat(f"/proc/self/fd/{fd}").st_ino == inode
    return found


def test_a_descriptor_that_comes_too_late_is_closed(connection: Connection, daemon: FakeDaemon):
    connection.wait_up(30)
    daemon.arenas_max = 0
    with pytest.raises(TimedOut):
        connection.request("lease", 0.05, size_bytes=4096, wait_s=30)
    daemon.arenas_max = 1
    connection.request("status", 30)
    with daemon._changed:
        daemon._serve_waiting()
    connection.request("status", 30)  # handled after the late reply
    (arena,) = daemon.arenas.values()
    assert held(os.fstat(arena.fd).st_ino) == 2, "memfd and its mapping in the fake daemon, nothing here"


def test_more_descriptors_than_there_is_room_for_end_the_connection(connection: Connection, daemon: FakeDaemon):
    """MSG_CTRUNC: a descriptor was lost on the way, so what belongs to what is unknown."""
    connection.wait_up(30)
    (peer,) = daemon._peers
    with open(os.devnull, "rb") as null:
        socket.send_fds(peer, [b'{"push":"x"}\n'], [null.fileno()] * 64)
    deadline_s = time.monotonic() + 30
    while daemon.connections and time.monotonic() < deadline_s and "descriptors" not in connection.problem:
        time.sleep(0.01)
    assert "descriptors" in connection.problem


def test_pushes_go_to_the_callback_and_a_failing_callback_ends_nothing(daemon: FakeDaemon):
    heard: list[str] = []
    came = threading.Event()

    def hear(message: dict[str, object]) -> None:
        heard.append(str(message["n"]))
        if message["n"] == 1:
            raise RuntimeError("a bug of the caller")
        came.set()

    connection = Connection(str(daemon.path), callbacks=Callbacks(push=hear))
    connection.wait_up(30)
    daemon.push({"push": "x", "n": 1})
    daemon.push({"push": "x", "n": 2})
    assert came.wait(30)
    assert heard == ["1", "2"]
    connection.close()


def test_a_lost_daemon_is_found_again(daemon: FakeDaemon):
    ups, downs = threading.Semaphore(0), threading.Semaphore(0)
    callbacks = Callbacks(up=lambda _hello: ups.release(), down=lambda _reason: downs.release())
    connection = Connection(str(daemon.path), callbacks=callbacks)
    connection.start()
    assert ups.acquire(timeout=30)
    daemon.stop()
    assert downs.acquire(timeout=30)
    assert not connection.is_up
    daemon.start()
    assert ups.acquire(timeout=30)
    assert connection.request("status", 30)["ok"] is True
    connection.close()


def test_a_request_under_way_learns_that_the_daemon_is_gone(connection: Connection, daemon: FakeDaemon):
    daemon.silent_on.add("status")
    threading.Timer(0.1, daemon.stop).start()
    began_s = time.monotonic()
    with pytest.raises(Unavailable):
        connection.request("status", LONG_S)
    assert time.monotonic() - began_s < BOUND_S


def test_a_daemon_that_does_not_read_never_blocks_the_sender(short_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """F22: a stopped daemon's socket buffer fills; frames are queued up to a limit and then refused."""
    monkeypatch.setattr(connecting, "HANG_S", LONG_S)  # not given up meanwhile
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(short_dir / "s"))
    listening.listen(1)
    connection = Connection(str(short_dir / "s"))
    connection.start()
    peer, _ = listening.accept()
    peer.recv(4096)
    peer.sendall(b'{"v":1,"id":0,"ok":true,"version":1}\n')
    assert connection.wait_up(30)
    taken = 0
    while connection.request_nowait("x", lambda *_: None, body="y" * 100_000):
        taken += 1
    assert 40 <= taken < 100  # and not blocked: it would be for ever
    connection.close()
    peer.close()
    listening.close()


def test_silence_with_a_request_under_way_ends_the_connection(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connecting, "PING_AFTER_S", 0.1)
    monkeypatch.setattr(connecting, "HANG_S", 0.2)
    connection = Connection(str(daemon.path))
    connection.wait_up(30)
    daemon.mute = True
    with pytest.raises(Unavailable, match="has not answered"):
        connection.request("status", LONG_S)
    connection.close()


def test_its_own_standstill_is_not_taken_for_the_daemon_s(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
    """A training process may hold the interpreter for seconds: what came meanwhile is read before anybody is given up."""
    monkeypatch.setattr(connecting, "PING_AFTER_S", 0.05)
    monkeypatch.setattr(connecting, "HANG_S", LONG_S)
    stands, go_on = threading.Event(), threading.Event()

    def tick() -> None:
        if "watch" in {request["op"] for request in daemon.requests}:
            stands.set()
            go_on.wait(LONG_S)

    connection = Connection(str(daemon.path), callbacks=Callbacks(tick=tick))
    assert connection.wait_up(30)
    daemon.mute = True
    connection.request_nowait("status", lambda *_: None)
    daemon.wait_for("watch")
    connection.tick_within(0.0)
    assert stands.wait(30)
    daemon.mute = False
    monkeypatch.setattr(connecting, "HANG_S", 0.05)
    daemon.push({"push": "level", "checkpoint": "x", "level": "staged"})
    time.sleep(0.2)
    monkeypatch.setattr(connecting, "PING_AFTER_S", LONG_S)  # of the request that stays without an answer
    go_on.set()
    assert connection.request("ping", 30)["ok"]
    assert len(daemon.of("hello")) == 1
    connection.close()


def test_a_slow_answer_is_no_silence_while_the_daemon_answers_pings(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
):
    """A lease may take a minute: that must not look like a hung daemon."""
    monkeypatch.setattr(connecting, "PING_AFTER_S", 0.1)
    daemon.silent_on.add("verify")

    def is_kept(hang_s: float) -> bool:
        monkeypatch.setattr(connecting, "HANG_S", hang_s)
        hellos, watches = len(daemon.of("hello")), len(daemon.of("watch"))
        connection = Connection(str(daemon.path))
        connection.wait_up(30)
        with pytest.raises((TimedOut, Unavailable)) as caught:
            connection.request("verify", 5 * hang_s)
        connection.close()
        stood = caught.type is TimedOut and len(daemon.of("hello")) == hellos + 1
        return stood and len(daemon.of("watch")) >= watches + 2

    assert any(is_kept(hang_s) for hang_s in (0.2, 0.2, 1.0, 5.0)), (
        "a busy machine may make one answer late, but not each time"
    )


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_connects_anew_and_leaves_the_parent_s_session_alone(connection: Connection, daemon: FakeDaemon):
    connection.request("status", 30)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if connection.request("status", 30)["ok"] is True else 2
            connection.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert connection.request("status", 30)["ok"] is True
    assert [hello["pid"] for hello in daemon.of("hello")] == [os.getpid(), pid]


def test_many_threads_share_one_connection(connection: Connection, daemon: FakeDaemon):
    answers: list[object] = []

    def work() -> None:
        answers.extend(connection.request("status", 30)["ok"] for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 400
    assert len(daemon.of("hello")) == 1


def test_a_callback_that_waits_for_its_own_thread_is_told_so(daemon: FakeDaemon):
    caught: list[BaseException] = []
    done = threading.Event()

    def up(_hello: object) -> None:
        try:
            connection.request("status", 1)
        except RuntimeError as error:
            caught.append(error)
        done.set()

    connection = Connection(str(daemon.path), callbacks=Callbacks(up=up))
    connection.start()
    assert done.wait(30)
    assert "callback" in str(caught[0])
    connection.close()


def test_closing_leaves_no_descriptor_and_no_thread(daemon: FakeDaemon):
    def left() -> int:
        return sum(thread.name == "ckptd-connection" for thread in threading.enumerate())

    threads, fds = left(), open_fds()
    for _ in range(3):
        connection = Connection(str(daemon.path))
        connection.request("status", 30)
        connection.close()
    eventually(lambda: left() <= threads and open_fds() <= fds, "all to be closed")


def test_a_socket_path_that_is_too_long_is_an_error_and_not_a_surprise():
    with pytest.raises(PlaceError, match="107 at most"):
        Connection("/tmp/" + "x" * 120)


def test_hello_has_a_limit(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(finder, "HELLO_S", 0.2)
    daemon.mute = True
    connection = Connection(str(daemon.path))
    began_s = time.monotonic()
    with pytest.raises(Unavailable, match="no hello"):
        connection.request("status", LONG_S)
    assert time.monotonic() - began_s < BOUND_S
    connection.close()
