"""What should lie under a root, as far as the rows say: what a scan is compared with."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from ckptd.catalog import Catalog, arrivals
from ckptd.catalog.roots import Root
from ckptd.model import RootKind
from ckptd.worker.mark import KNOWN_MAX, mark


@dataclass
class Standing:
    """What should lie under a root. `marked` are the rows of `marks`, in their order; `others` can't be marked."""

    under: str = ""
    marks: bytearray = field(default_factory=bytearray)
    marked: "array[int]" = field(default_factory=partial(array, "q"))
    others: "array[int]" = field(default_factory=partial(array, "q"))
    adopt: bool = False  # as Scan has it

    def __bool__(self) -> bool:
        """Whether anything should."""
        return bool(self.marked or self.others)

    def add(self, page: Sequence[arrivals.Standing], *, marked: bool) -> None:
        """Take in one page of rows."""
        for sequence, path, ino, size_bytes, mtime_ns in page:
            if marked and ino is not None and size_bytes is not None and mtime_ns is not None:
                self.marks += mark(path, ino, size_bytes, mtime_ns)
                self.marked.append(sequence)
            else:
                self.others.append(sequence)


async def of_root(catalog: Catalog, root: Root) -> Standing:
    """Which files should lie under the root now, as far as their rows say: 24 bytes each, for a scan's time."""
    found = Standing()
    after = 0
    while True:
        page = await catalog.read(lambda conn, at=after: arrivals.standing(conn, root.id, at))  # type: ignore[misc]
        if not page:
            return found
        # A managed root is told with its manifests, always: they are what the catalog is made from again.
        found.add(page, marked=root.kind is RootKind.WATCHED and len(found.marked) < KNOWN_MAX)
        after = page[-1][0]
