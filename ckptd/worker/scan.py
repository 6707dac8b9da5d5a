"""The verb `scan`: everything under a root that is, or may become, a checkpoint.

The truth behind all hints: whatever events were lost, a scan finds what is there. It goes by open
directories, follows no link, stays on one device, and every limit that cuts it short is told.
"""

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ckptd.errors import BadPath, InvalidFormat
from ckptd.worker import beneath, formats
from ckptd.worker.context import Context
from ckptd.worker.formats.ckptd_dir import (
    LATE,
    LATE_BYTES_MAX,
    MANIFEST,
    MANIFEST_BYTES_MAX,
    STRIPPED,
    STRIPPED_BYTES_MAX,
    parse_late,
    parse_manifest,
    parse_stripped,
)
from ckptd.worker.formats.names import MARKER, is_unfinished, markers_of, step_of
from ckptd.worker.formats.source import Source
from ckptd.worker.mark import MARK_BYTES, mark
from ckptd.worker.members import identity, is_utf8, members
from ckptd.worker.protocol import Candidate, Candidates, IdentityRecord, Scan, Scanned

PART_CANDIDATES_MAX = 500
PART_BYTES_MAX = 4 << 20  # of manifests, as read; a larger one travels alone
DEPTH_MAX = 32
_BEAT_EVERY = 256
_FOREIGN = frozenset({"lost+found"})


def run(request: Scan, context: Context) -> Scanned:
    """Walk `root`, or what lies below `under` (relative or absolute); send Candidates, answer with the count.

    Every file is looked at; what lies there as a mark of `known` says is counted instead of told.
    What is no checkpoint for us (a link, a FIFO, a name that is no text) is skipped and counted.
    What may hide a known checkpoint (a limit, no permission) makes `complete` false as well, so that
    nobody takes "not found" for "gone". NotFound when the root is not there, BadPath when `under` leaves it.
    """
    names: tuple[str, ...] = ()
    if request.under.startswith("/"):
        names = beneath.parts_below(request.root, request.under)
    elif request.under:
        names = beneath.parts_of(request.under)
    walk = _Walk(request, context)
    root_fd = beneath.open_root(request.root)
    try:
        walk.start(root_fd, names)
    except _FullError:
        walk.cut(f"over {request.entries_max} entries")
    finally:
        os.close(root_fd)
    walk.flush()
    unmet = sorted(walk.known.values())
    return Scanned(walk.seen, not walk.problem, walk.problem, dict(walk.skipped), walk.device, walk.same, unmet)


class _FullError(Exception):
    """entries_max was reached."""


@dataclass(slots=True)
class _Listing:
    """What matters of one directory: of a million foreign files in it nothing is kept.

    files    regular files that are checkpoints by name, or tell something about their neighbours
    markers  "-unfinished" names of any kind
    """

    files: list[str] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    markers: set[str] = field(default_factory=set)

    def finished(self, names: list[str]) -> list[str]:
        """Return those of `names` that no marker is beside."""
        if not self.markers:
            return names
        return [name for name in names if self.markers.isdisjoint(markers_of(name))]


class _Walk:
    """One scan under way."""

    def __init__(self, request: Scan, context: Context) -> None:
        self.seen = 0
        self.problem = ""
        self.skipped: Counter[str] = Counter()
        self._request = request
        self._context = context
        self.device = 0
        self.same = 0
        # A later row of the same file takes the place of an earlier one, as in every look-up by path.
        known = request.known
        self.known = {
            known[start : start + MARK_BYTES]: start // MARK_BYTES for start in range(0, len(known), MARK_BYTES)
        }
        self._found: list[Candidate] = []
        self._found_bytes = 0

    def cut(self, why: str) -> None:
        """Remember the first reason why the answer is not everything."""
        self.problem = self.problem or why

    def start(self, root_fd: int, names: tuple[str, ...]) -> None:
        """Go down to the wanted directory, which may be only a part of a checkpoint above it, and walk it."""
        self.device = os.fstat(root_fd).st_dev
        fd, path = os.dup(root_fd), self._request.root.rstrip("/")
        try:
            for depth, name in enumerate(names):
                listing = self._list(fd)
                if depth and self._take_directory(fd, path, listing):
                    return
                if name not in listing.finished(listing.directories):
                    return
                below = self._enter(fd, f"{path}/{name}")
                if below is None:
                    return
                os.close(fd)
                fd, path = below, f"{path}/{name}"
            self._visit(fd, path, len(names))
        finally:
            os.close(fd)

    def _visit(self, fd: int, path: str, depth: int) -> None:
        listing = self._list(fd)
        if depth and self._take_directory(fd, path, listing):
            return
        if not self._request.managed:
            self._take_files(fd, path, listing)
        if depth >= DEPTH_MAX and listing.directories:
            self.skipped["too deep"] += len(listing.directories)
            self.cut(f"deeper than {DEPTH_MAX} directories at {path!r}")
            return
        for name in listing.finished(listing.directories):
            below = self._enter(fd, f"{path}/{name}")
            if below is not None:
                try:
                    self._visit(below, f"{path}/{name}", depth + 1)
                finally:
                    os.close(below)

    def _list(self, fd: int) -> _Listing:
        """List one directory. OSError becomes a cut: one bad directory does not end the scan."""
        listing = _Listing()
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    self._count()
                    self._sort(entry, listing)
        except OSError as error:
            self.skipped["unreadable"] += 1
            self.cut(f"a directory can't be listed: {error.strerror}")
        return listing

    def _count(self) -> None:
        self.seen += 1
        if self.seen > self._request.entries_max:
            raise _FullError
        if self.seen % _BEAT_EVERY == 0:
            self._context.alive()

    def _sort(self, entry: os.DirEntry[str], listing: _Listing) -> None:
        name = entry.name
        if not is_utf8(name):
            self.skipped["not UTF-8"] += 1
        elif entry.is_file(follow_symlinks=False):
            if name.endswith(MARKER):
                listing.markers.add(name)
            elif is_unfinished(name):
                self.skipped["unfinished"] += 1
            elif formats.tells(name):
                listing.files.append(name)
        elif entry.is_dir(follow_symlinks=False):
            if is_unfinished(name) or name in _FOREIGN:
                self.skipped["unfinished" if name[0] != "." else "hidden"] += 1
            else:
                listing.directories.append(name)
        elif entry.is_symlink():
            self.skipped["symlink"] += 1
            if name.endswith(MARKER):
                listing.markers.add(name)
        else:
            self.skipped["special"] += 1

    def _enter(self, fd: int, path: str) -> int | None:
        """Open a listed sub-directory by its last name; None when it is not to be walked."""
        try:
            below = os.open(path.rpartition("/")[2], beneath.DIRECTORY_FLAGS, dir_fd=fd)
        except (FileNotFoundError, NotADirectoryError):
            return None  # gone, or swapped for a link, since it was listed
        except OSError as error:
            self.skipped["unreadable"] += 1
            self.cut(f"{path!r}: {error.strerror}")
            return None
        if os.fstat(below).st_dev != self.device:
            self.skipped["other device"] += 1
            os.close(below)
            return None
        return below

    def _take_directory(self, fd: int, path: str, listing: _Listing) -> bool:
        """Report the directory when it is one checkpoint; then nothing in it is another."""
        name = path.rpartition("/")[2]
        manifest: dict[str, Any] | None = None
        late: dict[str, Any] | None = None
        stripped: list[str] = []
        found: str | None
        if self._request.managed:
            found = "ckptd" if MANIFEST in listing.files else None
        else:
            found = formats.detect_directory(name, listing.files, listing.directories)
        if found is None:
            return False
        try:
            files = members(fd)
        except BadPath as error:
            self.skipped["unreadable"] += 1
            self.cut(f"{path!r}: {error.message}")
            return True
        if not files:
            return True
        self.seen += len(files)
        if self._request.managed:
            manifest = self._manifest(fd)
            late = parse_late(self._whole(fd, LATE, LATE_BYTES_MAX) or b"") if LATE in listing.files else None
            stripped = self._stripped(fd, manifest) if STRIPPED in listing.files else []
        seen = identity(os.fstat(fd), files)
        if self._is_known(path, seen):
            return True
        self._add(Candidate(path, "directory", found, seen, step_of(name), manifest, late, stripped))
        return True

    def _stripped(self, fd: int, manifest: dict[str, Any] | None) -> list[str]:
        """Name the files that were taken out of it, and are not there."""
        named = parse_stripped(
            self._whole(fd, STRIPPED, STRIPPED_BYTES_MAX) or b"", (manifest or {}).get("checkpoint", "")
        )
        return [name for name in named if "/" not in name and not _is_there(fd, name)]

    def _manifest(self, fd: int) -> dict[str, Any] | None:
        """Read a manifest; None when it is none of ours: the candidate then says so."""
        raw = self._whole(fd, MANIFEST, MANIFEST_BYTES_MAX)
        try:
            return None if raw is None else parse_manifest(raw)
        except InvalidFormat:
            return None

    def _whole(self, fd: int, name: str, bytes_max: int) -> bytes | None:
        """Read a small file of ours; None when it is not there, not a file, or too large."""
        try:
            opened = beneath.open_file(fd, name)
        except (BadPath, FileNotFoundError, PermissionError):
            return None
        try:
            source = Source(opened)
            if source.size_bytes > bytes_max:
                return None
            raw = source.read(0, source.size_bytes)
        except InvalidFormat:
            return None
        finally:
            os.close(opened)
        self._found_bytes += len(raw)
        return raw

    def _take_files(self, fd: int, path: str, listing: _Listing) -> None:
        for name in listing.finished(listing.files):
            found = formats.detect_file(name)
            if found is None:
                continue
            try:
                facts = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if facts.st_nlink > 1 and facts.st_uid not in {os.geteuid(), os.fstat(fd).st_uid}:
                self.skipped["foreign link"] += 1  # somebody put another user's file here: it is not his to hand over
            elif stat.S_ISREG(facts.st_mode) and facts.st_dev == self.device:
                seen = identity(facts)
                if not self._is_known(f"{path}/{name}", seen):
                    self._add(Candidate(f"{path}/{name}", "file", found, seen, step_of(name)))

    def _is_known(self, path: str, seen: IdentityRecord) -> bool:
        """Say whether the daemon knows just this at `path`; then there is nothing to tell."""
        if not self.known or self.known.pop(mark(path, seen.ino, seen.size_bytes, seen.mtime_ns), None) is None:
            return False
        self.same += 1
        return True

    def _add(self, candidate: Candidate) -> None:
        self._found.append(candidate)
        if len(self._found) >= PART_CANDIDATES_MAX or self._found_bytes >= PART_BYTES_MAX:
            self.flush()

    def flush(self) -> None:
        """Send what was found since the last part."""
        if self._found:
            self._context.send_part(Candidates(self._found))
            self._found, self._found_bytes = [], 0


def _is_there(fd: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except (FileNotFoundError, ValueError):
        return False
    return True
