"""Every state that a power cut may leave at any instant of a log, each shown to a check."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod

from tests.model.disk import Disk, Profile
from tests.model.log import Log, Say, Sync

PRODUCT_MAX = 40_000  # combinations of contents under one set of names; above that they are sampled as below
SAMPLES = 4_000


class Symlink(str):
    """What a symlink leads to."""

    __slots__ = ()


Tree = dict[str, bytes | Symlink | None]  # path -> a file's bytes, where a symlink leads, None for a directory
Says = tuple[Say, ...]
Check = Callable[[Tree, Says], str]  # "" when all holds, else what does not


@dataclass(frozen=True, slots=True)
class Violation:
    """A state that must not be: after how many records, which promises bound, what it looks like."""

    at: int
    what: str
    tree: Tree


@dataclass(slots=True)
class Found:
    """`states` are distinct: another tree, or another set of promises in force. `sampled`: instants not listed whole."""

    states: int = 0
    sampled: int = 0
    violations: list[Violation] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class How:
    """fine  every sector of a file on its own, not only its typical damages
    first   stop at the first violation
    """

    profile: Profile
    fine: bool = False
    first: bool = False


def explore(log: Log, how: How, check: Check, found: Found | None = None) -> Found:
    """Check what a cut may leave at every instant of `log`.

    Between two fsyncs or promises the states only grow in number: what may be left before a call may
    be left after it, the call's effect not having reached the disk. So it is enough to list them right
    before each fsync, before and after each promise, and at the end.
    """
    found = found or Found()
    disk = Disk.at(log.start, how.profile)
    says: list[Say] = []
    for index, op in enumerate(log.ops):
        if index >= log.cuts_from and isinstance(op, Sync | Say):
            _at(index, disk, tuple(says), (how, check, found))
            if how.first and found.violations:
                return found
        if isinstance(op, Say):
            says.append(op)
        else:
            disk.take(op)
    _at(len(log.ops), disk, tuple(says), (how, check, found))
    return found


def trees(disk: Disk, *, fine: bool, found: Found) -> Iterator[Tree]:
    """Yield what the disk may hold, for as far as it is not in `found.seen` yet."""
    before: set[int] = set()
    for names in disk.metadata():
        skeleton = disk.skeleton(names)
        key = hash(skeleton)
        if key in before:
            continue
        before.add(key)
        tree: Tree = {}
        options: dict[int, tuple[bytes, ...]] = {}
        for path, node in skeleton:
            match disk.kinds[node]:
                case "directory":
                    tree[path] = None
                case "symlink":
                    tree[path] = Symlink(disk.targets[node])
                case _:
                    choices = disk.contents(node, fine=fine)
                    tree[path] = choices[-1]
                    if len(choices) > 1:
                        options[node] = choices
        yield from _filled(tree, [(path, node) for path, node in skeleton if node in options], options, found)


def _filled(
    tree: Tree, open_paths: list[tuple[str, int]], options: dict[int, tuple[bytes, ...]], found: Found
) -> Iterator[Tree]:
    nodes = list(options)
    places = [(path, nodes.index(node)) for path, node in open_paths]
    fixed = hash(tuple((path, content) for path, content in tree.items() if path not in dict(open_paths)))
    choices = list(options.values())
    picks: Iterable[tuple[bytes, ...]] = product(*choices)
    if prod(map(len, choices)) > PRODUCT_MAX:
        found.sampled += 1
        picks = _sample(choices)
    for picked in picks:
        key = hash((fixed, tuple((path, picked[index]) for path, index in places)))
        if key in found.seen:
            continue
        found.seen.add(key)
        filled = dict(tree)
        for path, index in places:
            filled[path] = picked[index]
        yield filled


def _sample(choices: list[tuple[bytes, ...]]) -> Iterator[tuple[bytes, ...]]:
    """Each file's every content with the others as they were, and as they should be; and SAMPLES at random."""
    for others in (0, -1):
        for index, contents in enumerate(choices):
            for content in contents:
                yield tuple(content if i == index else some[others] for i, some in enumerate(choices))
    dice = random.Random(len(choices))
    for _ in range(SAMPLES):
        yield tuple(dice.choice(some) for some in choices)


def _at(index: int, disk: Disk, says: Says, work: tuple[How, Check, Found]) -> None:
    how, check, found = work
    promises = Found(seen=_Scoped(found.seen, len(says)))
    for tree in trees(disk, fine=how.fine, found=promises):
        found.states += 1
        if what := check(tree, says):
            found.violations.append(Violation(index, what, tree))
            if how.first:
                return
    found.sampled += promises.sampled


class _Scoped(set[int]):
    """States already seen under as many promises as bind now."""

    def __init__(self, seen: set[int], scope: int) -> None:
        super().__init__()
        self._seen, self._scope = seen, scope

    def __contains__(self, key: object) -> bool:
        return hash((self._scope, key)) in self._seen

    def add(self, key: int) -> None:
        self._seen.add(hash((self._scope, key)))
