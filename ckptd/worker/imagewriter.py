"""An arena's files to disk: written from where they lie while a second thread digests the same bytes.

The disk and SHA-256 run side by side, so the slower of the two is the cost. O_DIRECT keeps the
page cache for the training's data and costs a tenth of a buffered write's processor time.
"""

import errno
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

from ckptd import failpoint
from ckptd.worker import beneath, kernel
from ckptd.worker.context import Context
from ckptd.worker.fsync import await_writeback, fsync_directory, fsync_file, start_writeback
from ckptd.worker.hashing import MIB, FileDigest, HashThread, read_into
from ckptd.worker.image import BLOCK, Image
from ckptd.worker.protocol import FileImage, FileRecord

WRITE_BYTES = 16 * MIB  # one O_DIRECT write; larger ones gain nothing
DIRECT_BYTES_MIN = 1 * MIB  # below this a file is written through the cache: one call, flushed with its batch
BATCH_FILES_MAX = 128  # files written before they are fsynced together; each holds a descriptor
SPAN_BYTES = 16 * MIB  # digested between two looks at whether it is still wanted
SPARE_SPAN_BYTES = 1 * MIB  # half a millisecond: what may be waited for at the lowest priority
LOWEST_PRIORITY = 19
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL
_NO_DIRECT = errno.EINVAL  # the file system has no O_DIRECT, or wants another alignment


@dataclass(slots=True)
class Written:
    """What writing an image took. `direct`: O_DIRECT was used wherever a file is large enough."""

    records: list[FileRecord] = field(default_factory=list)
    write_s: float = 0.0
    hash_s: float = 0.0
    cpu_s: float = 0.0
    direct: bool = True


class ImageWriter:
    """Writes the files of one image into one directory. One use."""

    def __init__(self, image: Image, files: Sequence[FileImage], directory_fd: int, context: Context) -> None:
        """Keep what is needed; nothing is written before run()."""
        self._image = image
        self._files = files
        self._directory_fd = directory_fd
        self._context = context
        self._written = Written()

    def run(self) -> Written:
        """Write and fsync every file; on return their bytes are durable, their names not yet.

        FsyncFailed  the bytes are lost: start again in another directory
        Cancelled    the daemon no longer wants it
        OSError      the disk's answer
        """
        if self._image.mapped:
            with _Digests(self._image, self._files, self._context) as digests:
                self._write_all(None)
            self._written.records = digests.records()
            self._written.hash_s, self._written.cpu_s = digests.hash_s, self._written.cpu_s + digests.cpu_s
        else:
            taken: list[FileDigest] = []
            with HashThread() as hasher:
                self._write_all((hasher, taken))
            self._written.records = [d.record(f.path) for d, f in zip(taken, self._files, strict=True)]
            self._written.hash_s = hasher.cpu_s
            self._written.cpu_s += hasher.cpu_s
        return self._written

    def _write_all(self, streamed: tuple[HashThread, list[FileDigest]] | None) -> None:
        started_s, cpu_s = time.monotonic(), time.thread_time()
        self._make_directories()
        for first in range(0, len(self._files), BATCH_FILES_MAX):
            with ExitStack() as stack:
                # The descriptor that wrote is the one that is asked by fsync: an error of the
                # writeback in between is told to those that were open when it happened.
                batch = []
                for file in self._files[first : first + BATCH_FILES_MAX]:
                    output = Output.create(self._directory_fd, file)
                    stack.callback(output.close)
                    self._write(file, output, streamed)
                    batch.append(output)
                for output in batch:
                    fsync_file(output.fd, "copy.fsynced")
                    self._context.alive()
                    self._written.direct &= not output.refused
        self._sync_directories()
        self._written.write_s = time.monotonic() - started_s
        self._written.cpu_s += time.thread_time() - cpu_s

    def _write(self, file: FileImage, output: "Output", streamed: tuple[HashThread, list[FileDigest]] | None) -> None:
        if streamed is None:
            for offset in range(0, file.size_bytes, WRITE_BYTES):
                self._context.alive()
                size_bytes = min(WRITE_BYTES, file.size_bytes - offset)
                output.write(self._image.view(file.offset + offset, size_bytes), offset)
                failpoint.hit("copy.chunk")
        else:
            hasher, taken = streamed
            digest = FileDigest()
            taken.append(digest)

            def read(buffer: memoryview, offset: int) -> int:
                return self._image.read(buffer, file.offset + offset)

            for buffer, offset, size_bytes in read_into(read, file.size_bytes, hasher, digest):
                self._context.alive()
                output.write(buffer[:size_bytes], offset)
                failpoint.hit("copy.chunk")
        output.finish()

    def _directories(self) -> list[tuple[str, ...]]:
        found = {beneath.parts_of(file.path)[:-1] for file in self._files}
        return sorted({parts[:n] for parts in found for n in range(1, len(parts) + 1)})

    def _make_directories(self) -> None:
        for parts in self._directories():
            at = beneath.open_directory(self._directory_fd, parts[:-1])
            try:
                os.mkdir(parts[-1], dir_fd=at)
            finally:
                os.close(at)

    def _sync_directories(self) -> None:
        for parts in reversed(self._directories()):
            at = beneath.open_directory(self._directory_fd, parts)
            try:
                fsync_directory(at)
            finally:
                os.close(at)


class _Digests:
    """Threads that digest a mapped image's files while they are written.

    The first takes the largest files. The second, from the other end, has the lowest priority there is:
    it uses a core that nobody wants, and under a busy training it would hold the publish up with one
    chunk. So when the first has nothing left to take, it takes over what the second has begun.
    Leaving the block waits for both, or stops them when the block failed.
    """

    def __init__(self, image: Image, files: Sequence[FileImage], context: Context) -> None:
        self._image, self._files, self._context = image, files, context
        self._digests = [FileDigest() for _ in files]
        several = len(files) > 1 and len(os.sched_getaffinity(0)) > 1
        # Alone it follows the writer, which makes the pages ready before it.
        order = sorted(range(len(files)), key=lambda i: -files[i].size_bytes) if several else range(len(files))
        self._todo = deque(order)
        self._free = threading.Condition()
        self._spare_is_at_work = False
        self._first_is_idle = False
        self._stop = False
        self._error: BaseException | None = None
        jobs = [self._first, self._spare] if several else [self._first]
        self._threads = [threading.Thread(target=self._run, args=(job,), name="hash", daemon=True) for job in jobs]
        self.hash_s = self.cpu_s = 0.0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._end()
        for thread in self._threads:
            thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def records(self) -> list[FileRecord]:
        return [digest.record(file.path) for digest, file in zip(self._digests, self._files, strict=True)]

    def _end(self) -> None:
        with self._free:
            self._stop = True
            self._free.notify_all()

    def _run(self, job: Callable[[], None]) -> None:
        started_s = time.monotonic()
        try:
            job()
        except BaseException as error:  # noqa: ASYNC103, BLE001  raised again in the caller's thread
            self._error = error
            self._end()
        with self._free:
            self.hash_s = max(self.hash_s, time.monotonic() - started_s)
            self.cpu_s += time.thread_time()

    def _first(self) -> None:
        while (index := self._next()) is not None:
            self._digest(index, SPAN_BYTES, lambda: self._stop)

    def _next(self) -> int | None:
        """The largest file left; when none is, what the second thread lets go of at its next chunk."""
        with self._free:
            self._first_is_idle = not self._todo
            self._free.wait_for(lambda: bool(self._todo) or self._stop or not self._spare_is_at_work)
            self._first_is_idle = False
            return self._todo.popleft() if self._todo and not self._stop else None

    def _spare(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        while True:
            with self._free:
                if self._stop or not self._todo:
                    return
                index = self._todo.pop()
                self._spare_is_at_work = True
            try:
                self._digest(index, SPARE_SPAN_BYTES, lambda: self._stop or self._first_is_idle)
            finally:
                with self._free:
                    begun = self._digests[index].size_bytes < self._files[index].size_bytes
                    if begun:
                        self._todo.append(index)
                    self._spare_is_at_work = False
                    self._free.notify_all()
            if begun:
                return  # the first thread goes on with it

    def _digest(self, index: int, span_bytes: int, enough: Callable[[], bool]) -> None:
        """Go on with a file's digest where it stands, to its end or until it is `enough`."""
        file, digest = self._files[index], self._digests[index]
        for offset in range(digest.size_bytes, file.size_bytes, span_bytes):
            if enough():
                return
            self._context.alive()
            digest.update(self._image.view(file.offset + offset, min(span_bytes, file.size_bytes - offset)))


@dataclass(slots=True)
class Output:
    """One file being written.

    direct   the descriptor is under O_DIRECT now
    refused  the file system would not have it so, and the page cache was used instead
    """

    fd: int
    size_bytes: int
    direct: bool
    refused: bool = False

    @classmethod
    def create(cls, directory_fd: int, file: FileImage) -> "Output":
        """Make the file, which must not exist, and reserve its space: a full disk shows before the copy."""
        parts = beneath.parts_of(file.path)
        direct = file.size_bytes >= DIRECT_BYTES_MIN
        fd = -1
        if direct:
            try:
                fd = beneath.open_beneath(directory_fd, parts, _CREATE | os.O_DIRECT, mode=0o666)
            except OSError as error:
                if error.errno != _NO_DIRECT:
                    raise
        if fd < 0:
            # The refusal comes after the file was made, so it is there already.
            flags = _CREATE & ~os.O_EXCL if direct else _CREATE
            fd = beneath.open_beneath(directory_fd, parts, flags, mode=0o666)
            output = cls(fd, file.size_bytes, direct=False, refused=direct)
        else:
            output = cls(fd, file.size_bytes, direct=True)
        try:
            if file.size_bytes >= DIRECT_BYTES_MIN:
                kernel.fallocate(fd, file.size_bytes)
            failpoint.hit("copy.allocated")
        except BaseException:
            output.close()
            raise
        return output

    def write(self, view: memoryview, offset: int) -> None:
        """Write a chunk; only a file's last one may end off a block."""
        whole = len(view) - len(view) % BLOCK if self.direct else 0
        done = self._write_direct(view[:whole], offset)
        if done < len(view):
            self._write_buffered(view[done:], offset + done)

    def _write_direct(self, view: memoryview, offset: int) -> int:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self.fd, view[done:], offset + done)
            except OSError as error:
                if error.errno != _NO_DIRECT:
                    raise
                self.refused = True
                break
            if done % BLOCK:  # a short write off the blocks' edges: only the cache can go on from here
                break
        return done

    def _write_buffered(self, view: memoryview, offset: int) -> None:
        if self.direct:
            self._leave_direct()
        done = 0
        while done < len(view):
            done += os.pwrite(self.fd, view[done:], offset + done)
        # Writeback starts at once, and the chunk before is awaited and dropped: at most two chunks
        # of dirty pages, so that fsync has little left to do and the cache is left to others.
        start_writeback(self.fd, offset, len(view))
        if before := min(offset, WRITE_BYTES):
            await_writeback(self.fd, offset - before, before)
            os.posix_fadvise(self.fd, offset - before, before, os.POSIX_FADV_DONTNEED)

    def _leave_direct(self) -> None:
        """Go on through the page cache; the kernel keeps the two ways coherent at page borders."""
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.direct = False

    def finish(self) -> None:
        """Set the exact size, wherever reserving space or a fallback left it."""
        if os.fstat(self.fd).st_size != self.size_bytes:
            os.ftruncate(self.fd, self.size_bytes)

    def close(self) -> None:
        """Close the file; what close could report, fsync has reported."""
        os.close(self.fd)
