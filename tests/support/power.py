"""Rounds of a protocol on a disk whose power fails: one process, one image, hundreds of cuts a second."""

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field

from ckptd.worker import fsync
from tests.support import protocols, tally
from tests.support.disk import Disk
from tests.support.interrupt import Interrupter
from tests.support.protocols import Protocol


@dataclass
class Ground:
    """One disk and what has been tried on it."""

    disk: Disk
    rounds: int = 0
    violations: list[str] = field(default_factory=list)

    def learn(self, protocol: Protocol) -> Interrupter:
        """Run it uninterrupted, cut the power once it was answered, and return what it did."""
        return self._round(protocol, None, frozenset())[0]

    def cut_off(self, protocol: Protocol, at: int) -> None:
        """Cut the power before operation `at`; look; ask again; cut the power once more; look."""
        watched, wrong = self._round(protocol, at, frozenset())
        before = watched.operations[-1]
        self.violations += [f"{self.disk.kind}, {protocol.name} cut before {before} ({at}): {each}" for each in wrong]

    def mutant(self, protocol: Protocol, skip: Collection[int], at: int | None = None) -> list[str]:
        """The same with some fsyncs left out; return what is wrong then."""
        return self._round(protocol, at, frozenset(skip))[1]

    def _round(self, protocol: Protocol, at: int | None, skip: frozenset[int]) -> tuple[Interrupter, list[str]]:
        self.rounds += 1
        cuts = self.disk.cuts
        stage = protocols.opened(self.disk.path / f"round-{self.rounds}")
        try:
            protocol.prepare(stage)
            self.disk.settle()
            with Interrupter(at, self.disk.cut, skip=skip) as watched:
                protocol.act(stage)
            if not watched.struck:
                self.disk.cut()
            self.disk.replay()
            fsync._failed.clear()  # who met the failing disk died with it
            wrong = list(protocol.wrong(stage, done=not watched.struck))
            if not skip:
                protocol.act(stage)
                self.disk.cut_power()
                wrong += [f"asked again: {each}" for each in protocol.wrong(stage, done=True)]
                tally.add("violations", len(wrong))
        finally:
            os.close(stage.fd)
            tally.add(self.disk.counted, self.disk.cuts - cuts)
        for path in (stage.root, stage.spool):
            shutil.rmtree(path, ignore_errors=True)
        return watched, wrong
