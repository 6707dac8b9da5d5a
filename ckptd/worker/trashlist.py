"""What the daemon asks of an I/O worker about a trash as a whole. See trash.py; structs only."""

import msgspec

from ckptd.worker.protocol import Request

NAMES_MAX = 20_000  # of one answer; some 700 KB


class TrashList(Request, frozen=True, tag="trash.list"):
    """Name what was moved into the trash of `root` at least `older_s` ago. Makes nothing: no trash, no names."""

    older_s: float


class TrashListed(msgspec.Struct, frozen=True):
    r"""NAMES_MAX names at most, those that come first, in order; what is not ASCII in them as \x, \u or \U."""

    names: list[str]
