"""Which checkpoint lies before another one, told by their names alone."""

import os
import re
from collections.abc import Iterable, Iterator

from ckptd.worker.formats.names import epoch_of, is_ours, is_unfinished, step_of

ENTRIES_MAX = 100_000  # of one directory; the rest is not looked at
_REVISION = re.compile(r"_r\d+$")
_DIGITS = re.compile(r"\d+")


def before(name: str, others: Iterable[str]) -> str | None:
    """Return the name with the highest step, else epoch, below that of `name`, of those that are named like it.

    None when there is none, or when the name tells neither.

    >>> before("step_0000000300", ["step_0000000100", "step_0000000200_r2", "latest", "step_0000000400"])
    'step_0000000200_r2'
    """
    own = _place(name)
    if own is None:
        return None
    form = _form(name)
    found = [
        (place, other)
        for other in others
        if _form(other) == form and not is_ours(other) and not is_unfinished(other) and (place := _place(other))
    ]
    return max((pair for pair in found if pair[0] < own), default=(None, None))[1]


def path_before(path: str) -> str | None:
    """Return the path of the checkpoint before this one in the same directory; None when there is none. Blocks.

    OSError when the directory can't be read.
    """
    directory, name = os.path.split(path.rstrip("/"))
    found = before(name, _entries(directory))
    return None if found is None else os.path.join(directory, found)


def _entries(directory: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for count, entry in enumerate(entries):
            if count >= ENTRIES_MAX:
                return
            if not entry.is_symlink():
                yield entry.name


def _place(name: str) -> tuple[float, int] | None:
    """Return what to sort by: the step, or the epoch where there is no step; a later revision is later."""
    number = step_of(_REVISION.sub("", name))
    place = epoch_of(name) if number is None else number
    revision = _REVISION.search(name)
    return None if place is None else (place, int(revision[0][2:10]) if revision else 1)


def _form(name: str) -> str:
    return _DIGITS.sub("0", _REVISION.sub("", name))
