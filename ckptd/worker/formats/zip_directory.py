"""The directory of a zip file, read strictly: what two readers could see differently is refused.

End record at the very end, no comment, one disk; zip64 records where they must be and agreeing with
the plain ones; the central directory inside the file and right before its end records; every local
header in its place, agreeing with the directory, and no two entries sharing a byte.
"""

import struct
from dataclasses import dataclass

from ckptd.worker.formats.source import Source, broken

ENTRIES_MAX = 100_000
DIRECTORY_BYTES_MAX = 64 << 20
STORED, DEFLATED = 0, 8
_RATIO_MAX = 100
_INFLATED_BYTES_MAX = 64 << 20

_END = struct.Struct("<IHHHHIIH")
_END_64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_END_MAGIC, _END_64_MAGIC, _LOCATOR_MAGIC = 0x06054B50, 0x06064B50, 0x07064B50
_CENTRAL_MAGIC, _LOCAL_MAGIC = 0x02014B50, 0x04034B50
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF
_ZIP64_EXTRA = 1
_DESCRIPTOR_FLAG, _ENCRYPTED_FLAG = 0x8, 0x1


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in the zip; `start` is where its data begins."""

    name: str
    method: int
    crc: int
    size_bytes: int
    packed_bytes: int
    header: int
    start: int = 0

    @property
    def end(self) -> int:
        """Where its data ends."""
        return self.start + self.packed_bytes


def read(source: Source) -> list[Entry]:
    """Return all entries in the order of their place in the file.

    InvalidFormat "truncated" when there is no end record: a zip's directory is written last, so one
    without it is still being written or was cut; "invalid_format" for every other disagreement.
    """
    start, size_bytes, count = _directory_place(source)
    if count > ENTRIES_MAX or size_bytes > DIRECTORY_BYTES_MAX:
        raise broken("invalid_format", f"zip of {count} entries in {size_bytes} bytes, too many")
    raw = source.read(start, size_bytes, "zip directory")
    entries = sorted(_parse(raw, count), key=lambda entry: entry.header)
    if len({entry.name for entry in entries}) != len(entries):
        raise broken("invalid_format", "two zip entries have one name")
    placed = []
    for index, entry in enumerate(entries):
        limit = entries[index + 1].header if index + 1 < len(entries) else start
        placed.append(_placed(source, entry, limit))
    return placed


def _directory_place(source: Source) -> tuple[int, int, int]:
    """Return (start, size, entry count) of the central directory."""
    at = source.size_bytes - _END.size
    if at < 0:
        raise broken("truncated", f"{source.size_bytes} bytes are no zip file")
    magic, disk, first_disk, here, count, size_bytes, start, comment = _END.unpack(source.read(at, _END.size))
    if magic != _END_MAGIC:
        raise broken("truncated", "no zip end record at the end of the file")
    if disk or first_disk or here != count or comment:
        raise broken("invalid_format", "zip end record of several disks, or with a comment")
    locator_at = at - _LOCATOR.size
    locator = _LOCATOR.unpack(source.read(locator_at, _LOCATOR.size)) if locator_at >= 0 else (0, 0, 0, 0)
    if locator[0] == _LOCATOR_MAGIC:
        at, wide = _wide_end(source, locator, locator_at)
        plain = (start, size_bytes, count)
        for narrow, full, real in zip(plain, (_FULL_32, _FULL_32, _FULL_16), wide, strict=True):
            if narrow not in (full, real):
                raise broken("invalid_format", "the two zip end records disagree")
        start, size_bytes, count = wide
    if start + size_bytes != at:
        raise broken("invalid_format", f"zip directory at {start} with {size_bytes} bytes does not end at {at}")
    return start, size_bytes, count


def _wide_end(source: Source, locator: tuple[int, ...], locator_at: int) -> tuple[int, tuple[int, int, int]]:
    _, disk, at, disks = locator
    if disk or disks != 1 or at + _END_64.size != locator_at:
        raise broken("invalid_format", "the zip64 locator points elsewhere than before itself")
    record = _END_64.unpack(source.read(at, _END_64.size))
    magic, record_bytes, _, _, disk, first_disk, here, count, size_bytes, start = record
    if magic != _END_64_MAGIC or record_bytes != _END_64.size - 12 or disk or first_disk or here != count:
        raise broken("invalid_format", "bad zip64 end record")
    return at, (start, size_bytes, count)


def _parse(raw: bytes, count: int) -> list[Entry]:
    entries, at = [], 0
    for _ in range(count):
        if at + _CENTRAL.size > len(raw):
            raise broken("invalid_format", "zip directory holds fewer entries than it says")
        fields = _CENTRAL.unpack_from(raw, at)
        at += _CENTRAL.size
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        name, extra = raw[at : at + name_bytes], raw[at + name_bytes : at + name_bytes + extra_bytes]
        at += name_bytes + extra_bytes + comment_bytes
        if fields[0] != _CENTRAL_MAGIC or at > len(raw):
            raise broken("invalid_format", "zip directory is damaged")
        entries.append(_entry(fields, _plain_name(name), extra))
    if at != len(raw):
        raise broken("invalid_format", "zip directory holds more than its entries")
    return entries


def _plain_name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise broken("invalid_format", "a zip entry's name is not UTF-8") from error
    if not name or name.startswith("/") or "\0" in name or "\\" in name or ".." in name.split("/"):
        raise broken("invalid_format", f"zip entry {name!r} leaves its folder")
    return name


def _entry(fields: tuple[int, ...], name: str, extra: bytes) -> Entry:
    flags, method, crc, packed, size = fields[3], fields[4], fields[7], fields[8], fields[9]
    disk, header = fields[13], fields[16]
    size, packed, header = _widened(name, extra, (size, packed, header))
    if flags & _ENCRYPTED_FLAG or disk:
        raise broken("invalid_format", f"zip entry {name!r} is encrypted or on another disk")
    if method == STORED:
        if packed != size:
            raise broken("invalid_format", f"zip entry {name!r} is stored but has two sizes")
    elif method != DEFLATED or size > packed * _RATIO_MAX or size > _INFLATED_BYTES_MAX:
        raise broken("invalid_format", f"zip entry {name!r} is compressed beyond what a checkpoint holds")
    return Entry(name, method, crc, size, packed, header)


def _widened(name: str, extra: bytes, values: tuple[int, int, int]) -> list[int]:
    """Replace those of (size, packed, header) that are full by their zip64 values, in that order."""
    wanted = sum(value == _FULL_32 for value in values)
    found: list[int] = []
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == _ZIP64_EXTRA and wanted:
            if length < 8 * wanted or at + 4 + length > len(extra):
                raise broken("invalid_format", f"zip entry {name!r} has a short zip64 field")
            found = list(struct.unpack_from(f"<{wanted}Q", extra, at + 4))
            break
        at += 4 + length
    if len(found) != wanted:
        raise broken("invalid_format", f"zip entry {name!r} lacks its zip64 field")
    return [found.pop(0) if value == _FULL_32 else value for value in values]


def _placed(source: Source, entry: Entry, limit: int) -> Entry:
    """Check the local header; return the entry with its data's place, which ends before `limit`."""
    what = f"zip entry {entry.name!r}"
    magic, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes = _LOCAL.unpack(
        source.read(entry.header, _LOCAL.size, what)
    )
    start = entry.header + _LOCAL.size + name_bytes + extra_bytes
    if start + entry.packed_bytes > limit:
        raise broken("invalid_format", f"{what} overlaps what comes after it")
    name = source.read(entry.header + _LOCAL.size, name_bytes, what)
    if magic != _LOCAL_MAGIC or method != entry.method or name != entry.name.encode():
        raise broken("invalid_format", f"{what} has another local header")
    if not flags & _DESCRIPTOR_FLAG:  # with the flag the three are written behind the data
        sizes_agree = packed in (entry.packed_bytes, _FULL_32) and size in (entry.size_bytes, _FULL_32)
        if crc != entry.crc or not sizes_agree:
            raise broken("invalid_format", f"{what} has another size or checksum in its local header")
    return Entry(entry.name, entry.method, entry.crc, entry.size_bytes, entry.packed_bytes, entry.header, start)
