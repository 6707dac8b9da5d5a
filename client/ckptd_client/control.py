"""The control page of an arena: who may write it now, and whether what it holds is whole.

An arena is a sealed memfd (or, where no daemon was to be had, a spool file with the same image):

    offset 0              control page, PAGE bytes (this file)
    offset PAGE           file images, each starting on a PAGE boundary, exactly as on disk
    descriptor offset     the descriptor: one JSON object (docs/design/handoff.md)

    byte  0   8s   magic "CKPTDARN"
          8   u32  layout version (1)
         12   u32  state word: FREE, LEASED, WRITING, COMMITTED, RELEASED
         16   u64  generation: raised by the daemon at each lease
         24   16s  arena id (random, fixed for the arena's life)
         40   u32  pid of the lease holder      44  u32 reserved
         48   u64  start time of that process in clock ticks (/proc/PID/stat field 22)
         56   u64  descriptor offset            64  u64 descriptor size
         72   32s  SHA-256 of the descriptor bytes
        104   u64  generation the descriptor was written for
        128   8 x (u32 pid, u32 mark, u64 start time): processes that map the arena to read it, once for each
              of their loads, which the mark tells apart. An arena with a living reader is never lent again,
              whichever daemon looks at it.

Who writes what. The daemon writes the page while the word is FREE or RELEASED; the lease holder
owns it from LEASED on. COMMITTED is set last, after the descriptor and its digest, by one aligned
32-bit store: x86 and Arm both keep an aligned word whole, x86 keeps the order of stores, and on
every machine the digest and the repeated generation tell a torn commit from a whole one.
"""

import errno
import hashlib
import os
import struct
from typing import Any, NamedTuple, Optional

PAGE = 4096
MAGIC = b"CKPTDARN"
LAYOUT = 1

FREE, LEASED, WRITING, COMMITTED, RELEASED = 0, 1, 2, 3, 4

_HEAD = struct.Struct("<8sIIQ16sIIQ")
_DESCRIPTOR = struct.Struct("<QQ32sQ")
_WORD = struct.Struct("<I")
_READER = struct.Struct("<IIQ")
_READERS_AT = 128
READERS_MAX = 8
UNKNOWN = (1 << 64) - 1  # a start time that could not be read
_CAN_NOT_LOOK = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_WORD_AT = 12
_DESCRIPTOR_AT = 56


class Control(NamedTuple):
    """One reading of a control page."""

    state: int
    generation: int
    arena: bytes
    pid: int
    started_ticks: int
    descriptor_offset: int
    descriptor_size: int
    descriptor_sha256: bytes
    descriptor_generation: int


def read(page: Any) -> Optional[Control]:
    """Read a control page from a buffer of at least PAGE bytes; None when it is not one."""
    magic, layout, state, generation, arena, pid, _, ticks = _HEAD.unpack_from(page, 0)
    if magic != MAGIC or layout != LAYOUT:
        return None
    return Control(state, generation, arena, pid, ticks, *_DESCRIPTOR.unpack_from(page, _DESCRIPTOR_AT))


def write_lease(page: Any, arena: bytes, generation: int, pid: int) -> int:
    """Daemon: lend the arena to process `pid` under `generation`; the word becomes LEASED. Returns its start time."""
    ticks = started_ticks(pid)
    _WORD.pack_into(page, _WORD_AT, FREE)
    _DESCRIPTOR.pack_into(page, _DESCRIPTOR_AT, 0, 0, bytes(32), 0)
    _HEAD.pack_into(page, 0, MAGIC, LAYOUT, FREE, generation, arena, pid, 0, ticks)
    _WORD.pack_into(page, _WORD_AT, LEASED)
    return ticks


def add_reader(page: Any, pid: int, mark: int = 0) -> bool:
    """Daemon: note that process `pid` is about to map the arena for its load `mark`; False when no place is left."""
    for index in range(READERS_MAX):
        at = _READERS_AT + index * _READER.size
        other, _, ticks = _READER.unpack_from(page, at)
        if not is_alive(other, ticks):
            _READER.pack_into(page, at, pid, mark, started_ticks(pid))
            return True
    return False


def remove_reader(page: Any, pid: int, mark: int = 0) -> bool:
    """Daemon: process `pid` has given up the mapping of its load `mark`; False when there is none here."""
    for index in range(READERS_MAX):
        at = _READERS_AT + index * _READER.size
        if _READER.unpack_from(page, at)[:2] == (pid, mark):
            _READER.pack_into(page, at, 0, 0, 0)
            return True
    return False


def readers(page: Any) -> int:
    """Count the living processes that map the arena to read it."""
    found = [_READER.unpack_from(page, _READERS_AT + index * _READER.size) for index in range(READERS_MAX)]
    return sum(1 for pid, _, ticks in found if pid and is_alive(pid, ticks))


def set_state(page: Any, state: int) -> None:
    """Store the state word; one aligned 32-bit store."""
    _WORD.pack_into(page, _WORD_AT, state)


def commit(page: Any, offset: int, descriptor: bytes, generation: Optional[int] = None) -> bool:
    """Lease holder: say that the arena is whole. The descriptor's bytes already lie at `offset`.

    generation  of the lease that the arena was written under; without one, whatever the page says

    False, and nothing is changed, when the arena was taken back, and lent again under another generation.
    The order is the promise: digest and generation first, the word last. Where the daemon lends the arena to
    somebody else between our look and our stores, the generation is still ours: what we call COMMITTED then
    is not whole to any reader.
    """
    current = _HEAD.unpack_from(page, 0)[3]
    if generation is None:
        generation = current
    elif generation != current or _WORD.unpack_from(page, _WORD_AT)[0] not in (LEASED, WRITING):
        return False
    digest = hashlib.sha256(descriptor).digest()
    _DESCRIPTOR.pack_into(page, _DESCRIPTOR_AT, offset, len(descriptor), digest, generation)
    _WORD.pack_into(page, _WORD_AT, COMMITTED)
    return True


def is_whole(control: Control, descriptor: bytes) -> bool:
    """Say whether `descriptor` is the one that was committed under the arena's present lease."""
    return (
        control.state == COMMITTED
        and control.descriptor_generation == control.generation
        and hashlib.sha256(descriptor).digest() == control.descriptor_sha256
    )


def started_ticks(pid: int) -> int:
    """Start time of a process, which tells it from a later one with the same pid; 0 when gone.

    A zombie counts as gone: it will never write again, though its parent may not have looked yet.
    UNKNOWN when this process can't look, for want of a descriptor or of memory. That says nothing of
    the other one: an arena must never be taken from a living trainer because its daemon ran out.
    """
    if not pid:
        return 0
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except OSError as error:
        return UNKNOWN if error.errno in _CAN_NOT_LOOK else 0
    except (IndexError, ValueError):
        return 0


def seen_ticks(pid: int) -> int:
    """Start time of a process that can be watched from here; 0 when it is gone, or in a pid namespace that is not seen.

    A /proc of another namespace than our own shows somebody else under that number: then nobody is seen.
    """
    try:
        is_ours = os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        is_ours = True  # there is no /proc, where nobody is found, or no memory to look
    return started_ticks(pid) if is_ours else 0


def round_up(size_bytes: int) -> int:
    """Round up to a whole number of pages."""
    return -(-size_bytes // PAGE) * PAGE


def is_alive(pid: int, ticks: int) -> bool:
    """Say whether the process that took the lease still runs; when that can't be known, that it does."""
    now = started_ticks(pid) if ticks else 0
    return now != 0 and (now == ticks or UNKNOWN in (now, ticks))
