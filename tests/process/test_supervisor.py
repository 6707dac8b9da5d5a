"""The supervisor with a stand-in daemon: real processes, real signals, real descriptors."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ckptd import supervisor
from ckptd.clock import SystemClock
from ckptd.errors import BadConfig
from ckptd.intake import lastwords
from ckptd.supervisor import fdstore
from ckptd.supervisor.mailbox import Message
from ckptd.supervisor.unit import Plan, Unit

SCRIPT = Path(__file__).parents[1] / "support" / "run_supervisor.py"
TIMING = {"restart_s": 0.05, "restart_s_max": 0.4, "good_run_s": 60, "start_s": 20, "watchdog_s": 20, "abort_s": 0.3}
PATIENCE_S = 40


def eventually(condition: Callable[[], Any]) -> Any:
    """The condition is another process's doing, so it can only be asked for again."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class House:
    """One state directory, and the supervisors that were started on it."""

    dir: Path
    started: list[subprocess.Popen] = field(default_factory=list)
    timing: dict[str, float] = field(default_factory=lambda: dict(TIMING))
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.dir / "s"

    @property
    def socket(self) -> Path:
        return self.dir / "ckptd.sock"

    def start(self, *flags: str, ready: bool = True) -> subprocess.Popen:
        lives = len(self.diary("born"))
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--state-dir", str(self.state), "--socket", str(self.socket), *flags],
            env={
                **os.environ,
                "STAND_IN_DIARY": str(self.dir / "diary"),
                "STAND_IN_TIMING": json.dumps(self.timing),
                **self.environ,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        if ready:
            eventually(lambda: len(self.diary("born")) > lives)
        return process

    def diary(self, key: str) -> list[Any]:
        try:
            lines = (self.dir / "diary").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [entry for line in lines if key in (entry := json.loads(line))]

    def tell(self, *words: str) -> str:
        """Give the daemon an order; return its answer ("" when it died of it)."""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(PATIENCE_S)
            peer.connect(str(self.socket))
            peer.sendall(" ".join(words).encode() + b"\n")
            try:
                return peer.makefile().readline().strip()
            except ConnectionResetError:
                return ""

    def next_life(self, pid: str) -> dict[str, Any]:
        return eventually(lambda: [life for life in self.diary("born") if str(life["pid"]) != pid][-1:])[0]


@pytest.fixture
def house(short_dir: Path) -> Iterator[House]:
    found = House(short_dir)
    yield found
    for process in found.started:
        if process.poll() is None:
            process.kill()
    for life in found.diary("born"):
        if is_alive(life["pid"]):
            os.kill(life["pid"], signal.SIGKILL)
    for process in found.started:
        process.communicate(timeout=PATIENCE_S)  # after the daemons, which hold the same pipe


def end(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=PATIENCE_S)
    return process.returncode, said


def test_a_stored_descriptor_comes_back_with_its_content_after_sigkill(house):
    """F23: an arena outlives the daemon."""
    house.start()
    pid = house.tell("store", "arena-aa", "precious")
    house.tell("store", "arena-bb", "gone")
    house.tell("remove", "arena-bb")
    house.tell("crash")
    life = house.next_life(pid)
    assert life["born"] == ["ckptd.socket", "arena-aa"]
    assert life["stored"] == {"arena-aa": "precious"}
    assert life["cwd"] == "/"


def test_what_was_stored_in_the_last_moment_before_a_crash_is_kept(house):
    """The daemon acknowledges a save after `store()` returned; it may die in the next instruction."""
    house.start()
    pid = house.tell("store", "arena-00", "x")
    house.tell("store-and-crash", "arena-aa", "just-in-time")
    assert house.next_life(pid)["stored"] == {"arena-00": "x", "arena-aa": "just-in-time"}


def test_words_that_arrive_while_the_loop_looks_elsewhere_are_heard_before_the_burial(house):
    """A daemon may store and die between the poll's look at the mailbox and its look at the process."""

    class Mailbox:
        address = str(house.dir / "nobody")

        def fileno(self) -> int:
            return quiet

        def messages(self) -> Iterator[Message]:
            yield Message(unit._pid, {"FDSTORE": "1", "FDNAME": "arena-aa"}, [os.memfd_create("x")])

    quiet, other = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        unit = Unit(Plan(("/bin/true",), lambda *_, **__: None), listener, Mailbox(), SystemClock())
        assert unit.run() == 0
    assert [name for name, _ in unit.store] == ["arena-aa"]
    unit.store.drop("arena-aa")
    os.close(quiet)
    os.close(other)


def test_storing_a_name_again_replaces_it(house):
    house.start()
    pid = house.tell("store", "arena-aa", "old")
    house.tell("store", "arena-aa", "new")
    house.tell("crash")
    assert house.next_life(pid)["stored"] == {"arena-aa": "new"}


def test_connections_queued_during_a_restart_are_served_by_the_next_daemon(house):
    house.timing["restart_s"] = 0.5
    house.start()
    pid = house.tell("store", "x", "y")
    house.tell("crash")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(PATIENCE_S)
        peer.connect(str(house.socket))  # nobody is there to accept it
        peer.sendall(b"pid\n")
        assert peer.makefile().readline().strip() == str(house.next_life(pid)["pid"])


def test_a_daemon_that_keeps_dying_is_restarted_ever_more_slowly(house):
    house.environ["STAND_IN_EXIT"] = "1"
    began = time.monotonic()
    process = house.start(ready=False)
    eventually(lambda: len(house.diary("born")) >= 5)
    assert time.monotonic() - began > 0.05 + 0.1 + 0.2 + 0.4
    process.send_signal(signal.SIGTERM)
    code, said = end(process)
    pauses = [json.loads(line).get("restart_in_s") for line in said.splitlines() if "daemon_died" in line]
    assert pauses[:4] == [0.05, 0.1, 0.2, 0.4]
    assert code in {0, 1, 128 + signal.SIGTERM}  # whatever its last life was doing


def test_a_good_run_makes_the_next_pause_short_again(house):
    house.timing["good_run_s"] = 0.0
    house.environ["STAND_IN_EXIT"] = "1"
    process = house.start(ready=False)
    eventually(lambda: len(house.diary("born")) >= 4)
    process.kill()
    pauses = {json.loads(line).get("restart_in_s") for line in end(process)[1].splitlines() if "daemon_died" in line}
    assert pauses == {0.05}


@pytest.mark.parametrize("code", [0, 78])
def test_a_clean_exit_and_a_bad_configuration_are_final(house, code):
    house.environ["STAND_IN_EXIT"] = str(code)
    assert end(house.start())[0] == code
    assert len(house.diary("born")) == 1
    assert not house.socket.exists()


def test_once_means_once(house):
    process = house.start("--once")
    house.tell("crash")
    assert end(process)[0] == 128 + signal.SIGKILL
    assert len(house.diary("born")) == 1


def test_a_second_supervisor_is_refused_with_the_pid_of_the_first(house):
    """F25: within a second, by a lock and not by a pid file."""
    first = house.start()
    house.tell("pid")
    second = house.start(ready=False)
    code, said = end(second)
    error = json.loads(said)["error"]
    assert code == 1
    assert (error["code"], error["pid"]) == ("already_running", first.pid)
    assert house.tell("pid")


def test_a_lock_left_by_a_killed_supervisor_holds_nobody_up(house):
    first = house.start()
    house.tell("pid")
    first.kill()
    first.wait()
    eventually(lambda: house.diary("signal"))
    eventually(lambda: not is_alive(house.diary("born")[0]["pid"]))
    house.start()
    assert house.tell("pid")


def test_a_daemon_whose_supervisor_is_killed_drains_and_exits(house):
    """Nobody would keep its arenas, restart or watch it: the kernel tells it with SIGTERM."""
    first = house.start()
    pid = int(house.tell("pid"))
    first.kill()
    eventually(lambda: not is_alive(pid))
    assert house.diary("signal") == [{"pid": pid, "signal": "SIGTERM"}]


def test_sigterm_reaches_the_daemon_and_its_exit_status_comes_back(house):
    process = house.start()
    pid = int(house.tell("pid"))
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0
    assert house.diary("signal") == [{"pid": pid, "signal": "SIGTERM"}]
    assert not house.socket.exists()
    assert not is_alive(pid)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_other_signals_are_passed_on_and_nothing_stops(house, name):
    process = house.start()
    house.tell("pid")
    process.send_signal(signal.Signals[name])
    eventually(lambda: [entry for entry in house.diary("signal") if entry["signal"] == name])
    assert house.tell("pid")


def heard(house: House, times: int, **timing: float) -> int:
    """How many of so many SIGTERMs a daemon that does not stop heard before it was killed; a busy machine may be late."""
    house.timing |= timing
    process, before = house.start(), len(house.diary("signal"))
    house.tell("stubborn")
    for number in range(times):
        eventually(lambda number=number: len(house.diary("signal")) == before + number)
        process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 128 + signal.SIGKILL
    return len(house.diary("signal")) - before


def test_a_daemon_that_does_not_stop_in_time_is_killed(house):
    assert any(heard(house, 1, stop_s=stop_s) == 1 for stop_s in (0.3, 3.0, 12.0))


def test_a_second_sigterm_is_passed_on_and_shortens_the_wait(house):
    assert any(heard(house, 2, stop_s=600, hurry_s=hurry_s) == 2 for hurry_s in (0.2, 3.0, 12.0))


def test_a_daemon_that_asks_for_more_time_to_stop_gets_it(house):
    """F28: the deadline moves while the drain goes on."""

    def gets_it(stop_s: float) -> bool:
        house.timing["stop_s"] = stop_s
        process, signals = house.start(), len(house.diary("signal"))
        house.tell("stubborn")
        process.send_signal(signal.SIGTERM)
        eventually(lambda: len(house.diary("signal")) > signals)
        with suppress(OSError):  # it has been killed already
            house.tell("extend", "600")
            time.sleep(stop_s + 0.5)  # past the deadline that was
            return process.poll() is None and house.tell("exit", "3") == "" and end(process)[0] == 3
        return False

    assert any(gets_it(stop_s) for stop_s in (2, 15))  # on a busy machine it may ask too late the first time


def test_a_silent_daemon_is_aborted_killed_and_restarted(house):
    """F30. SIGABRT first, so that the daemon's stacks reach the log."""
    house.timing |= {"watchdog_s": 0.6, "abort_s": 20.0}
    process = house.start()
    pid = house.tell("silent")
    assert house.next_life(pid)["born"] == ["ckptd.socket"]
    process.kill()
    said = end(process)[1]
    assert "watchdog: silent" in said
    assert f'"code": {128 + signal.SIGABRT}' in said


def test_a_daemon_that_beats_is_left_alone(house):

    def is_left_alone(watchdog_s: float) -> bool:
        house.timing["watchdog_s"] = watchdog_s
        process, lives = house.start(), len(house.diary("born"))
        pid = house.tell("pid")
        time.sleep(3 * watchdog_s)
        left = house.tell("pid") == pid and len(house.diary("born")) == lives
        process.send_signal(signal.SIGTERM)
        end(process)
        return left

    # A busy machine may hold up the beats themselves for longer than the first of these, and then the next.
    assert any(is_left_alone(watchdog_s) for watchdog_s in (0.4, 4.0, 12.0))


def test_what_a_dead_daemon_left_in_its_process_group_is_ended(house):
    """A worker or a hook of the dead daemon must not write beside the next one."""
    house.start()
    orphan = int(house.tell("orphan"))
    assert is_alive(orphan)
    house.tell("crash")
    eventually(lambda: not is_alive(orphan))


def test_only_the_daemon_itself_is_heard(house):
    """Another process of the same user can't store, remove or feed the watchdog."""
    house.start()
    pid = house.tell("store", "arena-aa", "precious")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"FDSTOREREMOVE=1\nFDNAME=arena-aa", str(house.state / "notify"))
    house.tell("crash")
    assert house.next_life(pid)["stored"] == {"arena-aa": "precious"}


def test_socket_and_state_directory_are_private_from_the_first_moment(house):
    house.start()
    assert stat.S_IMODE(house.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(house.state.stat().st_mode) == 0o700
    assert stat.S_IMODE((house.state / "notify").stat().st_mode) == 0o600


def test_a_stale_socket_is_replaced(house):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(house.socket))
    house.start()
    assert house.tell("pid")


def test_a_socket_on_which_somebody_answers_is_left_to_him(house):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(house.socket))
        other.listen()
        code, said = end(house.start(ready=False))
    assert (code, json.loads(said)["error"]["code"]) == (1, "already_running")
    assert house.socket.exists()


@pytest.mark.parametrize("kind", ["file", "symlink", "datagram"])
def test_whatever_else_lies_at_the_sockets_path_is_refused_and_stays(house, kind):
    """S10."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as alive:
        if kind == "file":
            house.socket.write_text("mine")
        elif kind == "symlink":
            house.socket.symlink_to(house.dir / "elsewhere")
        else:
            alive.bind(str(house.socket))
        code, said = end(house.start(ready=False))
    assert (code, json.loads(said)["error"]["code"]) == (2, "bad_path")
    assert os.path.lexists(house.socket)
    assert house.diary("born") == []


def test_a_socket_path_the_kernel_can_not_hold_is_refused(house):
    code, said = end(house.start("--socket", str(house.dir / ("x" * 120)), ready=False))
    assert code in {2, 78}
    assert "107" in json.loads(said)["error"]["message"]


def test_a_state_directory_others_may_write_is_refused(house):
    house.state.mkdir()
    house.state.chmod(0o777)
    code, said = end(house.start(ready=False))
    assert (code, json.loads(said)["error"]["code"]) == (78, "bad_config")


def test_detach_returns_when_the_daemon_is_ready_and_leaves_it_running(house):
    """What a trainer's client waits for when it starts a missing daemon."""
    parent = house.start("--detach")
    assert end(parent)[0] == 0
    pid = int(house.tell("pid"))
    assert os.getsid(pid) != os.getsid(0)
    log = house.state / "ckptd.log"
    assert "supervisor.daemon_ready" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    holder = int((house.state / "supervisor.lock").read_text())
    assert holder != parent.pid
    os.kill(holder, signal.SIGTERM)
    eventually(lambda: not is_alive(holder))
    assert not is_alive(pid)


def test_detach_tells_when_the_daemon_could_not_start(house):
    house.environ["STAND_IN_EXIT"] = "78"
    lastwords.leave(str(house.socket), BadConfig("of long ago"))
    code, said = end(house.start("--detach"))
    assert code == 78
    assert "ckptd.log" in said
    assert "of long ago" not in said


def test_the_configuration_file_may_name_the_places(house):
    """The supervisor and the daemon read the same two keys, or they would meet at different sockets."""
    file = house.dir / "c.toml"
    file.write_text(f'state_dir = "{house.dir / "other"}"\nsocket = "{house.dir / "other.sock"}"\n')
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--config", str(file)],
        env={**os.environ, "STAND_IN_DIARY": str(house.dir / "diary"), "STAND_IN_TIMING": json.dumps(TIMING)},
        stderr=subprocess.PIPE,
        text=True,
    )
    house.started.append(process)
    eventually(lambda: house.diary("born"))
    assert (house.dir / "other" / "supervisor.lock").exists()
    assert (house.dir / "other.sock").is_socket()
    assert house.diary("born")[0]["argv"] == ["--config", str(file)]


def test_the_supervisor_stays_small(house):
    process = house.start()
    house.tell("pid")
    rss = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert rss < 24 << 20  # 4 of it are there so that what it holds can be rescued without any import


def test_importing_the_command_brings_none_of_the_daemons_libraries():
    program = (
        "import sys, ckptd.supervisor;"
        "sys.exit(bool({'pydantic', 'anyio', 'asyncio', 'sqlalchemy', 'msgspec', 'structlog'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_fd_store_is_bounded_by_count_and_bytes():
    store = fdstore.FdStore(count_max=2, bytes_max=100)

    def memfd(size: int) -> int:
        fd = os.memfd_create("x")
        os.ftruncate(fd, size)
        return fd

    assert store.put("a", memfd(60))
    assert not store.put("b", memfd(41))
    assert store.put("b", memfd(40))
    assert not store.put("c", memfd(0))
    assert store.put("a", memfd(10))
    assert store.size_bytes == 50
    assert [name for name, _ in store] == ["b", "a"]
    for name, _ in list(store):
        assert store.drop(name)
    assert not store.drop("a")


@pytest.mark.parametrize(
    ("environ", "managed"),
    [
        ({}, False),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "SELF"}, True),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "1"}, False),
        ({"SYSTEMD_EXEC_PID": "SELF", "NOTIFY_SOCKET": "/run/x"}, True),
        ({"SYSTEMD_EXEC_PID": "1", "INVOCATION_ID": "ab"}, False),
        ({"NOTIFY_SOCKET": "/run/x", "INVOCATION_ID": "ab"}, False),
    ],
)
def test_only_a_process_that_systemd_itself_started_is_managed(environ, managed):
    """A shell in a desktop session inherits INVOCATION_ID; a daemon started there still needs its supervisor."""
    pid = os.getpid()
    assert supervisor.is_managed({k: v.replace("SELF", str(pid)) for k, v in environ.items()}, pid) is managed
