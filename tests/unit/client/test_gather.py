"""Saves in a spool that nobody reads are brought to the one that is read: whole, once, and never by losing one."""

import errno
import os
from pathlib import Path

import pytest

import ckptd_client as ckptd
from ckptd_client import channel, spool
from ckptd_client.gather import gather
from tests.support.fake_daemon import FakeDaemon
from tests.support.node import eventually
from tests.support.saving import state

MUCH = 1 << 40
ONE, TWO = "a" * 32, "b" * 32
IMAGE = b"image".ljust(spool.PAGE, b"\0")
OFFER = {"op": "submit", "path": "/runs/last.pt", "checkpoint": TWO}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    made = tmp_path / "own"
    made.mkdir()
    spool.write_arena(str(made), ONE, memoryview(IMAGE))
    spool.write_offer(str(made), TWO, OFFER)
    (made / f"{ONE}.arena.tmp-1").write_bytes(b"half of one")
    (made / "notes.txt").write_bytes(b"somebody's")
    return made


@pytest.fixture
def into(tmp_path: Path) -> Path:
    made = tmp_path / "into"
    made.mkdir()
    return made


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize("is_one_disk", [True, False])
def test_whole_entries_come_over_and_nothing_else(own, into, monkeypatch, is_one_disk):
    if not is_one_disk:
        monkeypatch.setattr(os, "link", no_links)
    assert gather(str(own), str(into), MUCH) == 2
    assert names(own) == {f"{ONE}.arena.tmp-1", "notes.txt"}
    assert names(into) == {f"{ONE}.arena", f"{TWO}.offer"}
    assert (into / f"{ONE}.arena").read_bytes() == IMAGE
    assert spool.read_offer(str(into / f"{TWO}.offer")) == OFFER
    assert gather(str(own), str(into), MUCH) == 0


def test_a_spool_that_was_never_made_holds_nothing(tmp_path, into):
    assert gather(str(tmp_path / "none"), str(into), MUCH) == 0


def test_what_finds_no_room_stays_and_the_rest_comes(own, into, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(spool.SpoolFull):
        gather(str(own), str(into), 10)
    assert f"{ONE}.arena" in names(own)
    assert names(into) == {f"{TWO}.offer"}


def test_what_is_damaged_stays_where_it_is(own, into, monkeypatch):
    """Nobody could take it; a person may still want to look at it."""
    monkeypatch.setattr(os, "link", no_links)
    (own / f"{ONE}.arena").write_bytes(b"cut off")
    (own / f"{TWO}.offer").write_bytes(b"{")
    assert gather(str(own), str(into), MUCH) == 0
    assert {f"{ONE}.arena", f"{TWO}.offer"} <= names(own)
    assert names(into) == set()


def test_a_name_that_is_there_already_is_written_anew(own, into):
    """Its fsync may have failed: what was linked then proves nothing."""
    os.link(own / f"{ONE}.arena", into / f"{ONE}.arena")
    before = (into / f"{ONE}.arena").stat().st_ino
    assert gather(str(own), str(into), MUCH) == 2
    assert (into / f"{ONE}.arena").stat().st_ino != before
    assert (into / f"{ONE}.arena").read_bytes() == IMAGE
    assert f"{ONE}.arena" not in names(own)


def test_what_another_process_brings_at_the_same_time_is_not_missed(own, into, monkeypatch):
    """It links and takes away between our look and our link."""
    link = os.link

    def late(source: str, target: str, **more: bool) -> None:
        os.rename(source, target)
        link(source, target, **more)

    monkeypatch.setattr(os, "link", late)
    assert gather(str(own), str(into), MUCH) == 0
    assert names(into) == {f"{ONE}.arena", f"{TWO}.offer"}


def test_nothing_is_taken_away_before_the_new_names_are_durable(own, into, monkeypatch):
    def fails(_: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(spool, "sync_directory", fails)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        gather(str(own), str(into), MUCH)
    assert {f"{ONE}.arena", f"{TWO}.offer"} <= names(own)


def test_a_spool_that_a_shared_daemon_does_not_look_into_is_told_of(
    home: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As in a container that has the daemon's socket and not its spool: saves lay where nobody looked, and nobody knew."""
    theirs = home / "theirs"
    daemon.spool_dir = str(theirs)
    made = channel.Channel.__init__
    monkeypatch.setattr(channel.Channel, "__init__", lambda self, sock, **_: made(self, sock, is_shared=True))
    run = ckptd.Experiment("net", dir=home / "r")

    def told() -> list[str]:
        return [each.getMessage() for each in caplog.records if "does not look" in each.getMessage()]

    eventually(told, "the warning")
    assert f"goes to {home / 'state' / 'spool'}" in told()[0]
    assert f"{theirs} can't be written to" in told()[0]
    daemon.stop()
    run.save(state(1), step=1)
    assert run.flush(30)
    theirs.mkdir()
    daemon.start()
    eventually(lambda: list(theirs.glob("*.arena")), "the save to be brought over")
    assert len(told()) == 1
    run.close(timeout_s=5)
