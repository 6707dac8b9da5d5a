"""Every request of the wire as a type: decoding is validation. docs/reference/wire.md describes them.

Unknown fields are allowed on purpose: a newer client may say more than this daemon knows.
"""

from datetime import datetime
from typing import Annotated, Any, Literal, Union

import msgspec

from ckptd.errors import BadRequest, UnsupportedVersion
from ckptd.intake import bestrequests as best
from ckptd.intake import fields
from ckptd.intake import hookrequests as hooks
from ckptd.intake import retentionrequests as keeping
from ckptd.intake import sweeprequests as sweeps
from ckptd.intake.fields import (
    PAGE_MAX,
    POINTS_MAX,
    Count,
    Id,
    Metrics,
    Name,
    Number,
    PathText,
    Step,
    Tags,
    Text,
    UnixTime,
    Whole,
)
from ckptd_client import wire

Request = fields.Request
Selecting = fields.Selecting


class Hello(Request, frozen=True, tag="hello"):
    """Who are you, and which protocol versions do you speak?"""

    versions: Annotated[list[Whole], msgspec.Meta(max_length=64)]
    client: Text = ""
    pid: Whole = 0


class ExperimentOpen(Request, frozen=True, tag="experiment.open"):
    """Open or go on with an experiment."""

    experiment: Id
    name: Name
    project: Name
    dir: PathText
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    tags: Tags = msgspec.field(default_factory=list)
    parent: str | None = None
    facts: dict[str, Any] = msgspec.field(default_factory=dict)
    resume: Literal["allow", "never", "must"] = "allow"


class ExperimentBeat(Request, frozen=True, tag="experiment.beat"):
    """Still training."""

    experiment: Id
    step: Step | None = None
    rss_bytes: Count | None = None


class ExperimentClose(Request, frozen=True, tag="experiment.close"):
    """Training ended."""

    experiment: Id
    status: Literal["completed", "failed"]
    error: Text | None = None


class ExperimentTag(Request, frozen=True, tag="experiment.tag"):
    """Add and remove tags."""

    experiment: Id
    add: Tags = msgspec.field(default_factory=list)
    remove: Tags = msgspec.field(default_factory=list)


class Lease(Request, frozen=True, tag="lease"):
    """Lend me an arena; the answer may come late."""

    experiment: Id
    size_bytes: Annotated[int, msgspec.Meta(gt=0, le=(1 << 50))]
    wait_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Commit(Request, frozen=True, tag="commit"):
    """The arena holds a whole save."""

    experiment: Id
    checkpoint: Id
    arena: Id
    generation: Count
    stall_s: float | None = None  # any number: a save is never refused for what it says about itself


class Abandon(Request, frozen=True, tag="abandon"):
    """Take the arena back; nothing was saved in it."""

    arena: Id
    generation: Count


class Submit(Request, frozen=True, tag="submit"):
    """Take in files that I wrote."""

    path: PathText
    checkpoint: Id
    project: Name | None = None
    experiment: Name | None = None
    step: Step | None = None
    epoch: float | None = None
    metrics: Metrics = msgspec.field(default_factory=dict)
    note: Text = ""
    meta: dict[str, Any] = msgspec.field(default_factory=dict)
    update_best: bool = True


class Attach(Selecting, frozen=True, tag="attach"):
    """Map a hot copy, or say where the files are; holds the checkpoint until `detach`."""

    read: Id | None = None


class Detach(Request, frozen=True, tag="detach"):
    """Stop reading."""

    read: Id | None = None
    checkpoint: Id | None = None


class Resolve(Selecting, frozen=True, tag="resolve"):
    """Which checkpoint is it, and where?"""

    level: Literal["durable", "verified"] = "verified"


class Follow(Request, frozen=True, tag="watch"):
    """Tell me when these climb or fail."""

    checkpoints: Annotated[list[Id], msgspec.Meta(max_length=1024)]


class MetricPoints(Request, frozen=True, tag="metrics"):
    """Metric points of a training loop."""

    experiment: Id
    points: Annotated[
        list[tuple[Annotated[str, msgspec.Meta(max_length=256)], Whole | None, Number, UnixTime]],
        msgspec.Meta(max_length=POINTS_MAX),
    ]


class CheckpointMetrics(Request, frozen=True, tag="checkpoint.metrics"):
    """Metrics known only after the save."""

    checkpoint: Id
    metrics: Metrics


class Report(Request, frozen=True, tag="report"):
    """A reader found damage."""

    checkpoint: Id
    problem: dict[str, Any]


class Replace(Request, frozen=True, tag="replace"):
    """Drop the oldest staged save of this experiment that nobody waits for."""

    experiment: Id


class Status(Request, frozen=True, tag="status"):
    """How is the daemon?"""


class Health(Request, frozen=True, tag="health"):
    """Is the daemon alive and well? Costs it nothing."""


class List(Request, frozen=True, tag="list"):
    """Page through checkpoints."""

    project: str | None = None
    name: str | None = None
    state: str | None = None
    level: str | None = None
    tag: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = 50
    after: str | None = None
    sort: Literal["newest", "step"] = "newest"


class Experiments(Request, frozen=True, tag="experiments"):
    """Page through experiments."""

    project: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = 50
    after: str | None = None


class Summary(Request, frozen=True, tag="summary"):
    """How many checkpoints are there, how large, how good?"""

    project: str | None = None
    name: str | None = None


class Show(Selecting, frozen=True, tag="show"):
    """Everything about one checkpoint."""


class Verify(Selecting, frozen=True, tag="verify"):
    """Read back and compare now; the answer comes when it is done."""


class Wait(Selecting, frozen=True, tag="wait"):
    """Answer when the checkpoint has reached a level, or can't any more."""

    checkpoint: Id | None = None
    level: Literal["staged", "durable", "verified"] = "durable"
    timeout_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0


class Pin(Selecting, frozen=True, tag="pin"):
    """Hold a checkpoint by hand."""

    note: Text = ""


class Unpin(Selecting, frozen=True, tag="unpin"):
    """Lift a hold."""

    note: Text = ""


class Unveto(Selecting, frozen=True, tag="unveto"):
    """Let a checkpoint count, whatever a hook said of its save."""

    note: Text = ""


class Remove(Selecting, frozen=True, tag="remove"):
    """Move one checkpoint to the trash; with `state` only while it is in that one; `give_up` ends only one that is on its way."""

    dry_run: bool = False
    state: str | None = None
    give_up: bool = False


class Events(Request, frozen=True, tag="events"):
    """Recent events; with follow, also those to come."""

    since_seq: Count | None = None
    since: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = 100
    follow: bool = False


class Audit(Request, frozen=True, tag="audit"):
    """Who did what."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = 100
    after: str | None = None


class Stats(Request, frozen=True, tag="stats"):
    """How fast, how much, how full?"""

    project: str | None = None
    name: str | None = None
    since_s: Annotated[float, msgspec.Meta(gt=0, le=3_153_600_000)] | None = None


class CacheList(Request, frozen=True, tag="cache"):
    """What was fetched back from an archive and is kept on a local disk?"""


class CacheTrim(Request, frozen=True, tag="cache.trim"):
    """Give up the longest unused of it until it fits."""

    to_bytes: Count


class Doctor(Request, frozen=True, tag="doctor"):
    """Check everything that can be checked from inside."""


class Rebuild(Request, frozen=True, tag="rebuild"):
    """Read manifests on disk back into the catalog."""

    root: PathText | None = None


class RootAdd(Request, frozen=True, tag="root.add"):
    """Manage or watch one more tree."""

    path: PathText
    kind: Literal["managed", "watched"] = "watched"
    project: str = ""


class Roots(Request, frozen=True, tag="roots"):
    """Which trees are managed or watched?"""


class Tail(Request, frozen=True, tag="metrics.tail"):
    """Metric points of an experiment that arrived after a cursor, oldest first."""

    project: str | None = None
    name: str | None = None
    experiment: Id | None = None
    after: Count | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = 100


class Stop(Request, frozen=True, tag="stop"):
    """Drain and end."""


class Reload(Request, frozen=True, tag="reload"):
    """Read the configuration again."""


ALL: tuple[type[Request], ...] = (
    Hello, ExperimentOpen, ExperimentBeat, ExperimentClose, ExperimentTag, Lease, Commit, Abandon, Submit,
    Attach, Detach, Resolve, Follow, MetricPoints, CheckpointMetrics, Report, Replace, Status, Health, List, Experiments,
    Summary, Show, Verify, Wait, Pin, Unpin, Unveto, Remove, *keeping.ALL, Events, Audit, Stats, CacheList, CacheTrim, Doctor,
    Rebuild, RootAdd, Roots, Tail,
    Stop, Reload, *hooks.ALL, *best.ALL, sweeps.Grid, sweeps.Recovery,
)  # fmt: skip

_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(type=Union[ALL])  # noqa: UP007 - built from a tuple


class _Envelope(msgspec.Struct):
    id: Whole | None = None
    op: str = ""
    v: Whole = wire.VERSION


_envelopes = msgspec.json.Decoder(_Envelope)


def request_id(frame: bytes) -> int | None:
    """Find the id of a frame that could not be decoded whole, so that its sender gets an answer."""
    try:
        return _envelopes.decode(frame).id
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


def decode(frame: bytes) -> Request:
    """Turn one frame into its request. BadRequest names the field that is wrong."""
    try:
        request: Request = _decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        added = hooks.extension(frame)
        if added is None:
            raise BadRequest(str(error) or type(error).__name__, hint="see docs/reference/wire.md") from error
        request = added
    if request.v != wire.VERSION:
        raise UnsupportedVersion(f"this daemon speaks version {wire.VERSION}, the frame says {request.v}")
    for free in ("config", "facts", "meta", "problem", "data"):
        value = getattr(request, free, None)
        if value is not None:
            check_depth(free, value)
    try:
        wire.check_depth(frame)  # also what lies in fields that this daemon does not know
        wire.check_keys(frame)
    except wire.FrameError as error:
        raise BadRequest(str(error), hint="see docs/reference/wire.md") from error
    return request


def check_depth(what: str, value: Any) -> None:
    """BadRequest when a decoded value nests deeper than DEPTH_MAX. No recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        if depth > wire.DEPTH_MAX:
            raise BadRequest(f"{what} nests deeper than {wire.DEPTH_MAX}")
        nested: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                nested += [v for v in item.values() if isinstance(v, dict | list)]
            elif isinstance(item, list):
                nested += [v for v in item if isinstance(v, dict | list)]
        level = nested
