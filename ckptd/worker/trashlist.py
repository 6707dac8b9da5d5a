"""What the daemon asks of an I/O worker about a trash as a whole. See trash.py; structs only."""

import msgspec

from ckptd.worker.protocol import Request

NAMES_MAX = 20_000  # of one answer; some 700 KB


class TrashList(Request, frozen=True, tag="trash.list"):
    """Name what was moved into the trash of `root` at least `older_s` ago. Makes nothing: no trash, no names."""

    older_s: float


class TrashListed(msgspec.Struct, frozen=True):
    """The names in order, NAMES_MAX at most; `more` says that there are others."""

    names: list[str]
    more: bool = False
