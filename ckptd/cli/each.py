"""Act on many checkpoints, each for itself: what can't be done to one is told, and the others go on."""

import sys
from dataclasses import dataclass, field
from typing import Any

from ckptd.cli import render
from ckptd.cli.daemon_socket import FOREVER_S, Daemon
from ckptd.cli.listing import named
from ckptd.cli.options import Output, asked
from ckptd.errors import CkptdError

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Act:
    """One act on one checkpoint.

    past  as it is told afterwards
    ask   what is asked of the daemon: the op, and what goes with the id
    trial what is asked before anything is done; what is refused there is left out, and named
    """

    word: str
    past: str
    op: str
    body: dict[str, Any] = field(default_factory=dict)
    trial: dict[str, Any] | None = None


REMOVE = Act("remove", "removed", "remove", {"dry_run": False}, {"dry_run": True})


@dataclass(slots=True)
class Result:
    """What became of one act on many: rows that were `wanted`, those `done`, and what kept the others from it."""

    wanted: list[Row]
    done: list[Row] = field(default_factory=list)
    failed: list[tuple[Row, CkptdError]] = field(default_factory=list)


def try_each(daemon: Daemon, act: Act, result: Result) -> None:
    """Ask about each what its trial says, changing nothing; what is refused goes from `wanted` to `failed`."""
    still = []
    for row in result.wanted:
        answer = once(daemon, act.op, row, act.trial or {})
        if isinstance(answer, CkptdError):
            result.failed.append((row, answer))
        else:
            still.append(row)
    result.wanted = still


def do(daemon: Daemon, act: Act, row: Row, result: Result, out: Output) -> None:
    """Act on one checkpoint, and note what came of it."""
    answer = once(daemon, act.op, row, act.body)
    if isinstance(answer, CkptdError):
        result.failed.append((row, answer))
        render.say(f"{named(row)}: {render.escape(answer.message)}")
        return
    result.done.append(row)
    if out.form == "ids":  # one by one: whoever interrupts it knows how far it came
        sys.stdout.write(f"{row['checkpoint']}\n")
        sys.stdout.flush()


def once(daemon: Daemon, op: str, row: Row, body: dict[str, Any]) -> Row | CkptdError:
    """Ask for one act on one checkpoint; return the answer, or what kept it from being done. Unreachable is raised."""
    within_s = asked().or_timeout_s(FOREVER_S)
    try:
        answer: Row = daemon.request(op, {"selector": row["checkpoint"], **body}, within_s=within_s)
    except CkptdError as error:
        if error.code == "unreachable":
            raise
        return error
    damaged = [one for one in answer.get("results") or () if not one["ok"]]
    return CkptdError("it is damaged; `ckpt verify` says where") if damaged else answer


def counted(number: int) -> str:
    """Return "1 checkpoint", "2 checkpoints"."""
    return f"{number} checkpoint{'' if number == 1 else 's'}"
