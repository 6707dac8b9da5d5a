"""A disk under a file system that keeps only the promises it must: every state a power cut may leave.

A call changes what programs see at once, and the disk some time later, in pieces. `Disk` takes a log
record by record and knows what is on the disk for certain (an fsync returned) and which pieces may or
may not be. `metadata()` and `contents()` then list every combination.

    WEAKEST  what POSIX leaves open. fsync of a file: its bytes and its length, no name. fsync of a directory:
             the names in it, nothing else. All other changes reach the disk in any order, each alone or
             not at all; a rename inside one directory is one change, a rename between two is two: the
             new name before the old one's end, unless an fsync of the old directory alone forces that.
    EXT4     a journal: changes of names reach the disk in the order in which they were made, so a cut leaves a
             beginning of them; fsync commits the journal up to the last change of what it names.

Bytes behave alike in both: each 512-byte sector that was written since the last fsync may hold what was
there before (zeros where nothing was) or any version since; the length may be any it had, or end at
any page between; WEAKEST also lets a sector hold what another file left there.
A failed fsync leaves what it should have written in doubt for ever: a later one that succeeds proves
nothing for those bytes and names (the kernel marked them clean).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from tests.model.extent import Extent
from tests.model.log import ROOT, Drop, Link, Log, Make, Move, Op, Resize, Slot, Start, Swap, Sync, Write


class Profile(Enum):
    """Which promises a file system keeps."""

    WEAKEST = "weakest"
    EXT4 = "ext4"


@dataclass(slots=True)
class _Change:
    """A change of names that may be on the disk. `after`: only when that one is, too."""

    parts: dict[Slot, int | None]
    nodes: frozenset[int]
    after: "_Change | None" = None
    doomed: bool = False


Names = dict[Slot, int]


@dataclass(slots=True)
class Disk:
    """What is on the disk for certain, and what may be."""

    profile: Profile
    durable: Names
    kinds: dict[int, str]
    targets: dict[int, str]
    extents: dict[int, Extent]
    pending: list[_Change] = field(default_factory=list)

    @classmethod
    def at(cls, start: Start, profile: Profile) -> "Disk":
        """A disk on which everything of `start` is durable."""
        extents = {node: Extent(data) for node, data in start.contents.items()}
        return cls(profile, dict(start.names), dict(start.kinds), dict(start.targets), extents)

    @classmethod
    def after(cls, log: Log, profile: Profile) -> "Disk":
        """A disk at the end of a log."""
        disk = cls.at(log.start, profile)
        for op in log.ops:
            disk.take(op)
        return disk

    def take(self, op: Op) -> None:
        """Let one call happen."""
        match op:
            case Write(node, offset, data):
                self.extents[node].write(offset, data)
            case Resize(node, size_bytes):
                self.extents[node].resize(size_bytes)
            case Sync():
                self._sync(op)
            case _:
                self._name(op)

    def _name(self, op: Op) -> None:
        match op:
            case Make(slot, node, kind, target):
                self.kinds[node] = kind
                if kind == "symlink":
                    self.targets[node] = target
                elif kind == "file":
                    self.extents[node] = Extent(b"")
                self._change({slot: node}, slot[0], node)
            case Link(slot, node):
                self._change({slot: node}, slot[0], node)
            case Drop(slot, node):
                self._change({slot: None}, slot[0], node)
            case Move():
                self._move(op)
            case Swap(first, second, nodes):
                self._change({first: nodes[0], second: nodes[1]}, first[0], second[0], *nodes)

    def _change(self, parts: dict[Slot, int | None], *nodes: int, after: _Change | None = None) -> _Change:
        made = _Change(parts, frozenset(nodes), after)
        self.pending.append(made)
        return made

    def _move(self, op: Move) -> None:
        nodes = (op.old[0], op.new[0], op.node)
        if op.old[0] == op.new[0] or self.profile is Profile.EXT4:
            self._change({op.new: op.node, op.old: None}, *nodes)
        else:
            named = self._change({op.new: op.node}, *nodes)
            self._change({op.old: None}, *nodes, after=named)

    # -- fsync ---------------------------------------------------------------------------------------

    def _sync(self, op: Sync) -> None:
        extent = self.extents.get(op.node)
        if op.failed:
            if extent is not None:
                extent.fail()
            if self.profile is Profile.WEAKEST:
                for change in self._in_directory(op.node):
                    change.doomed = True
            return
        if extent is not None:
            extent.sync()
        if self.profile is Profile.EXT4:
            last = max((i for i, change in enumerate(self.pending) if op.node in change.nodes), default=-1)
            self._pin(self.pending[: last + 1])
        else:
            self._pin([change for change in self._in_directory(op.node) if not change.doomed])

    def _in_directory(self, node: int) -> list[_Change]:
        return [change for change in self.pending if any(slot[0] == node for slot in change.parts)]

    def _pin(self, changes: list[_Change]) -> None:
        for change in changes:
            _apply(self.durable, change)
        pinned = {id(change) for change in changes}
        settled = {slot for change in changes for slot in change.parts}
        left = []
        seen_pinned = False
        for change in reversed(self.pending):
            if id(change) in pinned:
                seen_pinned = True
                continue
            if seen_pinned:  # older than something pinned: what that one said of a slot stands
                change.parts = {slot: node for slot, node in change.parts.items() if slot not in settled}
            if change.after is not None and id(change.after) in pinned:
                change.after = None
            if change.parts:
                left.append(change)
        self.pending = left[::-1]

    # -- what a cut leaves ---------------------------------------------------------------------------

    def metadata(self) -> Iterator[Names]:
        """Every set of names that a cut may leave now; some may be alike."""
        if self.profile is Profile.EXT4:
            names = dict(self.durable)
            yield dict(names)
            for change in self.pending:
                _apply(names, change)
                yield dict(names)
            return
        yield from self._subsets(0, [])

    def _subsets(self, index: int, chosen: list[_Change]) -> Iterator[Names]:
        if index == len(self.pending):
            names = dict(self.durable)
            for change in chosen:
                _apply(names, change)
            yield names
            return
        change = self.pending[index]
        yield from self._subsets(index + 1, chosen)
        waits = change.after is not None and any(change.after is other for other in self.pending)
        if not waits or any(change.after is other for other in chosen):
            yield from self._subsets(index + 1, [*chosen, change])

    def contents(self, node: int, *, fine: bool) -> tuple[bytes, ...]:
        """Everything that a file may hold after a cut now; `fine`: each sector on its own."""
        return self.extents[node].contents(fine=fine, foreign=self.profile is Profile.WEAKEST)

    def skeleton(self, names: Names) -> tuple[tuple[str, int], ...]:
        """What is reachable from the root under `names`, as (path, node), sorted."""
        below: dict[int, list[tuple[str, int]]] = {}
        for (directory, name), node in names.items():
            below.setdefault(directory, []).append((name, node))
        found = []
        todo = [("", ROOT)]
        while todo:
            path, directory = todo.pop()
            for name, node in below.get(directory, ()):
                found.append((f"{path}{name}", node))
                if self.kinds[node] == "directory":
                    todo.append((f"{path}{name}/", node))
        return tuple(sorted(found))


def _apply(names: Names, change: _Change) -> None:
    for slot, node in change.parts.items():
        if node is None:
            names.pop(slot, None)
        else:
            names[slot] = node
