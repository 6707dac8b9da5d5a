"""What the daemon asks of an I/O worker about files fetched back from an archive. See fetched.py; structs only."""

import msgspec

from ckptd.worker.protocol import FileRecord, Request


class FetchBegin(Request, frozen=True, tag="fetch.begin"):
    """Make an empty directory to fetch `key` (32 hex digits) into; the root is made where missing."""

    key: str


class Fetching(msgspec.Struct, frozen=True):
    """The directory to fill."""

    path: str


class FetchKeep(Request, frozen=True, tag="fetch.keep"):
    """What was fetched into `path` must be these files, byte by byte; then it gets its final name, durably."""

    key: str
    path: str
    files: list[FileRecord]


class FetchDrop(Request, frozen=True, tag="fetch.drop"):
    """Remove what is kept under `key`, or with `path` a directory that was begun for it."""

    key: str
    path: str = ""


class FetchedList(Request, frozen=True, tag="fetch.list"):
    """Which keys are kept under the root?"""


class Kept(msgspec.Struct, frozen=True):
    """All of them, sorted."""

    keys: list[str]
