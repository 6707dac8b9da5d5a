"""What became known after a checkpoint was published, beside its manifest: `late.json`.

manifest.json is written once and never touched again: the promise that a final name is whole rests on
it. So what comes later has a file of its own, which is replaced whole each time.
"""

import os
from contextlib import suppress

import msgspec

from ckptd.errors import BadRequest, Missing, SourceChanged
from ckptd.worker import beneath, durable
from ckptd.worker.context import Context
from ckptd.worker.formats.ckptd_dir import LATE, LATE_BYTES_MAX, named_in
from ckptd.worker.fsync import FailedEarlier, fsync_directory
from ckptd.worker.protocol import Amend, Done


def run(request: Amend, _context: Context) -> Done:
    """Make `late.json` say this, durably. `count` is 0 when it said so already.

    Missing        there is no such directory
    SourceChanged  it is not this checkpoint's: nothing is written into it
    """
    said = {"v": 1, "checkpoint": request.checkpoint, "metrics": request.metrics}
    text = msgspec.json.encode(said if request.veto is None else {**said, "veto": request.veto}) + b"\n"
    if len(text) > LATE_BYTES_MAX:
        raise BadRequest(f"{LATE} would have {len(text)} bytes, {LATE_BYTES_MAX} at most")
    parts = beneath.parts_below(request.root, request.path)
    root_fd = beneath.open_root(request.root)
    try:
        directory_fd = beneath.open_directory(root_fd, parts, one_mount=True)
    except FileNotFoundError as error:
        raise Missing(f"{request.path!r} is not there", path=request.path) from error
    finally:
        os.close(root_fd)
    try:
        if named_in(directory_fd) != request.checkpoint:
            raise SourceChanged(f"{request.path!r} does not say that it is checkpoint {request.checkpoint}")
        if _read(directory_fd) == text:
            # Its name may be from a process that died before its fsync. Where that fsync failed it is written again:
            # another is asked for only after another change.
            with suppress(FailedEarlier):
                fsync_directory(directory_fd)
                return Done(0)
        durable.replace_file(directory_fd, LATE, text)
    finally:
        os.close(directory_fd)
    return Done(1)


def _read(directory_fd: int) -> bytes | None:
    try:
        with open(beneath.open_file(directory_fd, LATE), "rb") as file:
            return file.read(LATE_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
