"""Read back from the disk, not from memory, and compare: which file, which MiB, which tensor."""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from ckptd import failpoint
from ckptd.errors import BadPath, SourceChanged
from ckptd.worker import beneath
from ckptd.worker.context import Context
from ckptd.worker.formats.ckptd_dir import MANIFEST, MANIFEST_BYTES_MAX
from ckptd.worker.hashing import MIB, FileDigest, HashThread, read_into
from ckptd.worker.protocol import DamageRecord, FileRecord, Verified, Verify

HEADER_BYTES_MAX = 16 * MIB  # of a safetensors file; a larger one is not parsed to name tensors
NAMED_MAX = 100  # damaged MiB and tensors listed for one file
SHOWN_DIGITS = 16  # of a digest, in words

Kind = Literal["missing", "size", "digest", "unreadable", "format"]
_BAD_SECTOR = frozenset({errno.EIO, errno.EREMOTEIO, errno.EILSEQ, errno.EBADMSG, errno.EUCLEAN})


def run(request: Verify, context: Context) -> Verified:
    """Compare `path` with its records. Files that no record names are no damage.

    Damage is an answer, not an error: a missing path is damage of all its files.
    SourceChanged  a file was written to while it was read
    """
    started_s = time.monotonic()
    parts = beneath.parts_below(request.root, request.path)
    for record in request.files:
        if record.path:
            beneath.parts_of(record.path)
    root_fd = beneath.open_root(request.root)
    try:
        checks = _read_all(root_fd, parts, request.files, context)
        damage = [found for found in (check.damage() for check in checks) if found is not None]
        if request.manifest_sha256 and any(check.kind != "missing" for check in checks):
            damage += _manifest_damage(root_fd, (*parts, MANIFEST), request.manifest_sha256)
    finally:
        os.close(root_fd)
    read_bytes = sum(check.digest.size_bytes for check in checks)
    return Verified(damage, read_bytes, (time.monotonic() - started_s) * 1e3)


@dataclass(slots=True)
class _Check:
    """One file's verdict, known once the hash thread is done."""

    record: FileRecord
    digest: FileDigest = field(default_factory=FileDigest)
    kind: Kind | None = None  # what was found before any digest
    detail: str = ""
    bad_mib: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, str]] = field(default_factory=list)  # (start, end, tensor) in bytes of the file

    def damage(self) -> DamageRecord | None:
        """Return what is wrong, None when nothing is."""
        if self.kind in {"missing", "size", "format"}:
            return DamageRecord(self.record.path, str(self.kind), self.detail)
        found = self.digest.record(self.record.path)
        mib = self.bad_mib
        if self.kind is None:
            if found.sha256 == self.record.sha256:
                return None
            mib = [i for i, (a, b) in enumerate(zip(found.xxh3, self.record.xxh3, strict=False)) if a != b]
        tensors = [name for start, end, name in self.spans if _touches(start, end, mib)]
        sha256 = f"sha256 {found.sha256[:SHOWN_DIGITS]}…, recorded was {self.record.sha256[:SHOWN_DIGITS]}…"
        detail = self.detail or f"{len(mib)} of {len(found.xxh3)} MiB differ; {sha256}"
        return DamageRecord(
            self.record.path, self.kind or "digest", detail, mib=mib[:NAMED_MAX], tensors=tensors[:NAMED_MAX]
        )


def _touches(start: int, end: int, mib: list[int]) -> bool:
    return any(start < (each + 1) * MIB and end > each * MIB for each in mib)


def _read_all(root_fd: int, parts: tuple[str, ...], files: list[FileRecord], context: Context) -> list[_Check]:
    checks = [_Check(record) for record in files]
    with HashThread() as hasher:
        for check in checks:
            context.alive()
            below = (*parts, *beneath.parts_of(check.record.path)) if check.record.path else parts
            _read_one(root_fd, below, check, (hasher, context.alive))
            failpoint.hit("verify.read")
    for check in checks:
        # Headers are looked at only where damage needs a name, and after all reading is done.
        if check.kind == "unreadable" or (check.kind is None and check.damage() is not None):
            below = (*parts, *beneath.parts_of(check.record.path)) if check.record.path else parts
            check.spans = _tensor_spans(root_fd, below)
    return checks


def _read_one(
    root_fd: int, parts: tuple[str, ...], check: _Check, tools: tuple[HashThread, Callable[[], None]]
) -> None:
    try:
        source = _Source.open(root_fd, parts)
    except (FileNotFoundError, NotADirectoryError):
        check.kind, check.detail = "missing", "not there"
        return
    except BadPath as error:
        check.kind, check.detail = "format", error.message
        return
    try:
        before = os.fstat(source.fd)
        if before.st_size != check.record.size_bytes:
            check.kind = "size"
            check.detail = f"{before.st_size} bytes, recorded were {check.record.size_bytes}"
            return
        hasher, alive = tools
        for _ in read_into(source.read, before.st_size, hasher, check.digest):
            alive()
        after = os.fstat(source.fd)
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise SourceChanged(f"{check.record.path or parts[-1]!r} was written to while it was verified")
        if source.unreadable:
            check.kind, check.bad_mib = "unreadable", source.unreadable
            check.detail = f"the disk could not read {len(source.unreadable)} MiB"
    finally:
        os.close(source.fd)


def _manifest_damage(root_fd: int, parts: tuple[str, ...], sha256: str) -> list[DamageRecord]:
    """Compare the manifest: without it the catalog could not be made again from the disk."""
    try:
        source = _Source.open(root_fd, parts)
    except (FileNotFoundError, BadPath) as error:
        return [DamageRecord(MANIFEST, "format", f"no readable file: {error}")]
    try:
        size_bytes = os.fstat(source.fd).st_size
        if size_bytes > MANIFEST_BYTES_MAX:
            return [DamageRecord(MANIFEST, "size", f"{size_bytes} bytes, {MANIFEST_BYTES_MAX} at most")]
        digest = FileDigest()
        with HashThread() as hasher:
            for _ in read_into(source.read, size_bytes, hasher, digest):
                pass
        if digest.record(MANIFEST).sha256 == sha256:
            return []
        mib = list(range(-(-size_bytes // MIB)))[:NAMED_MAX]  # it has no damage map of its own
        return [DamageRecord(MANIFEST, "digest", f"its {size_bytes} bytes are not those that were written", mib=mib)]
    finally:
        os.close(source.fd)


@dataclass(slots=True)
class _Source:
    """A file that is read past the page cache. `unreadable` lists the MiB that the disk refused."""

    fd: int
    direct: bool
    unreadable: list[int] = field(default_factory=list)

    @classmethod
    def open(cls, root_fd: int, parts: tuple[str, ...]) -> "_Source":
        """Open under O_DIRECT where the file system has it."""
        try:
            fd, direct = beneath.open_beneath(root_fd, parts, beneath.READ | os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd, direct = beneath.open_beneath(root_fd, parts, beneath.READ), False
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise BadPath("not a regular file")
        return cls(fd, direct)

    def read(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer from the disk. MiB that can't be read become zeros, and are noted."""
        try:
            return self._once(buffer, offset)
        except OSError as error:
            if error.errno not in _BAD_SECTOR:
                raise
        got = 0
        for start in range(0, len(buffer), MIB):
            part = buffer[start : start + MIB]
            try:
                size_bytes = self._once(part, offset + start)
            except OSError as error:
                if error.errno not in _BAD_SECTOR:
                    raise
                size_bytes = min(len(part), max(0, os.fstat(self.fd).st_size - offset - start))
                part[:size_bytes] = bytes(size_bytes)
                if size_bytes:
                    self.unreadable.append((offset + start) // MIB)
            got += size_bytes
            if size_bytes < len(part):
                break
        return got

    def _once(self, buffer: memoryview, offset: int) -> int:
        if self.direct:
            try:
                return os.preadv(self.fd, [buffer], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._leave_direct()
        # Clean pages are dropped before the read, so that the bytes come from the disk.
        os.posix_fadvise(self.fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        got = os.preadv(self.fd, [buffer], offset)
        os.posix_fadvise(self.fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        return got

    def _leave_direct(self) -> None:
        """O_DIRECT opened but does not read (some FUSE and network file systems)."""
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.direct = False


class _Entry(msgspec.Struct):
    data_offsets: tuple[int, int] | None = None


def _tensor_spans(root_fd: int, parts: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """Where each tensor of a safetensors file lies; nothing when its header can't be read any more."""
    if not parts or not parts[-1].endswith(".safetensors"):
        return []
    try:
        fd = beneath.open_beneath(root_fd, parts, beneath.READ)
    except OSError:
        return []
    try:
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        if length > HEADER_BYTES_MAX:
            return []
        header = msgspec.json.decode(os.pread(fd, length, 8), type=dict[str, _Entry])
    except (OSError, msgspec.DecodeError, RecursionError):
        return []
    finally:
        os.close(fd)
    start = 8 + length
    return [
        (start + entry.data_offsets[0], start + entry.data_offsets[1], name)
        for name, entry in header.items()
        if entry.data_offsets is not None
    ]
