"""Each degraded state is named, with what to do; the guide knows every check. M162"""

import math
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckptd import failpoint
from ckptd import log as logging
from ckptd.catalog.writer import Trouble as CommitTrouble
from ckptd.errors import CatalogFault, NoSpace, RootDegraded
from ckptd.intake import trouble as troubles
from ckptd.intake.trouble import CHECKS, Signs, Troubles, Vitals
from ckptd.jobs import FAILING_MAX, Failing
from ckptd.model import JobState
from ckptd.pipeline.tools import OnHold
from ckptd.retention import Braked
from ckptd.rules import Rules
from tests.support.catalog import StillClock

GUIDE = Path(__file__).parents[3] / "docs/guide/troubles.md"
OTHER = 4711
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def worker(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"mount": "/mnt/a", "state": "running", "restarts": 0, **given})


class World:
    """A daemon in which all is well; a test makes something not so."""

    def __init__(self) -> None:
        self.clock = StillClock()
        self.catalog = SimpleNamespace(trouble=None, reserve=(1 << 20, True))
        self.pool = SimpleNamespace(waiting=0, bytes_used=0, denied_s=-math.inf)
        self.workers = [worker()]
        self.unseen: list[tuple[str, str]] = []
        self.problems: list[tuple[str, str]] = []
        self.refused: dict[str, RootDegraded] = {}
        self.spool = SimpleNamespace(refused={})
        self.notifier = SimpleNamespace(
            enabled=True, trouble=None, store_max=8, kept=False, stored=1, has_room=lambda: True, watchdog_s=None
        )
        self.bus = SimpleNamespace(missed=0)
        self.vitals = Vitals(socket="/s", started_s=0.0)
        arenas = SimpleNamespace(bytes_max=1 << 30)
        settings: Any = SimpleNamespace(watchdog_lag_s=5.0, state_dir="/state", arenas=arenas, mode="user")
        self.settings = settings
        reconciler: Any = SimpleNamespace(
            unseen=lambda: self.unseen, problems=lambda: self.problems, owner=lambda path: OTHER
        )
        self.tools: Any = SimpleNamespace(
            catalog=self.catalog,
            jobs=None,
            clock=self.clock,
            settings=lambda: settings,
            workers=SimpleNamespace(state=lambda: self.workers, marks=SimpleNamespace(refused=lambda: self.refused)),
            on_hold={},
        )
        parts: Any = (self.pool, reconciler, self.spool, self.notifier, self.bus)
        self.troubles = Troubles(Signs(self.tools, *parts, self.vitals))
        self.pulse = self.troubles.pulse

    def commit_fails(self, error: Any) -> None:
        self.catalog.trouble = CommitTrouble(error, NOW)


def _catalog_full(w: World) -> None:
    w.commit_fails(NoSpace("no space for the catalog"))


def _catalog_damaged(w: World) -> None:
    w.commit_fails(CatalogFault("damaged", hint="run `ckpt rebuild`"))


def _catalog_silent(w: World) -> None:
    w.pulse._asked_s = w.clock.monotonic_s() - 60.0


def _catalog_slow(w: World) -> None:
    w.pulse.took_s = 12.0


def _reserve_gone(w: World) -> None:
    w.catalog.reserve = (1 << 20, False)


def _draining(w: World) -> None:
    w.vitals.draining = True


def _lagged(w: World) -> None:
    w.pulse.lag_s = 9.0


def _jumped(w: World) -> None:
    w.pulse.jump_s = -3600.0


def _no_manager(w: World) -> None:
    w.notifier.enabled = False


def _store_unsaid(w: World) -> None:
    w.notifier.store_max = None


def _store_full(w: World) -> None:
    w.notifier.has_room, w.notifier.stored = lambda: False, 8


def _manager_gone(w: World) -> None:
    w.notifier.trouble = ConnectionRefusedError(111, "refused")


def _events_lost(w: World) -> None:
    w.bus.missed = 3


def _saves_wait(w: World) -> None:
    w.pool.waiting = 2


def _save_denied(w: World) -> None:
    w.pool.denied_s = w.clock.monotonic_s() - 10.0


def _mount_hangs(w: World) -> None:
    w.workers = [worker(state="degraded")]


def _worker_dies(w: World) -> None:
    for restarts in range(1, 5):
        w.workers = [worker(restarts=restarts)]
        w.troubles.now()
        w.clock.pass_s(30.0)


def _unwatched(w: World) -> None:
    w.unseen = [("/runs", "the kernel's watch limit is reached")]


def _root_gone(w: World) -> None:
    w.problems = [("/runs", "root '/runs' does not exist")]


def _root_unmounted(w: World) -> None:
    """Its scans fail of it as well, and it is one trouble."""
    _root_gone(w)
    w.refused["/runs"] = RootDegraded("/runs has no mark", hint="is its disk mounted?")


def failing(uid: int, state: JobState, **error: str) -> Any:
    return Failing(SimpleNamespace(checkpoint_id="c0ffee" * 5, stage="publish", state=state, error=error), uid)  # type: ignore[arg-type]


def _parked(w: World) -> None:
    w.pulse.failing = [failing(OTHER, JobState.PARKED, message="worker lost")]


def _fails_again(w: World) -> None:
    denied = {"message": f"uid {OTHER} may not make /runs/p", "hint": "give it the right to"}
    w.pulse.failing = [failing(OTHER, JobState.QUEUED, **denied)]


def _spool_refused(w: World) -> None:
    w.spool.refused = {"/state/spool/x": "no JSON"}


def on_hold(name: str, uid: int = OTHER) -> OnHold:
    facts: Any = {"drops": 297, "strips": 0, "live": 300, "size_bytes": 1, "limits": "more than a fifth"}
    rules = Rules(keep_last=3)
    return OnHold("p", name, uid, NOW, rules, Braked(why=("the rules keep last 3",), **facts))


def _plan_held(w: World) -> None:
    w.tools.on_hold["e"] = on_hold("run 1")


def test_a_store_that_kept_something_over_a_restart_is_believed_though_nobody_says_so() -> None:
    """systemd before 254 keeps descriptors and has no way to tell."""
    world = World()
    _store_unsaid(world)
    world.notifier.kept = True
    assert world.troubles.now() == []


STATES: list[tuple[Callable[[World], None], str, bool, str]] = [
    (_catalog_full, "catalog", True, "free space under /state"),
    (_catalog_damaged, "catalog", True, "ckpt rebuild"),
    (_catalog_silent, "catalog", True, "hung"),
    (_catalog_slow, "catalog", False, "CKPTD_DIR"),
    (_reserve_gone, "reserve", False, "free space"),
    (_draining, "stop", True, "start it again"),
    (_lagged, "loop", False, "CPU"),
    (_jumped, "clock", False, "order"),
    (_no_manager, "fd store", False, "`ckptd`"),
    (_store_unsaid, "fd store", False, "FileDescriptorStoreMax"),
    (_store_full, "fd store", False, "FileDescriptorStoreMax"),
    (_manager_gone, "fd store", True, "restart"),
    (_events_lost, "events", False, "ckpt log"),
    (_saves_wait, "arenas", False, "arenas.bytes_max"),
    (_save_denied, "arenas", False, "spool"),
    (_mount_hangs, "mount /mnt/a", True, "by itself"),
    (_worker_dies, "worker /mnt/a", False, "ckpt log"),
    (_unwatched, "watching /runs", False, "max_user_watches"),
    (_root_gone, "root /runs", True, "ReadWritePaths"),
    (_root_unmounted, "root /runs", True, "is its disk mounted?"),
    (_parked, "jobs", False, "--give-up"),
    (_fails_again, "jobs", False, "give it the right to; put right"),
    (_spool_refused, "spool", False, "look at them"),
    (
        _plan_held,
        "retention p/run 1",
        False,
        "`ckpt retention plan 'p/run 1'` shows it, then `ckpt retention apply 'p/",
    ),
]


@pytest.mark.parametrize(
    ("harm", "what", "grave", "do"), STATES, ids=[state[0].__name__.strip("_") for state in STATES]
)
def test_each_state_is_named_once_with_what_to_do(
    harm: Callable[[World], None], what: str, *, grave: bool, do: str
) -> None:
    world = World()
    assert world.troubles.now() == []
    assert world.troubles.line().startswith("serving; ")
    harm(world)
    (found,) = world.troubles.now()
    assert (found.what, found.grave) == (what, grave)
    assert do in found.do
    line = world.troubles.line()
    assert line.startswith("degraded: " if grave else "serving, with warnings: ")
    assert f"{what}: {found.why}"[:300] in line


def test_fail_points_and_dropped_lines_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    monkeypatch.setattr(failpoint, "armed", lambda: ("ack.durable",))
    monkeypatch.setattr(logging, "dropped", lambda: 7)
    assert {(t.what, t.grave) for t in world.troubles.now()} == {("fail points", True), ("log", False)}


def test_a_worker_that_died_long_ago_is_no_trouble() -> None:
    world = World()
    _worker_dies(world)
    world.clock.pass_s(troubles.LATELY_S + 100.0)
    assert world.troubles.now() == []


def test_the_grave_ones_come_first_and_the_line_stays_short() -> None:
    world = World()
    for harm in (_lagged, _jumped, _saves_wait, _parked, _root_gone, _mount_hangs):
        harm(world)
    assert [t.grave for t in world.troubles.now()] == [True, True, False, False, False, False]
    line = world.troubles.line()
    assert "and 3 more" in line
    assert len(line) <= troubles.LINE_CHARS_MAX
    assert "\n" not in line


def test_a_user_hears_nothing_of_other_users_roots() -> None:
    """I9: a path is a name that somebody chose."""
    world = World()
    _root_gone(world)
    _unwatched(world)
    _events_lost(world)
    assert [t.what for t in world.troubles.known_to(OTHER + 1)] == ["events"]
    assert "/runs" not in world.troubles.line(world.troubles.known_to(OTHER + 1))
    assert len(world.troubles.known_to(OTHER)) == len(world.troubles.known_to(0)) == 3


def test_a_user_hears_of_the_own_failing_jobs_alone_and_root_of_everybodys() -> None:
    """I9: an error names paths."""
    world = World()
    _fails_again(world)
    world.pulse.failing = [*world.pulse.failing, failing(OTHER + 1, JobState.PARKED, message="worker lost")]
    (mine,), (others,), (all_of_them,) = (world.troubles.known_to(uid) for uid in (OTHER, OTHER + 1, 0))
    assert mine.why == f"1 failing again and again ({'c0ffee' * 2} in publish: uid {OTHER} may not make /runs/p)"
    assert others.why == f"1 parked ({'c0ffee' * 2} in publish: worker lost)"
    assert all_of_them.why.startswith("1 parked, 1 failing again and again (")
    assert world.troubles.known_to(OTHER + 2) == []
    world.pulse.failing = [failing(OTHER, JobState.PARKED, message="worker lost")] * FAILING_MAX
    (many,) = world.troubles.known_to(OTHER)
    assert many.why.startswith(f"at least {FAILING_MAX} parked (")


def test_the_service_managers_line_names_nothing_of_users_on_a_node_of_many() -> None:
    """I9: `systemctl status` shows it to everybody."""
    world = World()
    _fails_again(world)
    _root_gone(world)
    _events_lost(world)
    assert "/runs" in world.troubles.public_line()
    world.settings.mode = "system"
    line = world.troubles.public_line()
    assert line.startswith("degraded: events: ")
    assert "; users: 2 of their own; " in line
    assert "/runs" not in line
    world.problems.clear()
    assert world.troubles.public_line().startswith("serving, with warnings: ")


def test_a_user_hears_of_the_own_held_plans_and_of_many_only_how_many() -> None:
    """A rule for everybody may hold a thousand: the answer stays short."""
    world = World()
    world.tools.on_hold |= {str(number): on_hold(f"run{number}") for number in range(1000)}
    world.tools.on_hold["mine"] = on_hold("mine", OTHER + 1)
    found = world.troubles.known_to(OTHER)
    assert len(found) == troubles.HELD_NAMED_MAX + 1
    assert found[0].why.startswith(
        "it would drop 297 of 300 live checkpoints at once, more than a fifth; nothing of it"
    )
    assert (found[0].what, found[0].since, found[-1].what) == ("retention p/run0", NOW, "retention 992 more")
    assert [one.what for one in world.troubles.known_to(OTHER + 1)] == ["retention p/mine"]


def test_asking_costs_next_to_nothing() -> None:
    """A probe must not be a load: everything comes from memory."""
    world = World()
    _root_gone(world)
    costs_s: list[float] = []  # of one; once may be the collector's look at all that the tests before this one left
    while len(costs_s) < 5 and min(costs_s, default=1.0) >= 0.002:
        begun_s = time.thread_time()
        for _ in range(200):
            world.troubles.line()
        costs_s.append((time.thread_time() - begun_s) / 200)
    assert min(costs_s) < 0.002


def test_the_guide_has_a_row_for_every_check_and_for_nothing_else() -> None:
    section = GUIDE.read_text().partition("## What the checks mean")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert {re.match(r"\| `([^`]+)`", row)[1] for row in rows} == set(CHECKS)  # type: ignore[index]
    assert all(len([cell for cell in row.split("|") if cell.strip()]) == 4 for row in rows)
