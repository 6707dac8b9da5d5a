"""One file's bytes: those on the disk for certain, and what each sector may hold beside them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

SECTOR, PAGE = 512, 4096
FINE_MAX = 1024  # combinations of sectors of one file; above that, of its pages, and each tear alone
COARSE_PAGES_MAX = 5  # pages of one file in any combination


@dataclass(slots=True)
class Extent:
    """`data` is what programs read. `sectors`: number -> versions that may be on the disk, oldest first."""

    data: bytes
    lengths: list[int] = field(default_factory=list)
    sectors: dict[int, list[bytes]] = field(default_factory=dict)
    doomed: set[int] = field(default_factory=set)
    _kept: dict[tuple[bool, bool], tuple[bytes, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """A file that is here at the start is durable."""
        self.lengths = [len(self.data)]

    def write(self, offset: int, data: bytes) -> None:
        """Change bytes; the length grows where they lie beyond it."""
        length = max(len(self.data), offset + len(data))
        padded = self.data.ljust(length, b"\0")
        self._become(padded[:offset] + data + padded[offset + len(data) :], range_of(offset, len(data)))

    def resize(self, size_bytes: int) -> None:
        """Cut off, or lengthen by zeros."""
        touched = range(0)
        if size_bytes < len(self.data):
            touched = range_of(size_bytes, len(self.data) - size_bytes)
        self._become(self.data[:size_bytes].ljust(size_bytes, b"\0"), touched)

    def _become(self, data: bytes, touched: range) -> None:
        self._kept.clear()
        before, self.data = self.data, data
        if len(data) not in self.lengths:
            self.lengths.append(len(data))
        for number in touched:
            versions = self.sectors.setdefault(number, [_sector(before, number)])
            new = _sector(data, number)
            if versions[-1] != new:
                versions.append(new)
            self.doomed.discard(number)

    def sync(self) -> None:
        """Everything is on the disk, but for what an earlier fsync failed to bring there."""
        self._kept.clear()
        self.sectors = {number: versions for number, versions in self.sectors.items() if number in self.doomed}
        self.lengths = [len(self.data)]

    def fail(self) -> None:
        """Nobody knows what is on the disk, and no later sync tells."""
        self.doomed.update(self.sectors)

    def contents(self, *, fine: bool, foreign: bool) -> tuple[bytes, ...]:
        """What a cut may leave, without repeats; the file as it should be comes last."""
        key = (fine, foreign)
        if key not in self._kept:
            found = dict.fromkeys(self._contents(fine=fine, foreign=foreign))
            found.pop(self.data, None)
            self._kept[key] = (*found, self.data)
        return self._kept[key]

    def _contents(self, *, fine: bool, foreign: bool) -> Iterator[bytes]:
        open_ones = [number for number in sorted(self.sectors) if len(self.sectors[number]) > 1]
        old = self._with({number: self.sectors[number][0] for number in open_ones})
        longest = max(self.lengths)
        for length in sorted({*self.lengths, *range(PAGE * (min(self.lengths) // PAGE + 1), longest, PAGE)}):
            yield old[:length].ljust(length, b"\0")
            yield self.data[:length].ljust(length, b"\0")
        if foreign and open_ones:
            yield self._with(dict.fromkeys(open_ones, b"\xdb" * SECTOR))
        for picked in self._picks(open_ones, fine=fine):
            yield self._with(picked)

    def _picks(self, numbers: list[int], *, fine: bool) -> Iterator[dict[int, bytes]]:
        """Sectors that are not as they should be: number -> what they hold instead."""
        if not numbers:
            return
        count = 1
        for number in numbers:
            count *= len(self.sectors[number])
        if fine and count <= FINE_MAX:
            for versions in product(*(self.sectors[number] for number in numbers)):
                yield dict(zip(numbers, versions, strict=True))
            return
        pages: dict[int, list[int]] = {}
        for number in numbers:
            pages.setdefault(number * SECTOR // PAGE, []).append(number)
        if len(pages) <= COARSE_PAGES_MAX:
            for mask in product((False, True), repeat=len(pages)):
                lost = [n for gone, inside in zip(mask, pages.values(), strict=True) if gone for n in inside]
                yield {number: self.sectors[number][0] for number in lost}
        for inside in pages.values() if fine else [numbers]:
            cuts = range(1, len(inside)) if fine else (len(inside) // 2,)
            for at in cuts:
                yield {number: self.sectors[number][0] for number in inside[at:]}
                yield {number: self.sectors[number][0] for number in inside[:at]}

    def _with(self, picked: dict[int, bytes]) -> bytes:
        made = bytearray(self.data)
        for number, sector in picked.items():
            at = number * SECTOR
            made[at : at + SECTOR] = sector[: max(0, len(self.data) - at)]
        return bytes(made)


def range_of(offset: int, size_bytes: int) -> range:
    """Numbers of the sectors that these bytes lie in."""
    return range(offset // SECTOR, -(-(offset + size_bytes) // SECTOR)) if size_bytes else range(0)


def _sector(data: bytes, number: int) -> bytes:
    return data[number * SECTOR : (number + 1) * SECTOR].ljust(SECTOR, b"\0")
