"""The spool: an image and an offer written by a client, and taken out once they are safe elsewhere."""

import mmap
from pathlib import Path

from ckptd.intake import spooled
from ckptd_client import spool
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
