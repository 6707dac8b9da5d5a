"""Reading the files of a checkpoint from the disk, each digested while it is read.

One thread reads ahead with O_DIRECT into page-aligned memory (a read from the page cache would prove
nothing about the disk), a second one digests the same bytes; both release the GIL, so the cost is the
slower of the two. Two files go side by side, to use a second core and to keep the disk busy.
"""

import concurrent.futures
import ctypes
import errno
import hashlib
import mmap
import os
import queue
import threading
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from ckptd_client.control import PAGE, round_up
from ckptd_client.errors import CorruptCheckpoint, MissingPart
from ckptd_client.header import header_of, tensors_between

CHUNK_BYTES = 8 << 20
FILES_AT_ONCE = 2
DAMAGE_LINES_MAX = 8  # places named in one error

POPULATE_BYTES = 16 << 20  # the kernel's lock on the address space is given back between such pieces

_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14; before it pages are made as the read meets them
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class Order(NamedTuple):
    """What to read: files of the checkpoint at `path`, as its manifest lists them.

    verify  compare each with its SHA-256      map_only  map the files copy-on-write instead of reading them
    """

    path: str
    files: Sequence[Dict[str, Any]]
    verify: bool = True
    map_only: bool = False


def read_files(order: Order) -> Dict[str, mmap.mmap]:
    """Return the bytes of each file, in memory that may be written to without touching the disk.

    Blocks for as long as the slower of reading and digesting takes. MissingPart: a file is not there.
    CorruptCheckpoint: a file is shorter, longer or other than what was written.
    """
    for file in order.files:
        _check_name(order.path, file["path"])
    with concurrent.futures.ThreadPoolExecutor(FILES_AT_ONCE, "ckptd-read") as pool:
        found = [pool.submit(_read_file, order, file) for file in order.files]
        try:
            memories = [future.result() for future in found]
        finally:
            for future in found:
                future.cancel()
    return {file["path"]: memory for file, memory in zip(order.files, memories)}  # noqa: B905  # strict= came with Python 3.10


def is_intact(order: Order) -> bool:
    """Say whether every file of a checkpoint reads back with its SHA-256. Blocks for the whole of it."""
    try:
        for file in order.files:
            _read_file(order, file)
    except (CorruptCheckpoint, MissingPart, OSError):
        return False
    return True


def _check_name(path: str, name: str) -> None:
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise CorruptCheckpoint(path, name, "a file name that leads out of the checkpoint")


def _read_file(order: Order, file: Dict[str, Any]) -> mmap.mmap:
    if order.verify and not file.get("sha256"):
        raise MissingPart(f"{order.path} has no digest of {file['path']} to verify", file["path"], order.path)
    full, size = os.path.join(order.path, file["path"]), int(file["size_bytes"])
    try:
        fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MissingPart(f"{full} is not there", file["path"], order.path) from error
    try:
        actual = os.fstat(fd).st_size
        if actual != size:
            raise CorruptCheckpoint(order.path, file["path"], _size_detail(fd, actual, size))
        digest = hashlib.sha256() if order.verify else None
        if order.map_only:
            memory = _map(fd, size)
            if digest is not None:
                digest.update(memoryview(memory)[:size])
        else:
            memory = _memory(size)
            _fill(full, memoryview(memory), size, digest)
    finally:
        os.close(fd)
    if digest is not None and digest.hexdigest() != file.get("sha256"):
        raise CorruptCheckpoint(order.path, file["path"], damage(memoryview(memory)[:size], file))
    return memory


def _map(fd: int, size: int) -> mmap.mmap:
    if size == 0:
        return _memory(0)
    return mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)


def _memory(size: int) -> mmap.mmap:
    """Return zeroed private memory of whole pages, huge ones where the system gives them."""
    memory = mmap.mmap(-1, max(round_up(size), PAGE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(_MADV_HUGEPAGE)
    except (AttributeError, OSError):
        return memory  # a kernel without huge pages: small ones do
    return memory


def _fill(path: str, buffer: memoryview, size: int, digest: Any) -> None:
    """Read `size` bytes of a file into `buffer`; with a digest, feed it from a second thread.

    A third one makes the memory ahead of the reading: the first touch of fresh memory costs 50 ms/GB
    at best and 500 in a virtual machine whose host has to find it, and must not stand in the read's way.
    """
    maker = threading.Thread(target=_populate, args=(buffer,), name="ckptd-populate")
    maker.start()
    try:
        if digest is None:
            for _ in _chunks(path, buffer, size):
                pass
        else:
            _read_and_digest(path, buffer, size, digest)
    finally:
        maker.join()


def _populate(buffer: memoryview) -> None:
    at, end = (address := ctypes.addressof(ctypes.c_char.from_buffer(buffer))), address + len(buffer)
    while at < end and _libc.madvise(at, min(POPULATE_BYTES, end - at), _MADV_POPULATE_WRITE) == 0:
        at += POPULATE_BYTES


def _read_and_digest(path: str, buffer: memoryview, size: int, digest: Any) -> None:
    done: queue.SimpleQueue[Optional[memoryview]] = queue.SimpleQueue()

    def feed() -> None:
        while (chunk := done.get()) is not None:
            digest.update(chunk)

    # not daemonic and always joined: the queue ends with None however the reading ends
    feeder = threading.Thread(target=feed, name="ckptd-digest")
    feeder.start()
    try:
        for chunk in _chunks(path, buffer, size):
            done.put(chunk)
    finally:
        done.put(None)
        feeder.join()


def _chunks(path: str, buffer: memoryview, size: int) -> Any:
    """Read a file chunk by chunk and give each as it is there; past the page cache where that is possible."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    fd = _open_direct(path, flags)
    is_direct = fd >= 0
    if not is_direct:
        fd = os.open(path, flags)
    try:
        at = 0
        while at < size:
            # O_DIRECT wants whole pages: the last read asks for more than there is
            end = min(at + CHUNK_BYTES, round_up(size))
            try:
                count = os.preadv(fd, [buffer[at:end]], at)
            except OSError as error:
                if not is_direct or error.errno != errno.EINVAL:
                    raise
                os.close(fd)  # opened but can't read so: overlay and FUSE file systems do this
                fd, is_direct = os.open(path, flags), False
                continue
            if count == 0:
                break  # cut off while being read: the digest will tell
            yield buffer[at : min(at + count, size)]
            at += count
            if is_direct and at % PAGE and at < size:
                os.close(fd)
                fd, is_direct = os.open(path, flags), False
    finally:
        os.close(fd)


def _open_direct(path: str, flags: int) -> int:
    if not _O_DIRECT:
        return -1
    try:
        return os.open(path, flags | _O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return -1


def _size_detail(fd: int, actual: int, size: int) -> str:
    """Say what a file of the wrong size has lost."""
    detail = f"{actual} bytes instead of {size}"
    head = os.pread(fd, 8, 0)
    length = int.from_bytes(head, "little") if len(head) == len(b"12345678") else 0
    if 0 < length <= min(actual, CHUNK_BYTES * 2):
        lost = tensors_between(header_of(os.pread(fd, 8 + length, 0)), actual, size)
        if lost:
            detail += ", cut off: " + ", ".join(lost[:DAMAGE_LINES_MAX])
    return detail


def damage(data: memoryview, file: Dict[str, Any]) -> str:
    """Say where bytes differ from what was written, as closely as the manifest's damage map allows.

    The map is one xxh3-64 for each MiB; it can be read only where the caller has xxhash installed.
    """
    detail = "its SHA-256 is another than when it was written"
    wanted = file.get("xxh3")
    if not wanted:
        return detail
    try:
        import xxhash
    except ImportError:
        return detail
    header = header_of(data)
    places: List[str] = []
    for index, value in enumerate(wanted):
        start = index << 20
        found = xxhash.xxh3_64(data[start : start + (1 << 20)])
        if value not in (found.hexdigest(), found.intdigest()):
            names = tensors_between(header, start, start + (1 << 20))
            places.append(f"MiB {index}" + (f" ({', '.join(names[:DAMAGE_LINES_MAX])})" if names else ""))
    return f"{detail}; {', '.join(places[:DAMAGE_LINES_MAX])}" if places else detail
