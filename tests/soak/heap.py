"""Who lies in the pages that are mostly free: glibc's heaps of a process, walked from outside, stopping nobody.

    python -m tests.soak.heap PID [--top 20]

Memory that grows while what is in use does not is gaps: one small thing that stays holds a page of 4 KiB. This names
such things by their Python type, as a piece of SQLite's, or by their size. A process at rest that has just given back
what is free shows what lasts; under load each look also sees what is in use for a moment.

For 64-bit glibc (malloc/malloc.c, malloc/arena.c), CPython's object header and SQLite's mem1.c. Needs root: the kernel
tells nobody else which pages are its one page of zeros. Reading an absent page puts that one in its place.
"""

import argparse
import os
import re
import struct
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

PAGE_BYTES = 4096
HEAP_BYTES = 64 << 20  # of every heap but the first, and what its address is a multiple of
STATE_BYTES = 0x898  # struct malloc_state, behind the header of an arena's first heap
CHUNK_BYTES_MIN = 32
MOSTLY_FREE = PAGE_BYTES // 2
SHARES = 8
_FLAGS, _IN_USE = 7, 1  # the low bits of a chunk's size; whether the chunk before it is in use
_PRESENT, _FRAME, _ZERO_PAGE = 1 << 63, (1 << 55) - 1, 1 << 24  # pagemap and kpageflags of the kernel's documentation
_TYPE_NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_.]+")
_NAME_BYTES = 64
_COUNT_MAX = 1 << 40  # more references than that are none


class Chunk(NamedTuple):
    """A piece of a heap: where its header lies in it, its whole size, and whether somebody has it."""

    at: int
    size_bytes: int
    used: bool


@dataclass(slots=True)
class Holder:
    """What is alike in mostly free pages, and its share of what is free in them."""

    count: int = 0
    size_bytes: int = 0
    gap_bytes: float = 0.0


@dataclass(slots=True)
class Found:
    """All heaps of a process: resident pages by eighths in use, and who lies in those that are less than half in use."""

    used_bytes: int = 0
    resident_bytes: int = 0
    pages: Counter[int] = field(default_factory=Counter)
    holders: dict[str, Holder] = field(default_factory=dict)


class Memory:
    """Another process's memory. OSError when it ends, or is not ours to read."""

    def __init__(self, pid: int) -> None:
        """Look once at what is mapped."""
        names = (f"/proc/{pid}/mem", f"/proc/{pid}/pagemap", "/proc/kpageflags")
        self._mem, self._pages, self._flags = (os.open(name, os.O_RDONLY) for name in names)
        self.mappings = []
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode, *_, last = line.split()
            start, end = (int(each, 16) for each in span.split("-"))
            self.mappings.append((start, end, mode, last))
        self._starts = [mapping[0] for mapping in self.mappings]

    def __enter__(self) -> Self:
        """Nothing more."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        for fd in (self._mem, self._pages, self._flags):
            os.close(fd)

    def read(self, start: int, size_bytes: int) -> bytes:
        """Return what lies there; less where the process has less."""
        return os.pread(self._mem, size_bytes, start)

    def readable(self, address: int) -> bool:
        """Say whether anything is mapped there that may be read."""
        at = bisect_right(self._starts, address) - 1
        return at >= 0 and address < self.mappings[at][1] and "r" in self.mappings[at][2]

    def resident(self, start: int, end: int) -> list[bool]:
        """Say of each page whether it has memory of its own."""
        entries = os.pread(self._pages, (end - start) // PAGE_BYTES * 8, start // PAGE_BYTES * 8)
        return [bool(entry & _PRESENT) and not self._is_zeros(entry) for (entry,) in struct.iter_unpack("<Q", entries)]

    def _is_zeros(self, entry: int) -> bool:
        return bool(struct.unpack("<Q", os.pread(self._flags, 8, (entry & _FRAME) * 8))[0] & _ZERO_PAGE)

    def heaps(self) -> Iterator[tuple[int, int, int]]:
        """Yield (start, end, first chunk) of each heap."""
        for start, end, mode, last in self.mappings:
            if last == "[heap]":
                yield start, end, 0
            elif mode.startswith("rw") and last == "0" and start % HEAP_BYTES == 0:
                (arena,) = struct.unpack("<Q", self.read(start, 8))
                header_bytes = arena % HEAP_BYTES  # of each heap; the arena's state lies behind that of its first one
                if header_bytes < PAGE_BYTES and self.readable(arena):
                    own = arena - header_bytes == start
                    yield start, end, (header_bytes + STATE_BYTES + 15) // 16 * 16 if own else header_bytes


class Names:
    """What lies in a chunk, as far as its first words tell."""

    def __init__(self, memory: Memory) -> None:
        """Know no type yet."""
        self._memory = memory
        self._types: dict[int, str | None] = {}

    def of(self, data: bytes, chunk: Chunk) -> str:
        """Return a Python type's name, "SQLite", or the size."""
        words = struct.unpack_from("<4Q", data.ljust(chunk.at + 48, b"\0"), chunk.at + 16)
        room_bytes = chunk.size_bytes - 8
        for count, kind in ((words[0], words[1]), (words[2], words[3])):  # the collector's two words may come first
            if 0 < count < _COUNT_MAX and (name := self._type(kind)):
                return name
        if words[0] and words[0] % 8 == 0 and room_bytes - 16 <= words[0] + 8 <= room_bytes:
            return f"SQLite, {chunk.size_bytes} bytes"
        return f"{chunk.size_bytes} bytes"

    def _type(self, address: int) -> str | None:
        if address not in self._types:
            self._types[address] = self._read_type(address)
        return self._types[address]

    def _read_type(self, address: int) -> str | None:
        memory = self._memory
        if address % 8 or not (memory.readable(address) and memory.readable(address + 32)):
            return None
        kind, _, name = struct.unpack("<3Q", memory.read(address + 8, 24))
        if not (memory.readable(kind) and memory.readable(name)):
            return None
        text = memory.read(name, _NAME_BYTES).split(b"\0")[0]
        return text.decode() if _TYPE_NAME.fullmatch(text) else None


def chunks(data: bytes, first: int) -> list[Chunk]:
    """Return what a heap consists of, up to its end or to what has never been touched."""
    sizes = []
    at = first
    while at + 16 <= len(data):
        (size,) = struct.unpack_from("<Q", data, at + 8)
        if size & ~_FLAGS < CHUNK_BYTES_MIN or at + (size & ~_FLAGS) > len(data):
            break
        sizes.append((at, size))
        at += size & ~_FLAGS
    after = [size & _IN_USE for _, size in sizes[1:]] + [0]
    return [Chunk(at, size & ~_FLAGS, bool(used)) for (at, size), used in zip(sizes, after, strict=True)]


def look(pid: int) -> Found:
    """Walk all heaps of a process. OSError when it ends, or is not ours to read."""
    found = Found()
    with Memory(pid) as memory:
        names = Names(memory)
        for start, end, first in memory.heaps():
            resident = memory.resident(start, end)  # first: reading makes them so
            _add(found, memory.read(start, end - start), (resident, first), names)
    return found


def _add(found: Found, data: bytes, heap: tuple[list[bool], int], names: Names) -> None:
    resident, first = heap
    used = [0] * len(resident)
    inside: list[list[Chunk]] = [[] for _ in resident]
    for chunk in chunks(data, first):
        if chunk.used:
            found.used_bytes += chunk.size_bytes
            end = chunk.at + chunk.size_bytes
            for page in range(chunk.at // PAGE_BYTES, min((end - 1) // PAGE_BYTES + 1, len(used))):
                used[page] += min(end, (page + 1) * PAGE_BYTES) - max(chunk.at, page * PAGE_BYTES)
                inside[page].append(chunk)
    counted: set[int] = set()  # a chunk may lie in two pages
    for page in (page for page, is_there in enumerate(resident) if is_there):
        found.resident_bytes += PAGE_BYTES
        found.pages[used[page] * SHARES // PAGE_BYTES] += 1
        if used[page] < MOSTLY_FREE:
            for chunk in inside[page]:
                holder = found.holders.setdefault(names.of(data, chunk), Holder())
                if chunk.at not in counted:
                    counted.add(chunk.at)
                    holder.count += 1
                    holder.size_bytes += chunk.size_bytes
                holder.gap_bytes += (PAGE_BYTES - used[page]) / len(inside[page])


def render(found: Found, top: int) -> str:
    """Say it."""
    lines = [
        f"resident {found.resident_bytes / 2**20:.1f} MiB, in use {found.used_bytes / 2**20:.1f} MiB",
        "pages by eighths in use: " + ", ".join(f"{share}: {found.pages[share]}" for share in range(SHARES + 1)),
        "in pages that are less than half in use:",
    ]
    largest = sorted(found.holders.items(), key=lambda each: -each[1].gap_bytes)[:top]
    lines += [
        f"{holder.gap_bytes / 2**10:8.0f} KiB free beside {holder.count:6d} of {name}, {holder.size_bytes} bytes"
        for name, holder in largest
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.soak.heap", description=__doc__.splitlines()[0])
    parser.add_argument("pid", type=int)
    parser.add_argument("--top", type=int, default=20)
    asked = parser.parse_args()
    try:
        sys.stdout.write(render(look(asked.pid), asked.top) + "\n")
    except OSError as error:
        parser.error(f"process {asked.pid} can't be read, which needs root: {error}")
