"""One arena as the daemon sees it: a sealed memfd, its control page, and who uses it for what."""

import fcntl
import math
import mmap
import os
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from ckptd import failpoint
from ckptd_client import control

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW = 0x1, 0x2, 0x4
FD_PREFIX = "arena-"
RECLAIM_AGAIN_S = 1.0  # who is asked for an arena may not have it mapped yet, and is asked again
# The trainer writes the descriptor's length; it is read and hashed on the event loop.
DESCRIPTOR_BYTES_MAX = 4 << 20


class Use(StrEnum):
    """What the daemon does with an arena."""

    FREE = "free"
    LEASED = "leased"
    BUSY = "busy"
    HOT = "hot"


class Holder(Protocol):
    """Who holds a lease: a connection."""

    pid: int
    uid: int

    def push(self, message: dict[str, object]) -> None:
        """Send without waiting."""


class Store(Protocol):
    """The service manager's fd store (notify.Notifier)."""

    def has_room(self, more: int = 1) -> bool:
        """Whether it would keep `more` of them."""

    def store(self, name: str, fd: int) -> None:
        """Keep a copy of `fd` under `name` beyond this process."""

    def remove(self, name: str) -> None:
        """Forget it."""


@dataclass(eq=False)
class Arena:
    """One arena. `fd` and `page` live until `close()`.

    owner_uid  for whom it was made, all its life: whoever once mapped an arena may keep the mapping, so it is
               never lent to another user. It is the memfd's own uid, which no client can change.
    hot_s      when it became a hot copy; read_s when it was read last, or became one
    kept_for   the damaged checkpoint that is to be written again from it: until that is verified it counts as read
    """

    id: bytes
    fd: int
    size_bytes: int
    page: mmap.mmap
    owner_uid: int
    use: Use = Use.FREE
    generation: int = 0
    experiment_id: str = ""
    holder: Holder | None = None
    holder_pid: int = 0
    holder_ticks: int = 0
    checkpoint_id: str = ""
    asked_back_s: float = -math.inf
    used_s: float = 0.0
    hot_s: float = 0.0
    read_s: float = 0.0
    kept_for: str = ""

    @property
    def name(self) -> str:
        """Its name in the fd store."""
        return FD_PREFIX + self.id.hex()

    @property
    def readers(self) -> int:
        """How many living processes map it (written in the control page, so that it outlives this daemon), and a repair."""
        return control.readers(self.page) + bool(self.kept_for)

    def is_idle(self) -> bool:
        """Whether its memory may be given up or lent: nobody writes it, reads it, or waits for its bytes."""
        return self.use in {Use.FREE, Use.HOT} and self.readers == 0

    def is_unwritten(self) -> bool:
        """Whether it is lent and its holder has not begun to write."""
        page = control.read(self.page)
        return self.use is Use.LEASED and page is not None and page.state == control.LEASED

    def may_be_asked_back(self, now_s: float) -> bool:
        """Whether its holder has not begun to write, and was not asked for it a moment ago."""
        return self.holder is not None and now_s - self.asked_back_s >= RECLAIM_AGAIN_S and self.is_unwritten()

    def fits(self, size_bytes: int) -> bool:
        """Whether `size_bytes` go in without wasting more than as much again."""
        return size_bytes <= self.size_bytes <= 2 * size_bytes + (64 << 20)

    def descriptor(self) -> bytes | None:
        """Return the committed descriptor, or None while the arena holds no whole save.

        A released arena still holds one until it is lent again: that is the hot copy.
        """
        page = control.read(self.page)
        if page is None or page.state not in {control.COMMITTED, control.RELEASED}:
            return None
        end = page.descriptor_offset + page.descriptor_size
        if not control.PAGE <= page.descriptor_offset <= end <= self.size_bytes:
            return None
        if page.descriptor_size > DESCRIPTOR_BYTES_MAX:
            return None
        raw = os.pread(self.fd, page.descriptor_size, page.descriptor_offset)
        return raw if control.is_whole(page._replace(state=control.COMMITTED), raw) else None

    def close(self) -> None:
        """Give up our mapping and fd; the memory goes when the last holder's mapping does."""
        self.page.close()
        os.close(self.fd)


def is_sealed(fd: int) -> bool:
    """Whether `fd` is memory that nobody can shrink under a reader. Only memory files have seals at all."""
    wanted = _SEAL_SHRINK | _SEAL_GROW | _SEAL_SEAL
    try:
        return fcntl.fcntl(fd, _F_GET_SEALS) & wanted == wanted
    except OSError:
        return False


def owner_of(uid: int) -> int:
    """Whose memory an arena for `uid` is: only root can give files away, others serve themselves alone."""
    return uid if os.getuid() == 0 else os.getuid()


def make(size_bytes: int, owner_uid: int) -> tuple[int, mmap.mmap]:
    """Make a sealed memfd whose pages all exist. Blocks: about 0.5 s per GB. OSError when memory is short."""
    fd = os.memfd_create("ckptd-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        if owner_uid != os.getuid():
            os.fchown(fd, owner_uid, -1)
        os.posix_fallocate(fd, 0, size_bytes)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW | _SEAL_SEAL)
        failpoint.hit("arena.sealed")
        return fd, mmap.mmap(fd, control.PAGE)
    except BaseException:
        os.close(fd)
        raise
