"""The spool: an image and an offer written by a client, and taken out once they are safe elsewhere."""

import errno
import mmap
import os
from pathlib import Path
from unittest import mock

from ckptd.intake import spooled
from ckptd_client import spool
from ckptd_client.gather import gather
from tests.model.explore import Says, Tree
from tests.model.recorder import Recorder
from tests.model.scenario import Edge, Scenario

ID = "a" * 32
IMAGES = (b"first image" * 500, b"second image" * 600)
OFFER = {"op": "submit", "path": "/runs/last.pt", "checkpoint": ID}
WRITTEN = (Edge("fsync spool._write:", "Move"), Edge("fsync spool.sync_directory", "says spooled"))
TAKEN = Edge("fsync spooled._remove", "says taken")
ARENA, OFFERED = f"spool/{ID}.arena", f"spool/{ID}.offer"


def _prepare(root: Path) -> None:
    (root / "spool").mkdir()


def _write(root: Path, number: int) -> bytes:
    body = IMAGES[number].ljust(spool.round_up(len(IMAGES[number])), b"\0")
    image = mmap.mmap(-1, len(body))  # page-aligned, as an arena is: O_DIRECT where there is such a thing
    image[:] = body
    spool.write_arena(str(root / "spool"), ID, memoryview(image))
    return body


def image_written() -> Scenario:
    """A save that no daemon takes."""

    def run(recorder: Recorder) -> None:
        recorder.say("spooling", (ARENA, _body(0)))
        _write(recorder.root, 0)
        recorder.say("spooled", (ARENA, _body(0)))

    return Scenario("spool an image", run, check, prepare=_prepare, edges=WRITTEN)


def image_written_again() -> Scenario:
    """The same save once more, after another that was whole."""

    def prepare(root: Path) -> None:
        _prepare(root)
        _write(root, 0)

    def run(recorder: Recorder) -> None:
        if not recorder.ops:
            recorder.say("spooled", (ARENA, _body(0)))
        recorder.say("spooling", (ARENA, _body(1)))
        _write(recorder.root, 1)
        recorder.say("spooled", (ARENA, _body(1)))

    return Scenario("spool an image again", run, check, prepare=prepare, edges=WRITTEN)


def offer_written() -> Scenario:
    """A file waits at its path."""

    def run(recorder: Recorder) -> None:
        body = b'{"op":"submit","path":"/runs/last.pt","checkpoint":"' + ID.encode() + b'"}'
        recorder.say("spooling", (OFFERED, body))
        spool.write_offer(str(recorder.root / "spool"), ID, OFFER)
        recorder.say("spooled", (OFFERED, body))

    return Scenario("spool an offer", run, check, prepare=_prepare, edges=WRITTEN)


def taken_out() -> Scenario:
    """Durable elsewhere by now: the image goes, and does not come back."""

    def prepare(root: Path) -> None:
        _prepare(root)
        _write(root, 0)

    def run(recorder: Recorder) -> None:
        recorder.say("taking", (ARENA, _body(0)))
        spooled._remove(str(recorder.root / ARENA))
        recorder.say("taken", (ARENA, _body(0)))

    return Scenario(
        "take an image out of the spool", run, check, prepare=prepare, fails=False, edges=(TAKEN,)
    )  # asked again after a failed fsync nobody promises more than that: what comes back is taken in once more


def gathered() -> Scenario:
    """Saves in a spool that nobody reads are brought to the one that is read."""

    return Scenario(
        "bring a save over",
        _gather,
        check_gathered,
        prepare=_prepare_own,
        edges=(Edge("fsync gather.gather", f"Drop {ID}.arena"), Edge("fsync gather.gather", "says gathered")),
    )


def gathered_from_elsewhere() -> Scenario:
    """The two spools lie on file systems of their own."""

    def run(recorder: Recorder) -> None:
        with mock.patch.object(os, "link", side_effect=OSError(errno.EXDEV, os.strerror(errno.EXDEV))):
            _gather(recorder)

    edges = (*WRITTEN[:1], Edge("fsync spool.sync_directory", f"Drop {ID}.arena"))
    return Scenario("bring a save over from elsewhere", run, check_gathered, prepare=_prepare_own, edges=edges)


def _prepare_own(root: Path) -> None:
    _prepare(root)
    (root / "own").mkdir()
    (root / "own" / f"{ID}.arena").write_bytes(_body(0))


def _gather(recorder: Recorder) -> None:
    gather(str(recorder.root / "own"), str(recorder.root / "spool"), 1 << 40)
    recorder.say("gathered", (ARENA, _body(0)))


def check_gathered(tree: Tree, says: Says) -> str:
    """I1: the save is whole in one of the two at any moment, and in the one that is read once that was said."""
    here, there = tree.get(f"own/{ID}.arena"), tree.get(ARENA)
    if {here, there} - {None, _body(0)}:
        return "I2: a name leads to something else than the save"
    if there is None and (here is None or any(say.what == "gathered" for say in says)):
        return "I1: the save is gone"
    return ""


def _body(number: int) -> bytes:
    return IMAGES[number].ljust(spool.round_up(len(IMAGES[number])), b"\0")


def check(tree: Tree, says: Says) -> str:
    """I1, I2: a final name in the spool holds a whole image, is there once that was said, and goes for good."""
    held: dict[str, set[bytes | None]] = {}
    for say in says:
        path, body = say.fact
        match say.what:
            case "spooling":
                held.setdefault(path, {None}).add(body)
            case "spooled":
                held[path] = {body}
            case "taking":
                held[path] = {None, body}
            case "taken":
                held[path] = {None}
    for path, allowed in held.items():
        if tree.get(path) not in allowed:
            return f"I1: {path} holds {'nothing' if path not in tree else 'something else'}"
    return ""
