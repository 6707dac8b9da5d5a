"""What is made for another user is that user's, and the kernel says what may be made. As root, who may be anybody."""

import ctypes
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ckptd.errors import Denied
from ckptd.worker import amend, kernel, link, publish, rootmark, strip, trash
from ckptd.worker.context import Context
from ckptd.worker.owner import acting_as
from ckptd.worker.protocol import Amend, FileImage, Link, Published, Restore, RootMark, Strip, Trash
from tests.support.arena import publish_request, sealed
from tests.support.strangers import SOMEBODY, need_root

CAP_SETGID, CAP_SETUID = 6, 7
FILES = {"model.safetensors": b"m" * 70_000, "deep/er/state.json": b"{}"}


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of root's that everybody can pass through."""
    need_root()
    found = Path(tempfile.mkdtemp(prefix="ck"))
    found.chmod(0o755)
    yield found
    shutil.rmtree(found)


@pytest.fixture
def theirs(place: Path) -> Path:
    """A root of another user's."""
    found = place / "theirs"
    found.mkdir()
    os.chown(found, SOMEBODY, SOMEBODY)
    return found


@pytest.fixture
def arena() -> Iterator[tuple[int, list[FileImage]]]:
    made = sealed(FILES)
    yield made
    os.close(made[0])


def published(root: Path, arena: tuple[int, list[FileImage]], owner: int | None = SOMEBODY) -> Published:
    fd, images = arena
    return publish.run(msgspec.structs.replace(publish_request(root, images), owner=owner), Context(fd=fd))


def owners(below: Path) -> set[tuple[int, int]]:
    found = [below, *below.rglob("*")]
    return {(facts.st_uid, facts.st_gid) for facts in (path.lstat() for path in found)}


def test_everything_of_a_publish_belongs_to_its_owner_and_this_thread_is_itself_again(theirs, arena):
    before = os.getgroups()
    done = published(theirs, arena)
    assert owners(theirs) == {(SOMEBODY, SOMEBODY)}
    assert sorted(path.name for path in Path(done.path).rglob("*") if path.is_file()) == [
        "manifest.json",
        "model.safetensors",
        "state.json",
    ]
    assert os.getgroups() == before
    (theirs / "mine").touch()
    assert (theirs / "mine").stat().st_uid == 0


def test_a_publish_that_is_asked_for_again_finds_what_it_made(theirs, arena):
    fd, images = arena
    request = msgspec.structs.replace(publish_request(theirs, images), owner=SOMEBODY)
    assert not publish.run(request, Context(fd=fd)).adopted
    assert publish.run(request, Context(fd=fd)).adopted


def test_the_mark_of_a_users_root_is_the_daemons(theirs, arena):
    fd, images = arena
    request = msgspec.structs.replace(publish_request(theirs, images), owner=SOMEBODY, mark=RootMark())
    publish.run(request, Context(fd=fd))
    assert (theirs / rootmark.NAME).stat().st_uid == 0
    assert owners(theirs / "p") == {(SOMEBODY, SOMEBODY)}


def test_a_root_that_is_missing_is_made_as_its_owner_where_that_one_may(place, arena):
    place.chmod(0o1777)
    published(place / "new" / "root", arena)
    assert owners(place / "new") == {(SOMEBODY, SOMEBODY)}


@pytest.mark.parametrize("missing", [False, True], ids=["there", "missing"])
def test_where_its_owner_may_not_write_nothing_is_made(place, arena, missing):
    root = place / "roots" if missing else place
    with pytest.raises(Denied, match=f"uid {SOMEBODY} may not make or change {root}") as refused:
        published(root, arena)
    assert "let that user write there" in refused.value.hint
    assert os.listdir(place) == []


def test_a_link_belongs_to_the_owner_too_and_is_not_made_where_that_one_may_not(place, theirs):
    asked = Link(root=str(theirs), name=str(theirs / "latest"), target="x", owner=SOMEBODY)
    assert link.run(asked, Context()).count == 1
    assert (theirs / "latest").lstat().st_uid == SOMEBODY
    asked = Link(root=str(place), name=str(place / "latest"), target="x", owner=SOMEBODY)
    with pytest.raises(Denied, match=f"uid {SOMEBODY} may not make or change {place}/latest"):
        link.run(asked, Context())
    assert os.listdir(place) == ["theirs"]


def test_what_is_written_beside_a_manifest_later_belongs_to_whom_the_checkpoint_belongs_to(theirs, arena):
    """Also where that user has taken the right to write there away from himself: it is ours to say."""
    done = published(theirs, arena)
    Path(done.path).chmod(0o500)
    checkpoint = msgspec.json.decode((Path(done.path) / "manifest.json").read_bytes())["checkpoint"]
    names = {"root": str(theirs), "path": done.path, "checkpoint": checkpoint}
    assert amend.run(Amend(**names, metrics={"loss": 0.5}), Context()).count == 1
    taken = {"model.safetensors": len(FILES["model.safetensors"])}
    strip.strip(Strip(**names, files=taken, trash="away", at="2026-01-01T00:00:00+00:00"), Context())
    assert {"late.json", "stripped.json"} < set(os.listdir(done.path))
    assert owners(Path(done.path)) == {(SOMEBODY, SOMEBODY)}


def test_what_can_not_be_given_away_is_written_all_the_same(theirs, arena, monkeypatch):
    done = published(theirs, arena)
    checkpoint = msgspec.json.decode((Path(done.path) / "manifest.json").read_bytes())["checkpoint"]
    said = Amend(root=str(theirs), path=done.path, checkpoint=checkpoint, metrics={"loss": 0.5})

    def denied(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", denied)
    assert amend.run(said, Context()).count == 1


def test_directories_that_went_away_come_back_from_the_trash_as_their_owners(theirs, arena):
    done = published(theirs, arena)
    names = {"root": str(theirs), "path": done.path, "identity": done.identity, "trash": "away"}
    trash.trash(Trash(**names), Context())
    shutil.rmtree(theirs / "p")
    trash.restore(Restore(**names, owner=SOMEBODY), Context())
    assert owners(theirs / "p") == {(SOMEBODY, SOMEBODY)}


def test_other_threads_are_themselves_meanwhile_and_those_that_are_started_are_the_other(theirs):
    """The C library's own setgroups would carry it to all of them."""
    go, done, made = threading.Event(), threading.Event(), {}

    def bystander() -> None:
        go.wait(30)
        (theirs / "bystander").touch()
        made["groups"] = os.getgroups()
        done.set()

    def helper() -> None:
        (theirs / "helper").touch()

    before = os.getgroups()
    beside = threading.Thread(target=bystander)
    beside.start()
    with acting_as(SOMEBODY, "x"):
        go.set()
        done.wait(30)
        started = threading.Thread(target=helper)
        started.start()
        started.join()
    beside.join()
    assert made["groups"] == before
    assert {name: (theirs / name).stat().st_uid for name in ("bystander", "helper")} == {
        "bystander": 0,
        "helper": SOMEBODY,
    }


def test_no_file_of_roots_is_open_to_who_is_acted_as(place):
    """Roots, modes and access lists are the kernel's to read: its capabilities go with root's uid."""
    secret = place / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    with pytest.raises(Denied, match="may not"), acting_as(SOMEBODY, "x"):
        secret.read_text()
    assert secret.read_text() == "root's"


def test_who_is_in_no_database_has_nobodys_group_and_no_other(place):
    place.chmod(0o777)
    with acting_as(4_000_000_000, "x"):
        (place / "file").touch()
        assert os.getgroups() == []
    facts = (place / "file").stat()
    assert (facts.st_uid, facts.st_gid) == (4_000_000_000, 65534)


@pytest.mark.parametrize("capability", [CAP_SETUID, CAP_SETGID])
def test_a_worker_that_may_be_nobody_else_does_nothing_as_itself_and_stays_itself(place, capability):
    """As in many containers. setfsuid(2) says nothing when it may not."""
    child = os.fork()
    if child == 0:
        groups = os.getgroups()
        _without(capability)
        try:
            with acting_as(SOMEBODY, "x"):
                (place / "theirs").touch()
        except Denied as denied:
            (place / "mine").write_text(f"{denied.message} {denied.hint}")
        os._exit(0 if os.getgroups() == groups else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.listdir(place) == ["mine"]
    assert owners(place / "mine") == {(0, 0)}
    said = (place / "mine").read_text()
    assert said.startswith(f"a worker may not act as uid {SOMEBODY}")
    assert "CAP_SETUID and CAP_SETGID" in said


def _without(capability: int) -> None:
    """Give up one capability: capget(2) and capset(2), version 3 of them."""
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << capability)
    assert libc.capset(header, sets) == 0


@pytest.mark.parametrize("call", ["touch_files_as", "take_groups"])
def test_a_thread_that_can_not_become_itself_again_ends_the_worker(place, monkeypatch, call):
    child = os.fork()
    if child == 0:
        with acting_as(SOMEBODY, "x"):
            monkeypatch.setattr(kernel, call, _fails)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == os.EX_OSERR
    assert place.is_dir()


def _fails(*_: object) -> None:
    raise OSError(12, "Cannot allocate memory")


def test_a_users_own_daemon_acts_as_nobody_else(theirs, arena, monkeypatch):
    """Only root could; what is asked of anybody else is done as itself, as ever."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    published(theirs, arena)
    assert owners(theirs / "p") == {(0, 0)}
