"""Every degraded state that the daemon knows of without asking anybody: no disk, no catalog, no waiting.

For `ckpt status`, a probe, the service manager's STATUS line and, as a part of more, `ckpt doctor`. What
is over is forgotten; a lag or a jump of the clock is told of for pulse.REMEMBERED_S.
"""

import shlex
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ckptd import failpoint
from ckptd import log as logging
from ckptd.errors import NoSpace
from ckptd.events import Bus
from ckptd.intake.arenas import ArenaPool
from ckptd.intake.follow import sees_all, visible_to
from ckptd.intake.pulse import ANSWER_S, Organs, Pulse
from ckptd.intake.reconcile import Reconciler
from ckptd.intake.spooled import Spool
from ckptd.jobs import FAILING_MAX, Failing, Job
from ckptd.model import JobState
from ckptd.notify import Notifier
from ckptd.pipeline.tools import OnHold, Tools

RESTARTS_LATELY, LATELY_S = 3, 600.0
LINE_CHARS_MAX = 400
NAMED_MAX = 3  # troubles in the one line
FAILING_NAMED = 3  # jobs of those that fail
HELD_NAMED_MAX = 8  # experiments of one user whose plan the brake holds; the others are counted
NOBODY = -1  # the uid of nobody at all
DENIED_S = 60.0  # how long a save without memory is told of

# Check names of `ckpt doctor`, each with what it looks at. A name with " *" is followed by what it is about.
CHECKS = {
    "configuration": "the files that the daemon would read",
    "state directory": "where catalog and spool lie",
    "socket": "the door that clients try, and the directory that it lies in",
    "daemon": "whether one answers, and how fast; else why the last one ended",
    "versions": "whether `ckpt` and the daemon are of one version",
    "catalog": "whether it can be written and read, and how fast",
    "reserve": "the space that is kept for a full disk",
    "sqlite": "the library's version",
    "loop": "whether the daemon's event loop was held up",
    "clock": "whether the wall clock jumped",
    "fd store": "whether saves in memory outlive the daemon's process",
    "arenas": "the memory that saves go to",
    "jobs": "what is queued, what goes on failing, and what gave up",
    "checkpoints": "what is damaged, missing or failed",
    "retention *": "whether the rules would drop so much of an experiment that a person must decide",
    "spool": "saves that no daemon took",
    "events": "whether a subscriber lost some",
    "log": "whether lines were dropped",
    "inotify": "the kernel's limits for watching",
    "fail points": "switches that only tests use",
    "stop": "whether the daemon is ending",
    "mount *": "whether a disk answers",
    "worker *": "whether an I/O worker dies again and again",
    "watching *": "whether changes under a watched root make events",
    "alert *": "limits of `[alerts]` that are passed",
    "root *": "whether a root can be read and written, and has room",
}


@dataclass(frozen=True)
class Trouble:
    """One state that is not as it should be.

    what   a check's name, and what it is about
    do     what a person can do about it
    grave  saves are refused, lost or in danger now; else it is something to know
    owner  the uid whose root or experiment it is about; None: it is everybody's business
    """

    what: str
    why: str
    do: str
    grave: bool = False
    since: datetime | None = None
    owner: int | None = None

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object of a reply."""
        since = None if self.since is None else self.since.isoformat()
        return {"what": self.what, "why": self.why, "do": self.do, "grave": self.grave, "since": since}


@dataclass
class Vitals:
    """What the daemon knows of itself."""

    socket: str
    started_s: float
    draining: bool = False


@dataclass(frozen=True)
class Signs:
    """What is looked at."""

    tools: Tools
    pool: ArenaPool
    reconciler: Reconciler
    spool: Spool
    notifier: Notifier
    bus: Bus
    vitals: Vitals


class Troubles:
    """Knows all of them. `now()` costs microseconds and never waits; `pulse` must run for it to know much."""

    def __init__(self, signs: Signs) -> None:
        """Nothing is looked at yet."""
        self._signs = signs
        self._restarts: dict[str, deque[tuple[float, int]]] = {}
        self.alerts: Callable[[], Iterable[Trouble]] = list  # set by whoever composes the daemon
        tools = signs.tools
        organs = Organs(tools.catalog, tools.jobs, tools.clock, signs.notifier)
        self.pulse = Pulse(organs, lambda: tools.settings().watchdog_lag_s, self.public_line)

    def now(self) -> list[Trouble]:
        """Name everything that is not as it should be, the grave ones first."""
        return self._found(None)

    def _found(self, uid: int | None) -> list[Trouble]:
        found = [
            *self._of_the_catalog(),
            *self._of_the_process(),
            *self._of_memory(),
            *self._of_disks(),
            *failing_jobs([one for one in self.pulse.failing if uid in {None, one.uid}]),
            *self._of_the_spool(),
            *self._of_retention(),
            *self.alerts(),
        ]
        return sorted(found, key=lambda trouble: not trouble.grave)

    def known_to(self, uid: int) -> list[Trouble]:
        """Name those that a user may know of: of other users, no root's path is among them, and no job's error."""
        found = self._found(visible_to(uid))
        return [t for t in found if t.owner is None or sees_all(uid) or sees_all(t.owner) or t.owner == uid]

    def line(self, troubles: list[Trouble] | None = None) -> str:
        """Say in one line how the daemon is, for a probe and for `systemctl status`."""
        troubles = self.now() if troubles is None else troubles
        jobs = self.pulse.jobs
        busy = f"{jobs.get(JobState.QUEUED, 0)} jobs queued, {jobs.get(JobState.RUNNING, 0)} running"
        if not troubles:
            return f"serving; {busy}"
        word = "degraded" if any(trouble.grave for trouble in troubles) else "serving, with warnings"
        named = "; ".join(f"{trouble.what}: {trouble.why}" for trouble in troubles[:NAMED_MAX])
        more = f"; and {len(troubles) - NAMED_MAX} more" if len(troubles) > NAMED_MAX else ""
        return f"{word}: {named}{more}; {busy}"[:LINE_CHARS_MAX]

    def public_line(self) -> str:
        """Say it to everybody on the node, who may all read the service manager's line: no name that a user chose."""
        if self._signs.tools.settings().mode != "system":
            return self.line()
        shown = self.known_to(NOBODY)
        users = [trouble for trouble in self.now() if trouble not in shown]
        if users:
            grave = any(trouble.grave for trouble in users)
            shown.append(Trouble("users", f"{len(users)} of their own", "`ckpt doctor` as root names them", grave))
        return self.line(shown)

    def _of_the_catalog(self) -> Iterator[Trouble]:
        catalog, pulse = self._signs.tools.catalog, self.pulse
        if catalog.trouble is not None:
            error = catalog.trouble.error
            do = error.hint or "look at its directory and at the kernel's log"
            if isinstance(error, NoSpace):
                do = f"free space under {self._signs.tools.settings().state_dir}; nothing needs a restart"
            yield Trouble("catalog", error.message, do, grave=True, since=catalog.trouble.since)
        if pulse.silent_s > ANSWER_S:
            why = f"it has not answered for {pulse.silent_s:.0f} s"
            do = "is the disk of the state directory hung? The service manager restarts the daemon when this lasts"
            yield Trouble("catalog", why, do, grave=True)
        elif pulse.took_s > ANSWER_S:
            why = f"it took {pulse.took_s:.1f} s to answer"
            yield Trouble("catalog", why, "put the state directory on a faster or less busy local disk (CKPTD_DIR)")
        size_bytes, whole = catalog.reserve
        if size_bytes and not whole:
            why = f"{size_bytes / 2**20:.0f} MiB beside the catalog: given back, because the disk is full"
            do = f"free space under {self._signs.tools.settings().state_dir}; the reserve is filled again by itself"
            yield Trouble("reserve", why, do)

    def _of_the_process(self) -> Iterator[Trouble]:
        signs, pulse = self._signs, self.pulse
        if signs.vitals.draining:
            yield Trouble("stop", "the daemon is ending", "start it again, or wait for the next one", grave=True)
        if pulse.lag_s:
            do = "is the machine out of CPU or swapping? A defect if not: please report it with the log"
            yield Trouble("loop", f"the event loop was held up for {pulse.lag_s:.1f} s", do, since=pulse.lagged_at)
        if pulse.jump_s:
            do = "times of this hour's rows may be off by that; graces, leases, order and time-outs are not"
            yield Trouble("clock", f"the wall clock jumped by {pulse.jump_s:+.0f} s", do, since=pulse.jumped_at)
        yield from self._of_the_store()
        armed = failpoint.armed()
        if armed:
            do = f"unset {failpoint.VARIABLE} and restart; it is for tests"
            yield Trouble("fail points", f"armed: {', '.join(armed)}", do, grave=True)
        if signs.bus.missed:
            why = f"{signs.bus.missed} were lost by subscribers that were too slow"
            yield Trouble("events", why, "`ckpt log` has them all: ask again from the last number that was seen")
        if logging.dropped():
            why = f"{logging.dropped()} lines were dropped, because nobody took them"
            yield Trouble("log", why, "is the log's reader stopped, or its disk full? Saves do not wait for it")

    def _of_the_store(self) -> Iterator[Trouble]:
        notifier = self._signs.notifier
        unit = "set FileDescriptorStoreMax in the unit"
        if not notifier.enabled:
            why = "no service manager keeps the arenas over a crash"
            yield Trouble("fd store", why, "start the daemon with `ckptd`, or from its systemd unit")
        elif notifier.trouble is not None:
            why = f"the service manager can't be told: {notifier.trouble}"
            yield Trouble("fd store", why, f"restart the daemon; {unit}", grave=True)
        elif notifier.store_max is None and not notifier.kept:
            why = "the service manager does not say that it keeps descriptors ($FDSTORE is not set)"
            do = f"{unit}; systemd before 254 keeps them, and can't say so"
            yield Trouble("fd store", why, do)
        elif not notifier.has_room():
            why = f"full: {notifier.stored} of {notifier.store_max} are kept; saves beyond that go to the spool"
            yield Trouble("fd store", why, f"{unit} to two for each experiment that runs at a time")

    def _of_memory(self) -> Iterator[Trouble]:
        pool = self._signs.pool
        used = f"{pool.bytes_used / 2**30:.1f} of {self._signs.tools.settings().arenas.bytes_max / 2**30:.1f} GiB are in use"
        ago_s = self._signs.tools.clock.monotonic_s() - pool.denied_s
        if pool.waiting or ago_s < DENIED_S:
            wait = (
                f"{pool.waiting} saves wait for memory" if pool.waiting else f"a save found no memory {ago_s:.0f} s ago"
            )
            do = "what waits too long goes to the spool: raise arenas.bytes_max, save less often, or let the disk catch up"
            yield Trouble("arenas", f"{wait}; {used}", do)

    def _of_disks(self) -> Iterator[Trouble]:
        now_s = self._signs.tools.clock.monotonic_s()
        for worker in self._signs.tools.workers.state():
            if worker.state == "degraded":
                do = "look at the disk or its server; other mounts go on, and it is tried again by itself"
                yield Trouble(f"mount {worker.mount}", "its I/O worker does not answer", do, grave=True)
            seen = self._restarts.setdefault(worker.mount, deque([(now_s, 0)]))
            if seen[-1][1] != worker.restarts:
                seen.append((now_s, worker.restarts))
            while len(seen) > 1 and now_s - seen[1][0] > LATELY_S:
                seen.popleft()
            lately = worker.restarts - seen[0][1]
            if lately >= RESTARTS_LATELY:
                why = f"died or was given up {lately} times in {LATELY_S / 60:.0f} min"
                do = "`ckpt log` tells of each death (worker.lost); what it worked on is tried again, then parked"
                yield Trouble(f"worker {worker.mount}", why, do)
        for path, why in self._signs.reconciler.unseen():
            do = "raise fs.inotify.max_user_watches with sysctl; until then scans find everything, later"
            yield Trouble(f"watching {path}", why, do, owner=self._signs.reconciler.owner(path))
        refused = self._signs.tools.workers.marks.refused()
        for path, error in refused.items():
            why = f"{error.message}; nothing is changed under it, and what is to be saved there waits"
            yield Trouble(f"root {path}", why, error.hint, grave=True, owner=self._signs.reconciler.owner(path))
        for path, why in self._signs.reconciler.problems():
            if path in refused:
                continue
            do = "look at its mount, its permissions and whether the service may write there (ReadWritePaths)"
            yield Trouble(f"root {path}", why, do, grave=True, owner=self._signs.reconciler.owner(path))

    def _of_the_spool(self) -> Iterator[Trouble]:
        refused = self._signs.spool.refused
        if refused:
            path, why = next(iter(refused.items()))
            yield Trouble(
                "spool", f"{len(refused)} files make no sense; {path}: {why}", "look at them, then remove them"
            )

    def _of_retention(self) -> Iterator[Trouble]:
        of_user: defaultdict[int, list[OnHold]] = defaultdict(list)
        for one in self._signs.tools.on_hold.values():
            of_user[one.uid].append(one)
        for uid, held in of_user.items():
            for one in held[:HELD_NAMED_MAX]:
                name = f"{one.project}/{one.name}"
                say = shlex.quote(name)
                why = f"{one.braked.words}; nothing of it is done ({'; '.join(one.braked.why)})"
                do = (
                    f"`ckpt retention plan {say}` shows it, then `ckpt retention apply {say}` carries it out; "
                    "if a rule is wrong, put it right and `ckpt reload`"
                )
                yield Trouble(f"retention {name}", why, do, since=one.since, owner=uid)
            if len(held) > HELD_NAMED_MAX:
                why = "their plans are held as well: each would drop too much at once for nobody to have asked for it"
                more = f"retention {len(held) - HELD_NAMED_MAX} more"
                yield Trouble(more, why, "`ckpt retention plan` names them, then `ckpt retention apply`", owner=uid)


def failing_jobs(found: Sequence[Failing]) -> Iterator[Trouble]:
    """Name in one trouble the jobs that gave up and those that go on failing; none when there are none."""
    if not found:
        return
    parked = sum(one.job.state is JobState.PARKED for one in found)
    again = len(found) - parked
    most = "at least " * (len(found) >= FAILING_MAX)
    counts = [f"{parked} parked"] * bool(parked) + [f"{again} failing again and again"] * bool(again)
    named = "; ".join(_told(one.job) for one in found[:FAILING_NAMED])
    hint = next((str(one.job.error["hint"]) for one in found if one.job.error and one.job.error.get("hint")), "")
    do = "put right what is named: they are tried again by themselves; `ckpt log` says more; `ckpt rm --give-up ID` gives one up"
    yield Trouble("jobs", f"{most}{', '.join(counts)} ({named})", f"{hint}; {do}" if hint else do)


def _told(job: Job) -> str:
    why = (job.error or {}).get("message", "no reason is recorded")
    return f"{job.checkpoint_id[:12]} in {job.stage}: {why}"
