"""What a program did to a file system, one record per call, with the bytes.

A node is one file, directory or symlink, numbered from 0 (the root of what is recorded); a slot is one
name in one directory. Numbers are never used twice, though a real file system uses its own again.
"""

from dataclasses import dataclass
from typing import Any

ROOT = 0

Slot = tuple[int, str]  # directory's node, name


@dataclass(frozen=True, slots=True)
class Make:
    """A new file, directory or symlink under a name."""

    slot: Slot
    node: int
    kind: str  # "file", "directory" or "symlink"
    target: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    """One more name for a file."""

    slot: Slot
    node: int


@dataclass(frozen=True, slots=True)
class Drop:
    """A name is gone: unlink or rmdir."""

    slot: Slot
    node: int


@dataclass(frozen=True, slots=True)
class Move:
    """A rename; what had the new name is gone."""

    old: Slot
    new: Slot
    node: int


@dataclass(frozen=True, slots=True)
class Swap:
    """Two names exchanged: `first` leads to `nodes[0]` from now on."""

    first: Slot
    second: Slot
    nodes: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes into a file."""

    node: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    """A file's length set: truncated, or space reserved that reads as zeros."""

    node: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Sync:
    """fsync of a file or a directory. `site` says which call of the code it was: see recorder.py."""

    node: int
    site: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Say:
    """A promise given to somebody else, or a row committed: from here on it binds, whatever the cut leaves.

    The catalog is one unit that is durable when its commit returns (WAL, synchronous=FULL), so a
    commit needs no more of a model than this.
    """

    what: str
    fact: Any = None


Op = Make | Link | Drop | Move | Swap | Write | Resize | Sync | Say


@dataclass(frozen=True, slots=True)
class Start:
    """What lay on the disk, durably, before the first record: names, kinds, contents, targets of symlinks."""

    names: dict[Slot, int]
    kinds: dict[int, str]
    contents: dict[int, bytes]
    targets: dict[int, str]


@dataclass(frozen=True, slots=True)
class Log:
    """A run from its start. `cuts_from`: earlier instants are another log's business."""

    start: Start
    ops: tuple[Op, ...]
    cuts_from: int = 0
