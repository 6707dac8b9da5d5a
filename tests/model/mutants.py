"""Logs of a program that forgets one fsync, or calls it at the wrong moment.

What the code does never depends on an fsync that succeeds, so a log without one is what the code would
have done without the call (test_teeth.py takes one out of the real code to show it).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ckptd.worker.durable import TEMPORARY
from tests.model.disk import Profile
from tests.model.explore import Check, How, explore
from tests.model.log import Drop, Log, Op, Resize, Say, Slot, Sync, Write
from tests.model.scenario import Edge


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of the code, and the logs that it would have left."""

    name: str
    logs: tuple[Log, ...]

    def is_caught(self, check: Check, profile: Profile) -> bool:
        """Say whether some power cut leaves what must not be."""
        how = How(profile, first=True)
        return any(explore(log, how, check).violations for log in self.logs)


def sites(logs: Sequence[Log]) -> list[str]:
    """Every fsync call that these logs hold: its line, those that led there, and which time it was."""
    return list(dict.fromkeys(op.site for log in logs for op in log.ops if isinstance(op, Sync)))


def without(logs: Sequence[Log], site: str) -> Mutant:
    """The code without one fsync."""
    left = []
    for log in logs:
        ops = tuple(op for op in log.ops if not (isinstance(op, Sync) and op.site == site))
        if len(ops) < len(log.ops):
            # Cuts of the first life count again: without the fsync they leave more.
            left.append(Log(log.start, ops))
    return Mutant(f"no {site}", tuple(left))


def early(log: Log) -> Iterator[Mutant]:
    """Each fsync before the last change that it covers.

    A temporary name that is removed needs no fsync: it is nobody's promise, and a sweep finds it again.
    """
    for index, op in enumerate(log.ops):
        if isinstance(op, Sync) and (covered := _last_covered(log.ops[:index], op.node)) is not None:
            ops = [*log.ops[:covered], op, *log.ops[covered:index], *log.ops[index + 1 :]]
            yield Mutant(f"early: {op.site}", (replace(log, ops=tuple(ops)),))


def late(log: Log, edge: Edge) -> Mutant:
    """What `edge` wants first at its worst: only after the next of what it has to come before."""
    ops = list(log.ops)
    for index in range(len(ops) - 1, -1, -1):
        if _is(ops[index], edge.first):
            barrier = next((i for i in range(index + 1, len(ops)) if _is(ops[i], edge.then)), None)
            if barrier is not None:
                ops.insert(barrier + 1, ops[index])
                del ops[index]
    if tuple(ops) == log.ops:
        raise AssertionError(f"{edge} is nowhere in this log")
    return Mutant(f"late: {edge.first} after {edge.then}", (replace(log, ops=tuple(ops)),))


def _is(op: Op, what: str) -> bool:
    """Match "says <what>", "fsync <part of its site>", "<call>" or "<call> <name>"."""
    call, _, rest = what.partition(" ")
    match op:
        case Say():
            return call == "says" and rest == op.what
        case Sync():
            return call == "fsync" and rest in op.site
        case _:
            return call == type(op).__name__ and (not rest or rest in {slot[1] for slot in _slots(op)})


def _slots(op: Op) -> list[Slot]:
    return [getattr(op, name) for name in ("slot", "old", "new", "first", "second") if hasattr(op, name)]


def _last_covered(ops: Sequence[Op], node: int) -> int | None:
    """The last change of a file's bytes or a directory's names that no earlier fsync has covered."""
    for index in range(len(ops) - 1, -1, -1):
        op = ops[index]
        if isinstance(op, Sync) and op.node == node:
            return None
        if isinstance(op, Write | Resize) and op.node == node:
            return index
        if isinstance(op, Drop) and TEMPORARY in op.slot[1]:
            continue
        if any(slot[0] == node for slot in _slots(op)):
            return index
    return None
