"""What the supervisor writes into the spool at its end, and what it leaves alone: real memory, real processes."""

import errno
import json
import os
import select
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ckptd import failpoint
from ckptd.clock import SystemClock
from ckptd.intake import arena as arenas
from ckptd.intake.arena import Arena
from ckptd.intake.spooled import _spill
from ckptd.model import new_id
from ckptd.supervisor import rescue, unit
from ckptd.supervisor.mailbox import Mailbox
from ckptd.supervisor.rescue import Rescue
from ckptd.supervisor.say import Voice
from ckptd.supervisor.unit import Plan, Unit
from ckptd_client import control

BODY = bytes(range(256)) * 16
SIZE_BYTES = 4 * control.PAGE
STRANGER = 12345  # a uid


@dataclass
class Memory:
    """A store of descriptors, and the spool beside it."""

    state: Path
    capture: pytest.CaptureFixture[str]
    store: list[tuple[str, int]] = field(default_factory=list)
    arenas: list[Arena] = field(default_factory=list)
    plan: Path = Path()

    @property
    def spool(self) -> Path:
        return self.state / "spool"

    def commit(self, descriptor: bytes | None = None, owner: int | None = None) -> str:
        """Store an arena as a trainer leaves it; return its checkpoint's id."""
        checkpoint = new_id()
        fd, page = arenas.make(SIZE_BYTES, os.getuid() if owner is None else owner)
        made = Arena(os.urandom(16), fd, SIZE_BYTES, page, os.getuid(), checkpoint_id=checkpoint)
        raw = json.dumps({"checkpoint": checkpoint}).encode() if descriptor is None else descriptor
        os.pwrite(fd, BODY, control.PAGE)
        os.pwrite(fd, raw, 2 * control.PAGE)
        control.write_lease(page, made.id, 1, os.getpid())
        control.commit(page, 2 * control.PAGE, raw)
        self.store.append((made.name, fd))
        self.arenas.append(made)
        return checkpoint

    def rescue(self) -> int:
        return Rescue(self.state, Voice("json").say).run(self.store)

    def arm(self, text: str) -> None:
        self.plan.write_text(text)

    def spooled(self) -> list[str]:
        return sorted(path.name for path in self.spool.iterdir()) if self.spool.is_dir() else []

    def said(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.capture.readouterr().err.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]


@pytest.fixture
def memory(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    tmp_path.chmod(0o700)
    made = Memory(tmp_path / "state", capfd, plan=tmp_path / "plan")
    made.plan.touch()
    monkeypatch.setattr(failpoint, "_file", str(made.plan))
    yield made
    for each in made.arenas:
        each.close()


def named(*checkpoints: str) -> list[str]:
    return sorted(f"{checkpoint}.arena" for checkpoint in checkpoints)


def test_the_image_is_the_one_that_the_daemon_itself_would_have_spilled(memory: Memory, tmp_path: Path) -> None:
    saved = memory.commit()
    assert memory.rescue() == 0
    assert memory.spooled() == named(saved)
    written = memory.spool / f"{saved}.arena"
    _spill(str(tmp_path), memory.arenas[0])
    assert written.read_bytes() == (tmp_path / f"{saved}.arena").read_bytes()
    assert BODY in written.read_bytes()
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert stat.S_IMODE(memory.spool.stat().st_mode) == 0o700


def test_a_second_rescue_writes_nothing_again(memory: Memory) -> None:
    saved = memory.commit()
    assert memory.rescue() == 0
    written = (memory.spool / f"{saved}.arena").stat()
    assert memory.rescue() == 0
    assert (memory.spool / f"{saved}.arena").stat() == written
    assert len(memory.said("supervisor.save_spooled")) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_an_image_belongs_to_the_user_whose_save_it_is(memory: Memory) -> None:
    """The next daemon takes an image in for its file's owner, and root is not the one who saved."""
    saved = memory.commit(owner=STRANGER)
    assert memory.rescue() == 0
    assert (memory.spool / f"{saved}.arena").stat().st_uid == STRANGER


def test_a_disk_that_is_full_for_one_save_is_said_and_the_others_are_written(memory: Memory) -> None:
    lost, *safe = [memory.commit() for _ in range(3)]
    memory.arm("rescue.written=enospc")
    assert memory.rescue() == 1
    assert memory.spooled() == named(*safe)
    (said,) = memory.said("supervisor.save_not_spooled")
    assert said["checkpoint"] == lost
    assert os.strerror(errno.ENOSPC) in said["error"]
    assert str(memory.spool) in said["do"]


def test_a_state_directory_that_can_not_be_used_is_said_of_each_save(memory: Memory) -> None:
    memory.state.write_text("in the way")
    saved = [memory.commit() for _ in range(2)]
    assert memory.rescue() == 2
    assert [said["checkpoint"] for said in memory.said("supervisor.save_not_spooled")] == saved


def test_a_disk_that_hangs_holds_the_end_up_for_a_bounded_time(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[int] = []
    wait = rescue._ends_within
    monkeypatch.setattr(rescue, "_ends_within", lambda pid, limit_s: writers.append(pid) or wait(pid, limit_s))
    monkeypatch.setattr(rescue, "RESCUE_S", 0.2)
    lost = memory.commit()
    memory.arm("rescue.written=delay:600")
    assert memory.rescue() == 1
    assert os.waitstatus_to_exitcode(os.waitpid(writers[0], 0)[1]) == -signal.SIGKILL
    (said,) = memory.said("supervisor.save_not_spooled")
    assert said["checkpoint"] == lost
    assert memory.spooled() != named(lost)


def test_a_writer_that_is_killed_is_started_once_more(memory: Memory) -> None:
    saved = memory.commit()
    memory.arm("rescue.written=kill")
    assert memory.rescue() == 0
    assert set(named(saved)) < set(memory.spooled()), "beside it, what the dead one left, under a temporary name"


def test_a_machine_without_a_process_to_spare_has_the_saves_written_all_the_same(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = [memory.commit() for _ in range(2)]
    monkeypatch.setattr(os, "fork", refuses)
    assert memory.rescue() == 0
    assert memory.spooled() == named(*saved)


def refuses() -> int:
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_memory_that_was_lent_again_while_it_was_written_gets_no_name(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon lives then, and has had what was in it."""
    memory.commit()
    page = memory.arenas[0].page
    monkeypatch.setattr(failpoint, "hit", lambda _: control.write_lease(page, bytes(16), 2, os.getpid()))
    assert memory.rescue() == 0
    assert memory.spooled() == []


def published(arena: Arena) -> None:
    control.set_state(arena.page, control.RELEASED)


def lent(arena: Arena) -> None:
    control.write_lease(arena.page, arena.id, 2, os.getpid())


def torn(arena: Arena) -> None:
    os.pwrite(arena.fd, b"{", 2 * control.PAGE + 1)


def outside(arena: Arena) -> None:
    control.commit(arena.page, SIZE_BYTES, b"{}")


def renamed(arena: Arena) -> None:
    os.pwrite(arena.fd, os.urandom(16), 24)


@pytest.mark.parametrize("becomes", [published, lent, torn, outside, renamed])
def test_memory_that_no_daemon_would_need_is_let_go(memory: Memory, becomes: Callable[[Arena], None]) -> None:
    memory.commit()
    becomes(memory.arenas[0])
    assert memory.rescue() == 0
    assert memory.spooled() == []


def test_descriptors_that_are_no_arenas_are_let_go(memory: Memory) -> None:
    """One that its writer may shrink would end whoever maps it."""
    memory.commit()
    (name, sealed) = memory.store.pop()
    loose = os.memfd_create("arena")
    os.pwrite(loose, os.pread(sealed, SIZE_BYTES, 0), 0)
    ends = os.pipe()
    memory.store += [(name, loose), ("ckptd.socket", ends[0])]
    assert memory.rescue() == 0
    assert memory.spooled() == []
    for fd in (loose, *ends):
        os.close(fd)


STRANGE = {
    "a path": '{"checkpoint":"../../../../tmp/x"}',
    "a number": '{"checkpoint":7}',
    "no object": "[]",
    "cut short": "{",
    "deep": "[" * 4000,
    "no id": '{"checkpoint":"' + "A" * 32 + '"}',
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_descriptor_names_no_file_but_a_checkpoints(memory: Memory, kind: str) -> None:
    """A trainer wrote it, and the supervisor may be root's."""
    memory.commit(STRANGE[kind].encode())
    saved = memory.commit()
    assert memory.rescue() == 0
    assert memory.spooled() == named(saved)
    assert len(memory.said("supervisor.arena_refused")) == 1


def test_a_writer_keeps_neither_lock_nor_socket_of_its_supervisor(memory: Memory) -> None:
    """It may outlive it; the next supervisor must find both free. So what a pipe tells ends with us."""
    heard, told = os.pipe2(os.O_CLOEXEC)
    memory.commit()
    memory.arm("rescue.written=delay:600")
    pid = os.fork()
    if pid == 0:
        memory.rescue()
        os._exit(0)
    os.close(told)
    while memory.plan.read_text():
        select.select([], [], [], 0.02)
    writer = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        assert select.select([heard], [], [], 30.0)[0], "the pipe is open in the writer"
        assert os.read(heard, 1) == b""
        assert Path(f"/proc/{writer}").exists()
    finally:
        os.kill(writer, signal.SIGKILL)
        os.close(heard)


def test_a_defect_of_the_supervisor_ends_it_after_the_rescue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine out of processes, here: no daemon can be started, and there is no next turn."""
    rescued: list[object] = []

    def rescues(store: object) -> int:
        rescued.append(store)
        return 0

    mailbox = Mailbox(tmp_path)
    monkeypatch.setattr(unit.os, "fork", refuses)
    with socket.socket(socket.AF_UNIX) as listener:
        made = Unit(Plan(("/bin/true",), lambda *_, **__: None, rescue=rescues), listener, mailbox, SystemClock())
        with pytest.raises(OSError, match=os.strerror(errno.EAGAIN)):
            made.run()
    mailbox.close()
    assert rescued == [made.store]
