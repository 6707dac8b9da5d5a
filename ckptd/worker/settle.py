"""The verb `settle`: is the writer of a path done? A ladder, each rung with what it proves.

told       the writer said so; structure and open writers are still checked
marker     a format's own end mark is there
structure  the format is whole AND nobody has a file open for writing or mapped writable
lease      nobody has it open, and it was quiet for quiet_s: for formats that can't tell
quiet      quiet_s without a change: where leases are not to be had

Structure alone proves nothing: a file rewritten in place is whole from its first byte on, and one
that is preallocated and filled through a mapping has its full size while its tail is still zeros.
No open writer proves nothing alone either: a writer may close between its chunks. Nothing that is
torn is ever settled, however long it is quiet.
"""

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from ckptd.errors import BadPath
from ckptd.worker import beneath, formats, mounts
from ckptd.worker.context import Context, TakesLong
from ckptd.worker.examine import examine
from ckptd.worker.formats.names import is_ours, is_unfinished, markers_of
from ckptd.worker.inspect import with_names
from ckptd.worker.lease import Writer, probe, probe_at
from ckptd.worker.members import Member, identity, members
from ckptd.worker.parser import Question
from ckptd.worker.protocol import IdentityRecord, Inspected, Settle, Settlement

WRITER_RETRY_S = (0.5, 30.0)  # shortest and longest pause before a file with a writer is asked about again
INCOMPLETE_RETRY_S = (1.0, 300.0)
QUICK_BYTES_MAX = 4 << 20  # more is not read in the lane that removals and links wait in
_RETRY_S_MIN = 0.05
_REMEMBERED_MAX = 4096
_REMEMBER_AFTER_S = 2.0  # beyond the coarsest tick of file times, so that an equal identity means equal bytes
_END_MARKED = frozenset({"dcp", "ckptd"})  # their last file is written last and names all others
_TORCH = frozenset({"torch-zip"})

# What was found incomplete, by identity, so that a torn file of 20 GB is not read again each time.
_remembered: OrderedDict[tuple[str, IdentityRecord], Inspected] = OrderedDict()
_remembering = threading.Lock()


@dataclass(slots=True)
class _Look:
    """One path under one open descriptor. `files` is None for a single file."""

    request: Settle
    context: Context
    fd: int
    remote: bool
    files: Sequence[Member] | None = None
    seen: IdentityRecord | None = None

    def identity(self) -> IdentityRecord:
        """Take the identity of what is there now."""
        own = os.fstat(self.fd)
        if not stat.S_ISDIR(own.st_mode):
            return identity(own)
        self.files = members(self.fd)
        return identity(own, self.files)

    def writer(self) -> Writer:
        """Probe every file: OPEN when any has a writer, UNKNOWN when any can't be asked."""
        if self.remote:
            return Writer.UNKNOWN
        if self.files is None:
            return probe(self.fd)
        found = Writer.NONE
        for member in self.files:
            self.context.alive()
            try:
                answer = probe_at(self.fd, member.path)
            except (FileNotFoundError, BadPath):
                return Writer.OPEN  # it went away since it was listed: somebody is at work
            if answer is Writer.OPEN:
                return answer
            found = answer if answer is Writer.UNKNOWN else found
        return found

    def answer(self, reason: str, retry_s: float, found: Inspected | None = None) -> Settlement:
        """Say "not settled", and when to ask again."""
        return Settlement(
            settled=False,
            reason=reason,
            retry_after_s=max(_RETRY_S_MIN, retry_s),
            identity=self.seen,
            format=found.format if found else "opaque",
            step=found.step if found else None,
        )


def run(request: Settle, context: Context) -> Settlement:
    """Climb the ladder once; never waits for a writer. TakesLong where a quick one would have to read contents.

    Whatever the path turns out to be is an answer ("gone", "refused: ..."). BadPath when it is not
    below its root, NotFound when the root is gone, TimedOut when the disk does not answer.
    """
    parts = beneath.parts_below(request.root, request.path)
    refusal = _refused_by_name(request, parts)
    if refusal:
        return _refused(refusal)
    root_fd = beneath.open_root(request.root)
    try:
        look = _open(request, context, root_fd, parts)
        if isinstance(look, Settlement):
            return look
        try:
            found = _settle(look)
            if found.settled and not _is_named(look, root_fd, parts):
                return look.answer("changing", request.quiet_s)
            return found
        finally:
            os.close(look.fd)
    except FileNotFoundError:
        return Settlement(settled=False, reason="gone", retry_after_s=0.0, identity=None)
    except NotADirectoryError:
        return _refused("a file or a symlink lies on the way")
    except BadPath as error:
        return _refused(error.message)
    finally:
        os.close(root_fd)


def _refused_by_name(request: Settle, parts: tuple[str, ...]) -> str:
    if not parts:
        return "the root itself"
    if any(is_ours(part) for part in parts):
        return "our own temporary or trash"
    if not request.told and is_unfinished(parts[-1]):
        return "the name says unfinished"
    return ""


def _refused(why: str) -> Settlement:
    return Settlement(settled=False, reason=f"refused: {why}", retry_after_s=0.0, identity=None)


def _open(request: Settle, context: Context, root_fd: int, parts: tuple[str, ...]) -> _Look | Settlement:
    """Open what is there, once it is known to be a file or a directory: opening a device may act on it."""
    above = beneath.open_directory(root_fd, parts[:-1], one_mount=True)
    try:
        kind = os.stat(parts[-1], dir_fd=above, follow_symlinks=False).st_mode
        if stat.S_ISLNK(kind):
            return _refused("symlink")
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            return _refused("neither a file nor a directory")
        marker = "" if request.told else _marker(above, parts[-1])
        if marker:
            pause_s = _between(request.still_s, INCOMPLETE_RETRY_S)
            return Settlement(
                settled=False, reason=f"incomplete: {marker!r} marks it", retry_after_s=pause_s, identity=None
            )
        fd = os.open(parts[-1], beneath.READ | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    except BlockingIOError:  # somebody holds a write lease
        return Settlement(settled=False, reason="writer", retry_after_s=WRITER_RETRY_S[0], identity=None)
    finally:
        os.close(above)
    facts = os.fstat(fd)
    device = facts.st_dev
    if device != os.fstat(root_fd).st_dev:
        os.close(fd)
        return _refused("it lies on another file system")
    if request.owner_uid not in {None, facts.st_uid}:
        os.close(fd)
        return _refused("it belongs to another user than the one who handed it over")
    return _Look(request, context, fd, _is_remote(request.root, device))


def _marker(directory_fd: int, name: str) -> str:
    for marker in markers_of(name):
        try:
            os.stat(marker, dir_fd=directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        return marker
    return ""


def _is_named(look: _Look, root_fd: int, parts: tuple[str, ...]) -> bool:
    """Say whether the name still leads to what was looked at: another file may have been renamed over it."""
    fd = beneath.open_beneath(root_fd, parts, os.O_PATH)
    try:
        return os.path.sameopenfile(fd, look.fd)
    finally:
        os.close(fd)


@lru_cache(maxsize=64)
def _is_remote(root: str, _device: int) -> bool:
    """Say whether another host may write here unseen. The device is in the key: a root may be mounted over."""
    return mounts.find(root, mounts.read()).remote


def _settle(look: _Look) -> Settlement:
    request = look.request
    before = look.seen = look.identity()
    writer = look.writer()
    if writer is Writer.OPEN:
        return look.answer("writer", _between(_still_s(look), WRITER_RETRY_S))
    found = _examined(look, before, writer)
    if found.complete is False:
        return look.answer(f"incomplete: {found.problem}", _between(_still_s(look), INCOMPLETE_RETRY_S), found)
    proven = found.complete is True and writer is Writer.NONE and _is_end_marked(look, found)
    if not proven and not request.told and _still_s(look) < request.quiet_s:
        reason = "young" if request.last in (None, before) else "changing"
        return look.answer(reason, request.quiet_s - _still_s(look), found)
    checked = _checked(look, found, writer)
    if checked.complete is False:
        return look.answer(f"incomplete: {checked.problem}", _between(_still_s(look), INCOMPLETE_RETRY_S), checked)
    # Both looks are needed: one writer may have come after the probe, and gone before this one.
    if look.identity() != before:
        return look.answer("changing", request.quiet_s, found)
    if look.writer() is Writer.OPEN:
        return look.answer("writer", WRITER_RETRY_S[0], found)
    return Settlement(
        settled=True,
        reason=_reason(look, found, writer),
        retry_after_s=0.0,
        identity=before,
        format=found.format,
        step=found.step,
        epoch=found.epoch,
        metrics=found.metrics,
    )


def _reason(look: _Look, found: Inspected, writer: Writer) -> str:
    if look.request.told:
        return "told"
    if writer is Writer.UNKNOWN:
        return "quiet"
    if found.complete is None:
        return "lease"
    return "marker" if "marker" in found.extra else "structure"


def _still_s(look: _Look) -> float:
    return look.request.still_s if look.request.last == look.seen else 0.0


def _between(value_s: float, bounds_s: tuple[float, float]) -> float:
    return min(max(value_s, bounds_s[0]), bounds_s[1])


def _is_end_marked(look: _Look, found: Inspected) -> bool:
    """Say whether no further file can belong to it: always so for one file, rarely for a directory."""
    if look.files is None:
        return True
    if any(is_unfinished(member.path.rpartition("/")[2].lstrip(".")) for member in look.files):
        return False
    return found.format in _END_MARKED or "marker" in found.extra


def _checked(look: _Look, found: Inspected, writer: Writer) -> Inspected:
    """Compare the checksums that torch's zips hold: one rewritten in place is whole all the while."""
    names = [member.path for member in look.files] if look.files is not None else [look.request.path]
    if not any(formats.detect_file(name.rpartition("/")[2]) in _TORCH for name in names):
        return found
    if look.context.quick and look.seen is not None and look.seen.size_bytes > QUICK_BYTES_MAX:
        raise TakesLong
    return _examined(look, look.seen, writer, crc=True)


def _examined(look: _Look, seen: IdentityRecord | None, writer: Writer, *, crc: bool = False) -> Inspected:
    """Ask a parser child, or remember what it said of these very bytes.

    Only what is incomplete is remembered, and only where no writer can change bytes without
    changing the identity: a shared mapping may write for a while without touching the times.
    """
    path = look.request.path
    if seen is not None and (known := _remembered.get((path, seen))) is not None and writer is Writer.NONE:
        return known
    found = with_names(examine(Question(look.request.root, path, crc=crc), look.context), path)
    if found.complete is False and seen is not None and _still_s(look) >= _REMEMBER_AFTER_S:
        with _remembering:
            _remembered[path, seen] = msgspec.structs.replace(found, tensors=[], extra={})
            if len(_remembered) > _REMEMBERED_MAX:
                _remembered.popitem(last=False)
    return found
