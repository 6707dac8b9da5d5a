"""Runs real code on a real directory and writes down every call that changes it, with the bytes.

The functions of `os` and of ckptd's kernel.py are replaced while the block runs; each does what it did
before and then notes it, if it was about the recorded directory. A run can be killed before its n-th
change (nothing that unwinds it afterwards changes anything, as after SIGKILL) or its n-th fsync can fail.
"""

import errno
import os
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from ckptd.worker import fsync, kernel
from tests.model.extent import Extent
from tests.model.log import ROOT, Drop, Link, Log, Make, Move, Op, Resize, Say, Slot, Start, Swap, Sync, Write

_CODE = (f"{os.sep}ckptd{os.sep}", f"{os.sep}ckptd_client{os.sep}")
_CREATE = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}


class Killed(BaseException):
    """The process ended here."""


class Recorder:
    """One directory's changes. `kill_at`, `fail_at`: how many more changes or fsyncs succeed.

    randoms  temporary names are numbered, the same in every run, from here on
    """

    def __init__(self, root: Path, randoms: int = 0) -> None:
        self.root = root
        self.aside = Path(f"{root}.aside")  # for what the run needs beside the directory that is recorded
        self.ops: list[Op] = []
        self.kill_at: int | None = None
        self.fail_at: int | None = None
        self._dead = False
        self._nodes: dict[tuple[int, int], int] = {}
        self._last = ROOT
        self._sites: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._randoms = randoms
        self.start = self._scan()

    def log(self, cuts_from: int = 0) -> Log:
        """Everything so far."""
        return Log(self.start, tuple(self.ops), cuts_from)

    def say(self, what: str, fact: Any = None) -> None:
        """Note a promise. A dead process promises nothing."""
        with self._lock:
            self._may_go_on()
            self.ops.append(Say(what, fact))

    def next_life(self) -> None:
        """The process was killed, or ended; another one goes on in the same directory."""
        self._dead = False
        self.kill_at = None
        self.same_life()
        fsync._failed.clear()

    def same_life(self) -> None:
        """The same process is asked again."""
        self.fail_at = None
        self._sites.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note what happens inside."""
        with mock.patch.multiple(os, **self._os()), mock.patch.multiple(kernel, **self._kernel()):
            yield

    # -- the replaced functions ----------------------------------------------------------------------

    def _os(self) -> dict[str, Callable[..., Any]]:
        real_urandom = os.urandom

        def urandom(size: int) -> bytes:
            if not self._ours_is_calling():
                return real_urandom(size)
            self._randoms += 1
            return self._randoms.to_bytes(size, "big")

        return {
            "mkdir": self._named(os.mkdir),
            "symlink": self._symlink(os.symlink),
            "unlink": self._removing(os.unlink),
            "rmdir": self._removing(os.rmdir),
            "rename": self._renaming(os.rename),
            "link": self._linking(os.link),
            "open": self._opening(os.open),
            "write": self._writing(os.write),
            "pwrite": self._writing(os.pwrite),
            "ftruncate": self._resizing(os.ftruncate),
            "posix_fallocate": self._allocating(os.posix_fallocate),
            "fsync": self._syncing(os.fsync),
            "urandom": urandom,
        }

    def _kernel(self) -> dict[str, Callable[..., Any]]:
        real_openat2, real_rename, real_fallocate = kernel.openat2, kernel.renameat2, kernel.fallocate

        def openat2(directory: int, path: str, flags: int, *, mode: int = 0, resolve: int) -> int:
            def call() -> int:
                return real_openat2(directory, path, flags, mode=mode, resolve=resolve)

            return self._open(call, path, flags, directory)

        def renameat2(old: tuple[int, str], new: tuple[int, str], flags: int) -> None:
            here, there = self._slot(old[1], old[0]), self._slot(new[1], new[0])
            if here is None or there is None:
                return real_rename(old, new, flags)
            with self._change():
                node = self._node_at(old[1], old[0])
                other = self._node_at(new[1], new[0]) if flags == kernel.RENAME_EXCHANGE else None
                real_rename(old, new, flags)
                self.ops.append(Swap(here, there, (other, node)) if other is not None else Move(here, there, node))
            return None

        def fallocate(fd: int, size_bytes: int) -> bool:
            node = self._node_of(fd)
            if node is None:
                return real_fallocate(fd, size_bytes)
            with self._change():
                done = real_fallocate(fd, size_bytes)
                if done:
                    self.ops.append(Resize(node, os.fstat(fd).st_size))
                return done

        return {"openat2": openat2, "renameat2": renameat2, "fallocate": fallocate}

    def _named(self, real: Callable[..., None]) -> Callable[..., None]:
        def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            slot = self._slot(path, dir_fd)
            if slot is None:
                return real(path, mode, dir_fd=dir_fd)
            with self._change():
                real(path, mode, dir_fd=dir_fd)
                self.ops.append(Make(slot, self._new(path, dir_fd), "directory"))
            return None

        return mkdir

    def _symlink(self, real: Callable[..., None]) -> Callable[..., None]:
        def symlink(target: Any, path: Any, *, dir_fd: int | None = None) -> None:
            slot = self._slot(path, dir_fd)
            if slot is None:
                return real(target, path, dir_fd=dir_fd)
            with self._change():
                real(target, path, dir_fd=dir_fd)
                self.ops.append(Make(slot, self._new(path, dir_fd), "symlink", os.fsdecode(target)))
            return None

        return symlink

    def _removing(self, real: Callable[..., None]) -> Callable[..., None]:
        def remove(path: Any, *, dir_fd: int | None = None) -> None:
            slot = self._slot(path, dir_fd)
            if slot is None:
                return real(path, dir_fd=dir_fd)
            with self._change():
                try:
                    node = self._node_at(path, dir_fd)
                except FileNotFoundError:
                    return real(path, dir_fd=dir_fd)
                real(path, dir_fd=dir_fd)
                self.ops.append(Drop(slot, node))
            return None

        return remove

    def _renaming(self, real: Callable[..., None]) -> Callable[..., None]:
        def rename(old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
            here, there = self._slot(old, src_dir_fd), self._slot(new, dst_dir_fd)
            if here is None or there is None:
                return real(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            with self._change():
                node = self._node_at(old, src_dir_fd)
                real(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
                self.ops.append(Move(here, there, node))
            return None

        return rename

    def _linking(self, real: Callable[..., None]) -> Callable[..., None]:
        def link(old: Any, new: Any, **more: Any) -> None:
            slot = self._slot(new, more.get("dst_dir_fd"))
            if slot is None:
                return real(old, new, **more)
            with self._change():
                node = self._node_at(old, more.get("src_dir_fd"))
                real(old, new, **more)
                self.ops.append(Link(slot, node))
            return None

        return link

    def _opening(self, real: Callable[..., int]) -> Callable[..., int]:
        def opening(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            return self._open(lambda: real(path, flags, mode, dir_fd=dir_fd), path, flags, dir_fd)

        return opening

    def _open(self, call: Callable[[], int], path: Any, flags: int, dir_fd: int | None) -> int:
        slot = self._slot(path, dir_fd) if flags & (os.O_CREAT | os.O_TRUNC) else None
        if slot is None:
            return call()
        with self._change():
            before = self._exists(path, dir_fd)
            try:
                fd = call()
            except OSError:
                if not before and self._exists(path, dir_fd):  # O_DIRECT is refused after the file was made
                    self.ops.append(Make(slot, self._new(path, dir_fd), "file"))
                raise
            if not before:
                self.ops.append(Make(slot, self._new(path, dir_fd), "file"))
            elif flags & os.O_TRUNC:
                self.ops.append(Resize(self._node_at(path, dir_fd), 0))
            return fd

    def _writing(self, real: Callable[..., int]) -> Callable[..., int]:
        def write(fd: int, data: Any, *offset: int) -> int:
            node = self._node_of(fd)
            if node is None:
                return real(fd, data, *offset)
            with self._change():
                at = offset[0] if offset else os.lseek(fd, 0, os.SEEK_CUR)
                done = real(fd, data, *offset)
                self.ops.append(Write(node, at, bytes(memoryview(data)[:done])))
                return done

        return write

    def _resizing(self, real: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def ftruncate(fd: int, length: int) -> None:
            node = self._node_of(fd)
            if node is None:
                return real(fd, length)
            with self._change():
                real(fd, length)
                self.ops.append(Resize(node, length))
            return None

        return ftruncate

    def _allocating(self, real: Callable[..., None]) -> Callable[..., None]:
        def posix_fallocate(fd: int, offset: int, length: int) -> None:
            node = self._node_of(fd)
            if node is None:
                return real(fd, offset, length)
            with self._change():
                real(fd, offset, length)
                self.ops.append(Resize(node, os.fstat(fd).st_size))
            return None

        return posix_fallocate

    def _syncing(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(fd: int) -> None:
            node = self._node_of(fd)
            if node is None:
                return real(fd)
            self._notice(node, fd)
            with self._change():
                site = self._site(sys._getframe(1))
                failed = self.fail_at == 0
                self.fail_at = None if self.fail_at is None or failed else self.fail_at - 1
                self.ops.append(Sync(node, site, failed))
                if failed:
                    raise OSError(errno.EIO, "fsync fails, as told")
            return None

        return fsync

    def _notice(self, node: int, fd: int) -> None:
        """Note what a library wrote that does not go through Python: all that the log does not explain."""
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            found = file.read()
        extent = Extent(self.start.contents.get(node, b""))
        for op in self.ops:
            if isinstance(op, Write) and op.node == node:
                extent.write(op.offset, op.data)
            elif isinstance(op, Resize) and op.node == node:
                extent.resize(op.size_bytes)
        if extent.data != found:
            self.ops.append(Write(node, 0, found))

    # -- who and where -------------------------------------------------------------------------------

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._lock:
            self._may_go_on()
            if self.kill_at is not None:
                self.kill_at -= 1
            yield

    def _may_go_on(self) -> None:
        self._dead = self._dead or self.kill_at == 0
        if self._dead:
            raise Killed

    def _site(self, frame: FrameType | None) -> str:
        """The calls of ckptd's own code that led here, innermost first, and how often they did before."""
        found = []
        while frame is not None:
            name = frame.f_code.co_filename
            if any(part in name for part in _CODE) and "/tests/" not in name:
                found.append(f"{Path(name).stem}.{frame.f_code.co_name}:{frame.f_lineno}")
            frame = frame.f_back
        path = " < ".join(found)
        self._sites[path] += 1
        return f"{path} #{self._sites[path]}"

    def _ours_is_calling(self) -> bool:
        name = sys._getframe(2).f_code.co_filename
        return any(part in name for part in _CODE)

    def _slot(self, path: Any, dir_fd: int | None) -> Slot | None:
        directory, name = os.path.split(os.fsdecode(path).rstrip("/"))
        try:
            facts = os.stat(directory or ".", dir_fd=dir_fd) if dir_fd is not None else os.stat(directory or ".")
        except OSError:
            return None
        node = self._nodes.get((facts.st_dev, facts.st_ino))
        return None if node is None or name in {"", ".", ".."} else (node, name)

    def _node_of(self, fd: int) -> int | None:
        facts = os.fstat(fd)
        return self._nodes.get((facts.st_dev, facts.st_ino))

    def _node_at(self, path: Any, dir_fd: int | None) -> int:
        facts = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        return self._nodes[facts.st_dev, facts.st_ino]

    def _new(self, path: Any, dir_fd: int | None) -> int:
        facts = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        self._last += 1
        self._nodes[facts.st_dev, facts.st_ino] = self._last
        return self._last

    def _exists(self, path: Any, dir_fd: int | None) -> bool:
        try:
            os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _scan(self) -> Start:
        """Everything that lies there now is durable: it is the state that the run starts from."""
        start = Start({}, {ROOT: "directory"}, {}, {})
        facts = self.root.stat()
        self._nodes[facts.st_dev, facts.st_ino] = ROOT
        for above, directories, files in os.walk(self.root):
            parent = Path(above).stat()
            directory = self._nodes[parent.st_dev, parent.st_ino]
            for name in [*directories, *files]:
                path = os.path.join(above, name)
                node = self._new(path, None)
                start.names[directory, name] = node
                start.kinds[node] = _CREATE[stat.S_IFMT(os.lstat(path).st_mode)]
                if start.kinds[node] == "symlink":
                    start.targets[node] = os.readlink(path)
                elif start.kinds[node] == "file":
                    start.contents[node] = Path(path).read_bytes()
        return start
