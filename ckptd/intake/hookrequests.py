"""Requests about hooks, and what readers say of their loads."""

from typing import Annotated, Any, Literal

import msgspec

from ckptd.hookconfig import VERB_PATTERN
from ckptd.intake.fields import PAGE_MAX, Id, Request, Whole
from ckptd_client import wire

HookName = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Duration = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
TEXT_MAX = 4000


class Loaded(Request, frozen=True, tag="loaded"):
    """A reader has loaded a checkpoint, or could not; its answer matters to nobody."""

    checkpoint: Id
    ok: bool = True
    ms: Duration = 0.0
    hot: bool = False
    error: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)] = ""


class Hooks(Request, frozen=True, tag="hooks"):
    """Which hooks are there, do they run, and how do they do?"""


class HookTest(Request, frozen=True, tag="hooks.test"):
    """Run one hook now with a made-up or a real checkpoint; nothing is counted and a veto changes nothing."""

    hook: HookName
    event: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    checkpoint: Id | None = None
    data: dict[str, Any] = msgspec.field(default_factory=dict)


class HookSwitch(Request, frozen=True, tag="hooks.switch"):
    """Let a hook run, or rest, from now on and after restarts."""

    hook: HookName
    enabled: bool


class HookRuns(Request, frozen=True, tag="hooks.log"):
    """Recent runs, newest first."""

    hook: HookName | None = None
    outcome: Literal["ok", "skipped", "failed", "timeout", "vetoed", "open"] | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = 50
    after: str | None = None


class Extension(Request, frozen=True, tag="x-"):
    """A verb that a plug-in adds. Built-in verbs never begin with "x-", so that none can be taken."""

    verb: str = ""
    data: dict[str, Any] = msgspec.field(default_factory=dict)


class _Added(msgspec.Struct):
    op: Annotated[str, msgspec.Meta(pattern=VERB_PATTERN)]
    id: Whole
    v: Whole = wire.VERSION
    data: dict[str, Any] = msgspec.field(default_factory=dict)


_added = msgspec.json.Decoder(_Added)


def extension(frame: bytes) -> Extension | None:
    """Decode a request for a plug-in's verb; None when it is none."""
    try:
        found = _added.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return Extension(id=found.id, v=found.v, verb=found.op, data=found.data)


ALL: tuple[type[Request], ...] = (Loaded, Hooks, HookTest, HookSwitch, HookRuns)
