"""The nouns of ckptd and the tables of their transitions. No I/O, no clock.

A checkpoint's `level` is the highest rung of the ladder it holds; its `state` says what is the
matter with it. The two tables below are the only places that say what may follow what; the
diagrams in docs/design/handoff.md are drawn from them.
"""

import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Protocol

from ckptd.errors import Bug

STEP_DIGITS = 10
_ID = re.compile(r"[0-9a-f]{32}")


class Level(StrEnum):
    """The ladder. A rung once reported is never silently lost."""

    NONE = "none"
    STAGED = "staged"
    DURABLE = "durable"
    VERIFIED = "verified"
    TIERED = "tiered"

    @property
    def rank(self) -> int:
        """Position on the ladder, NONE being 0."""
        return LADDER.index(self)


LADDER = (Level.NONE, Level.STAGED, Level.DURABLE, Level.VERIFIED, Level.TIERED)


class State(StrEnum):
    """What is the matter with a checkpoint."""

    PENDING = "pending"  # on its way: bytes in an arena, or a file that may still be written
    LIVE = "live"  # durable under its final name
    CORRUPT = "corrupt"  # its bytes no longer match their digest
    MISSING = "missing"  # its files are gone, and not by us
    FAILED = "failed"  # it never became durable; `error` says why
    REPLACED = "replaced"  # dropped before durable, for a newer save (on_overlap = "replace")
    TRASHED = "trashed"  # retired; can be restored until its grace ends
    DROPPED = "dropped"  # retired and unlinked


STATE_TRANSITIONS: dict[State, frozenset[State]] = {
    State.PENDING: frozenset({State.LIVE, State.FAILED, State.REPLACED, State.CORRUPT, State.MISSING}),
    State.LIVE: frozenset({State.CORRUPT, State.MISSING, State.TRASHED}),
    State.CORRUPT: frozenset({State.LIVE, State.MISSING, State.TRASHED}),
    State.MISSING: frozenset({State.LIVE, State.CORRUPT, State.DROPPED}),
    State.FAILED: frozenset({State.PENDING, State.DROPPED}),
    State.REPLACED: frozenset(),
    State.TRASHED: frozenset({State.LIVE, State.CORRUPT, State.DROPPED, State.MISSING}),
    State.DROPPED: frozenset(),
}


def check_transition(old: State, new: State) -> None:
    """Bug unless a checkpoint in `old` may go to `new` (staying is always allowed)."""
    if new != old and new not in STATE_TRANSITIONS[old]:
        message = f"a checkpoint can't go from {old} to {new}"
        raise Bug(message)


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"  # may be claimed once `not_before` has passed
    RUNNING = "running"  # claimed; its lease runs
    DONE = "done"
    PARKED = "parked"  # gave up; a person or a new event must wake it


JOB_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.PARKED, JobState.DONE}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.DONE, JobState.PARKED}),
    JobState.DONE: frozenset(),
    JobState.PARKED: frozenset({JobState.QUEUED, JobState.DONE}),
}


class Origin(StrEnum):
    """Through which door a checkpoint came."""

    MEMORY = "memory"
    FILE = "file"
    WATCH = "watch"
    REBUILD = "rebuild"


class ExperimentStatus(StrEnum):
    """What an experiment's training process is doing."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    LOST = "lost"  # the process is gone without a word


class RootKind(StrEnum):
    """MANAGED: ckptd writes here. WATCHED: others write, ckptd looks. SUBMITTED: single files were
    handed in; nothing else under it is looked at, and nothing of it is ever removed.
    """

    MANAGED = "managed"
    WATCHED = "watched"
    SUBMITTED = "submitted"


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing wrong with one file. `mib` lists the damaged MiB, counted from 0."""

    file: str
    kind: Literal["missing", "size", "digest", "unreadable", "format"]
    detail: str = ""
    mib: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint, as its manifest records it.

    path    relative to the checkpoint's directory ("" when the checkpoint is a single file),
            "/"-separated, no ".."
    sha256  64 hex digits, equal to what `sha256sum` prints
    xxh3    16 hex digits of xxh3-64 for each MiB, in order: names the damaged MiB
    """

    path: str
    size_bytes: int
    sha256: str
    xxh3: tuple[str, ...] = ()


class Seen(Protocol):
    """An identity, however it came here."""

    @property
    def ino(self) -> int:
        """Its inode's number."""

    @property
    def size_bytes(self) -> int:
        """Its length; of a directory the sum of its files'."""

    @property
    def mtime_ns(self) -> int:
        """When it was last written to; of a directory the newest of its files' times and its own."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which bytes were meant: recorded at publish, compared before anything is removed."""

    dev: int
    ino: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    def means(self, seen: Seen) -> bool:
        """Whether these are the same bytes: the same inode, size and time of writing.

        `dev` is left out, since many file systems get another number with each mount, and `ctime_ns`:
        a chmod, a link or a rename writes nothing.
        """
        return (self.ino, self.size_bytes, self.mtime_ns) == (seen.ino, seen.size_bytes, seen.mtime_ns)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One row of the catalog, as every reader gets it."""

    id: str
    experiment_id: str
    project: str
    experiment: str
    state: State
    level: Level
    origin: Origin
    root: str
    path: str  # absolute; "" until it has a final name
    step: int | None
    epoch: float | None
    revision: int
    size_bytes: int
    format: str
    created_at: datetime
    staged_at: datetime | None = None
    durable_at: datetime | None = None
    verified_at: datetime | None = None
    trashed_at: datetime | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    parent_id: str | None = None
    update_best: bool = True
    error: dict[str, Any] | None = None
    sequence: int = 0  # order of arrival in the catalog; the truth where clocks disagree
    segment: int = 1  # which execution of the experiment saved it; a later one is newer whatever its steps
    veto: str | None = None  # the hook that keeps it from being latest or best, and why; its bytes are as safe as any

    @property
    def is_whole(self) -> bool:
        """The one test for "may be loaded": live, and read back with its digest."""
        return self.state is State.LIVE and self.level.rank >= Level.VERIFIED.rank

    @property
    def is_good(self) -> bool:
        """The one test for "may be relied on, as the latest or the best": whole, and no hook objects."""
        return self.is_whole and self.veto is None


def new_id() -> str:
    """Return a fresh 128-bit id, 32 hex digits."""
    return secrets.token_hex(16)


def is_id(text: str) -> bool:
    """Say whether `text` is a whole id."""
    return _ID.fullmatch(text) is not None


def step_name(step: int | None, revision: int, checkpoint_id: str) -> str:
    """Name of a managed checkpoint's directory; names sort as steps do up to 10^10 steps.

    >>> step_name(1000, 1, "ab" * 16)
    'step_0000001000'
    >>> step_name(1000, 2, "ab" * 16)
    'step_0000001000_r2'
    """
    stem = f"step_{step:0{STEP_DIGITS}d}" if step is not None else f"ckpt_{checkpoint_id[:12]}"
    return stem if revision == 1 else f"{stem}_r{revision}"
