"""A node on which processes are killed, and what must be true of it afterwards."""

import fnmatch
import json
import os
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support import invariants, payload, tally
from tests.support.node import Node, arenas_of, eventually
from tests.support.trainer import Nursery, Trainer

PROJECT = "crash"
LOOK_S = 0.01
RETURN_S = 60.0  # what nobody noticed never comes back
RUNGS = ("none", "staged", "durable", "verified", "tiered")
CONFIG = f"""
[[experiments]]
project = "{PROJECT}"
name = "dropped-*"
keep_last = 1
trash_grace_s = 0

[[experiments]]
project = "{PROJECT}"
name = "retired-*"
keep_last = 1
trash_grace_s = 3600
"""


@dataclass
class Saved:
    """What one save must become."""

    id: str
    seed: int
    step: int


class Sentinel:
    """Looks at every final name all the time, whoever is being killed: each is whole at any moment, or absent."""

    def __init__(self, runs: Path) -> None:
        self.violations: list[str] = []
        self.looks = 0
        self._runs = runs
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(LOOK_S):
            for path in self._runs.glob(f"{PROJECT}/*/step_*"):
                self._look(path)

    def _look(self, path: Path) -> None:
        self.looks += 1
        try:
            manifest = json.loads((path / "manifest.json").read_bytes())
            sizes = {file["path"]: (path / file["path"]).stat().st_size for file in manifest["files"]}
        except (OSError, ValueError) as error:
            # Retired between the listing and the look: the name went first, with everything below it.
            if path.exists():
                self.violations.append(f"{path}: {error!r}")
            return
        wrong = {f["path"] for f in manifest["files"] if sizes[f["path"]] != f["size_bytes"]}
        if wrong:
            self.violations.append(f"{path}: {wrong} shorter or longer than the manifest says")

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


class Battlefield:
    """with Battlefield(nursery) as field: one node for many deaths, each in an experiment of its own."""

    def __init__(self, nursery: Nursery) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="ck"))
        self.node = Node(self.dir, more=CONFIG)
        self.nursery = nursery
        self.sentinel = Sentinel(self.node.runs)
        self.kills: Counter[str] = Counter()
        self.acknowledged: dict[str, str] = {}  # the rung that somebody was told of, by checkpoint
        self._names = Counter[str]()
        self._seeds = 0

    def __enter__(self) -> Self:
        self.node.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        print(dict(self.kills), self.sentinel.looks, "looks at final names")
        try:
            if kind is None:
                self.assert_swept()
            else:
                print(self.node.tail())
        finally:
            self.sentinel.stop()
            tally.add("kills", self.kills.total())
            tally.add("violations", len(self.sentinel.violations))
            self.node.clean_up()
            self.node.remove()
        assert not self.sentinel.violations, self.sentinel.violations

    def seed(self) -> int:
        """A seed nobody has used."""
        self._seeds += 1
        return self._seeds

    def trainer(self, name: str) -> tuple[Trainer, str]:
        """A training process with an open experiment of its own."""
        self._names[name] += 1
        name = f"{name}-{self._names[name]}"
        trainer = self.nursery.trainer(self.node.environ)
        trainer.open(name=name, project=PROJECT, dir=str(self.node.runs))
        return trainer, name

    def ready_trainer(self, name: str) -> tuple[Trainer, str]:
        """The same, with an arena leased and mapped: the next save waits for nobody."""
        trainer, name = self.trainer(name)
        assert trainer.prepare(seed=1)["ready"]
        return trainer, name

    def save(self, trainer: Trainer, step: int = 1, **given: Any) -> Saved:
        """Let a trainer save; its state is written over as soon as save() has returned."""
        seed = self.seed()
        answer = trainer.save(seed=seed, step=step, scribble=True, **given)
        return Saved(answer["id"], seed, step)

    def save_and_die(self, trainer: Trainer, name: str, die: str, **given: Any) -> Saved:
        """The same with a trainer that dies of it; its checkpoint's id is not known until it is found."""
        seed = self.seed()
        assert trainer.dies_of("save", seed=seed, step=1, die=die, **given)["in_arena"]
        self.kills["trainer"] += 1
        return Saved(self.only_row(name)["checkpoint"], seed, 1)

    def only_row(self, name: str) -> dict[str, Any]:
        """Return the experiment's row once there is one; AssertionError when there are more."""
        rows = eventually(lambda: self.node.rows(PROJECT, name), f"a row of {name}")
        assert len(rows) == 1, rows
        found: dict[str, Any] = rows[0]
        return found

    def directory(self, name: str) -> Path:
        """Where an experiment is published."""
        return self.node.runs / PROJECT / name

    def plan_deaths(self, entries: list[str]) -> None:
        """Arm several points at once, as "name:n=action"; each name once, each takes effect once."""
        self.node._write_plan(",".join(entries))

    def still_planned(self) -> set[str]:
        """Names of the armed points that nobody has reached so often."""
        return {entry.partition("=")[0].partition(":")[0] for entry in self.node.plan.read_text().split(",") if entry}

    # -- what must be true -------------------------------------------------------------------

    def assert_arrived(self, name: str, *saves: Saved, perhaps_step: int | None = None) -> None:
        """Each save is there once, verified, byte for byte; nothing else is; the ladder was only climbed.

        perhaps_step  a save that nobody had promised anything for: it may be there, and then it is whole
        """
        for saved in saves:
            self.node.wait_level(saved.id)
        self.node.wait_idle()
        rows = self.node.rows(PROJECT, name)
        names = sorted(Path(row["path"]).name for row in rows)
        rows = [row for row in rows if row["step"] != perhaps_step]
        assert [(row["checkpoint"], row["step"]) for row in rows] == [(saved.id, saved.step) for saved in saves]
        for row, saved in zip(rows, saves, strict=True):
            assert (row["state"], row["level"]) == ("live", "verified")
            manifest = payload.check_saved(Path(row["path"]), saved.seed)
            assert manifest["checkpoint"] == saved.id
            self._assert_told_once(saved.id)
            self.acknowledged[saved.id] = "verified"
        assert self.final_names(name) == names
        assert not self.sentinel.violations, self.sentinel.violations

    def _assert_told_once(self, checkpoint: str) -> None:
        told = Counter(e["event"] for e in self.node.events() if e["checkpoint"] == checkpoint)
        once = {"checkpoint.staged": 1, "checkpoint.published": 1, "checkpoint.verified": 1}
        assert {name: told[name] for name in once} == once, told

    def assert_promises(self) -> None:
        """Every invariant holds, for all that this node ever did."""
        found = invariants.violations(self.node, self.acknowledged)
        tally.add("violations", len(found))
        assert not found, "\n".join(found)

    def final_names(self, name: str) -> list[str]:
        """What lies beside an experiment's links and our own temporary directories."""
        try:
            found = os.listdir(self.directory(name))
        except FileNotFoundError:
            return []
        return sorted(each for each in found if not each.startswith(".") and each not in {"latest", "best"})

    def assert_never_lower(self, pushes: list[list[str]]) -> None:
        """What a trainer was told of one checkpoint never takes back a rung."""
        ranks = [RUNGS.index(level) for level, _ in pushes]
        assert ranks == sorted(ranks), pushes

    def assert_memory_returned(self) -> None:
        """No trainer is left: nothing is lent, and nobody holds memory that status does not know of."""

        seen: dict[str, Any] = {}

        def returned() -> bool:
            now = self.node.wait_idle()
            assert self.node.supervisor is not None
            seen.update(now["arenas"])
            seen["daemon"], seen["store"] = arenas_of(now["daemon"]["pid"]), arenas_of(self.node.supervisor.pid)
            return seen["leased"] == 0 and seen["daemon"] == seen["store"] and len(seen["store"]) == seen["count"]

        try:
            eventually(returned, "the arenas of dead trainers to come back", RETURN_S)
        except AssertionError as error:
            raise AssertionError(f"{error}: {seen}") from error

    def temporaries(self) -> list[Path]:
        """Our own temporary directories and links that nobody has swept yet."""
        found = []
        for place, directories, files in os.walk(self.node.runs):  # passes over what the sweep takes away meanwhile
            if os.path.basename(place) != ".ckptd-trash":
                names = fnmatch.filter([*directories, *files], ".*.ckptd-tmp-*")
                found += [Path(place) / name for name in names]
        return found

    def assert_swept(self) -> None:
        """The daemon removes what dead publishes left, once it is old enough."""
        self.node.wait_idle()
        eventually(lambda: not self.temporaries(), "the sweep", 120.0)
        assert not list(self.node.spool.iterdir())
