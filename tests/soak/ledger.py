"""What every save must become: written down before it is made, so that a trainer's death leaves no doubt. Thread-safe."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

RUNGS = ("none", "staged", "durable", "verified", "tiered")


@dataclass
class Entry:
    """One save."""

    experiment: str
    step: int
    seed: int
    size_bytes: int
    id: str = ""  # not known when its trainer died before it could say
    level: str = "none"  # the highest that anybody was told
    state: str = "pending"
    spooled: bool = False
    lost_sight: bool = False  # its trainer died: what was not promised by then may be there or not
    checked: bool = False  # its bytes were compared once

    @property
    def promised(self) -> bool:
        """Whether it must be there."""
        return self.level != "none" or self.spooled

    @property
    def refused(self) -> bool:
        """Whether the trainer was told that there is no such save."""
        return self.state in {"failed", "skipped", "replaced"}


@dataclass
class Ledger:
    """Every save of a run."""

    entries: dict[tuple[str, int], Entry] = field(default_factory=dict)
    restores: int = 0
    files: dict[str, int] = field(default_factory=dict)  # legacy files by path: how often each was written
    wrong: list[str] = field(default_factory=list)  # violations seen while the load went on
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _seed: int = 0

    def intend(self, experiment: str, step: int, size_bytes: int) -> Entry:
        """Note a save that is about to be made."""
        with self._lock:
            self._seed += 1
            entry = self.entries[experiment, step] = Entry(experiment, step, self._seed, size_bytes)
            return entry

    def told(self, entry: Entry, answer: dict[str, object]) -> None:
        """Note what a trainer was told of its save; a rung that goes down is a violation."""
        with self._lock:
            entry.id = str(answer.get("id") or entry.id)
            level = str(answer["level"])
            if RUNGS.index(level) < RUNGS.index(entry.level):
                self.wrong.append(f"{entry.experiment} step {entry.step} was {entry.level} and is told to be {level}")
            entry.level, entry.state = level, str(answer["state"])
            entry.spooled = entry.spooled or bool(answer["spooled"])

    def restored(self) -> None:
        """Count one load that was compared."""
        with self._lock:
            self.restores += 1

    def complain(self, what: str) -> None:
        """Note a violation."""
        with self._lock:
            self.wrong.append(what)

    def wrote(self, path: str) -> None:
        """Note a legacy file that was written whole."""
        with self._lock:
            self.files[path] = self.files.get(path, 0) + 1

    def acknowledged(self) -> dict[str, str]:
        """Rungs that somebody was told of, by checkpoint id."""
        with self._lock:
            return {e.id: e.level for e in self.entries.values() if e.id and e.level != "none" and not e.refused}

    def of(self, experiment: str) -> Iterator[Entry]:
        """The saves of one experiment."""
        with self._lock:
            found = [entry for (name, _), entry in self.entries.items() if name == experiment]
        return iter(found)

    def at(self, experiment: str, step: int) -> Entry | None:
        """One save."""
        return self.entries.get((experiment, step))

    def counts(self) -> tuple[int, int, int]:
        """How many saves were made, how many of them refused, and how many are of unknown fate."""
        with self._lock:
            every = list(self.entries.values())
        return len(every), sum(e.refused for e in every), sum(e.lost_sight and not e.promised for e in every)
