"""Looking on: status, wait, log."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import click

from ckptd.cli import render
from ckptd.cli.daemon_socket import Daemon, connect
from ckptd.cli.options import Output, asked, output, selecting, span_s, verb
from ckptd.clock import Clock, SystemClock
from ckptd.errors import BadRequest, CkptdError, Corrupt, TimedOut, Unreachable

WAIT_S = 24 * 3600.0  # `ckpt wait` without --timeout
WAIT_ASK_S = 30.0  # one request of it; a daemon that restarts in between is asked again
AWAY_S = 60.0  # how long `wait` and `log -f` go on looking for a daemon that went away
AWAY_PAUSE_S = 0.5
GRACE_S = 5.0  # beyond the time the daemon itself was given for an answer
EVENTS = 100
PROBE_S = 5.0

Row = dict[str, Any]


@verb(
    ("ckpt status", "a page for people"),
    ("ckpt status --json | jq .jobs", "for a program"),
    ("ckpt status --probe", "one line; exit 0 when all is well, 1 when not"),
)
@click.option("--probe", is_flag=True, help="Ask only whether it is alive and well; touches no disk.")
@output()
def status(out: Output, *, probe: bool) -> int:
    """What the daemon is doing: arenas, jobs, roots, experiments, disks.

    With --probe the exit code is 1 as well when no daemon answers within --timeout (5 s without it).
    """
    if probe:
        return _probe(out)
    with connect() as daemon:
        body = daemon.request("status")
    if not out.json(body):
        from ckptd.cli.describing import describe_status

        render.print_lines(out.screen, describe_status(body, out.screen))
    return 0


def _probe(out: Output) -> int:
    """Ask for one line. Nothing that goes wrong is more than that: who probes wants an exit code."""
    try:
        with connect() as daemon:
            body = daemon.request("health", within_s=asked().or_timeout_s(PROBE_S))
    except CkptdError as error:
        body = {"well": False, "line": error.message, "degraded": []}
    if not out.json(body):
        sys.stdout.write(render.escape(str(body["line"])) + "\n")
    return 0 if body["well"] else CkptdError.exit_code


@verb(
    ("ckpt wait 6f1c0e", "until it is durable"),
    ("ckpt wait imagenet/resnet50 --level verified --timeout 10m", "until it was read back"),
)
@selecting
@click.option("--level", type=click.Choice(["staged", "durable", "verified"]), default="durable", show_default=True)
@output(ids=True)
def wait(where: dict[str, str | None], level: str, out: Output) -> None:
    """Wait until a checkpoint is durable, or better.

    Exit code 1 when it can never be, 4 when it is damaged, 6 after --timeout (a day without it). In a pipe: id,
    level, state and path, separated by tabs.
    """
    reached = await_level(where, level)
    print_reached(reached, out)
    raise_if_lost(reached)


def await_level(where: dict[str, str | None], level: str) -> Row:
    """Wait for a level under --timeout; a daemon that restarts meanwhile is waited for too.

    TimedOut, NotFound, Unreachable (never there, or away for AWAY_S).
    """
    clock = SystemClock()
    deadline = clock.monotonic_s() + asked().or_timeout_s(WAIT_S)
    for daemon in sessions(clock):
        while True:
            left_s = max(0.0, deadline - clock.monotonic_s())
            ask_s = min(left_s, WAIT_ASK_S)
            try:
                return daemon.request("wait", {"timeout_s": ask_s, "level": level, **where}, within_s=ask_s + GRACE_S)
            except TimedOut:
                if left_s <= WAIT_ASK_S:
                    raise
            except Unreachable:
                if left_s <= 0:
                    raise
                break
    raise AssertionError  # sessions() ends only by raising


def sessions(clock: Clock) -> Iterator[Daemon]:
    """Yield a connection, and another one each time the caller found the one before lost.

    Unreachable at once when there is no daemon to begin with, later when it stays away for AWAY_S.
    """
    daemon = _answering()
    while True:
        with daemon:
            yield daemon
        since = clock.monotonic_s()
        while True:
            pause()
            try:
                daemon = _answering()
                break
            except Unreachable:
                if clock.monotonic_s() - since > AWAY_S:
                    raise


def _answering() -> Daemon:
    """Connect, and see that a daemon speaks there. One that starts is waited for by whatever it is asked next."""
    daemon = connect()
    try:
        with suppress(TimedOut):
            daemon.greet()
    except BaseException:
        daemon.close()
        raise
    return daemon


def pause() -> None:
    """Wait a moment before the daemon is looked for again."""
    import time

    time.sleep(AWAY_PAUSE_S)


def print_reached(reached: Row, out: Output) -> None:
    """Print what `wait` was answered."""
    if out.json(reached):
        return
    if out.form == "ids":
        sys.stdout.write(f"{reached['checkpoint']}\n")
        return
    words = (reached["checkpoint"], reached.get("level"), reached.get("state"), reached.get("path"))
    separator = "  " if out.screen.terminal else "\t"
    sys.stdout.write(separator.join(render.escape("" if word is None else word) for word in words) + "\n")


def raise_if_lost(reached: Row) -> None:
    """Raise what became of a checkpoint that can't reach the level any more."""
    state, error = reached.get("state"), reached.get("error") or {}
    message = f"checkpoint {reached['checkpoint']} is {state}" + (f": {error['message']}" if "message" in error else "")
    if state in {"corrupt", "missing"}:
        raise Corrupt(message)
    if state not in {"pending", "live"}:
        raise CkptdError(message)


@verb(
    ("ckpt log", "the newest events"),
    ("ckpt log -f", "and those to come"),
    ("ckpt log --since 1h --jsonl", "the last hour, for a program"),
    ("ckpt log --audit", "who pinned, removed, configured"),
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on.")
@click.option("--audit", is_flag=True, help="Who did what, instead of what happened.")
@click.option(
    "--since",
    metavar="WHEN",
    help="Those after a span such as 1h, an ISO time or an event's number, the oldest first.",
)
@click.option("-n", "--limit", type=click.IntRange(1, 500), default=EVENTS, show_default=True, help="How many at most.")
@output(lines=True)
def log(since: str | None, limit: int, out: Output, *, follow: bool, audit: bool) -> None:
    """What happened: events, or with --audit who did what."""
    if follow and (audit or out.form == "json"):
        message = "-f goes with neither --audit nor --json; use --jsonl"
        raise BadRequest(message)
    if audit:
        _print_audit(limit, out)
        return
    start, since_at = _start(since)
    if follow:
        for event in _followed(start, limit):
            if _is_since(event, since_at):
                _print_event(event, out)
                sys.stdout.flush()
        return
    with connect() as daemon:
        body = daemon.request("events", {"limit": limit, "follow": False, **start})
    events = [event for event in body["events"] if _is_since(event, since_at)]
    if out.json({**body, "events": events}):
        return
    if out.form == "jsonl":
        for event in events:
            _print_event(event, out)
        return
    render.print_lines(out.screen, [event_line(event, out.screen) for event in events])
    if start and body.get("next") is not None:
        render.say(f"there are more than these {len(events)}: --since {body['next']}, or --limit N")


def _start(since: str | None) -> tuple[Row, str]:
    """Split --since into what the daemon is asked for and the ISO time before which events are left out.

    BadRequest when it is no number, no span and no time.
    """
    if since is None:
        return {}, ""
    if since.isdecimal():
        return {"since_seq": int(since)}, ""
    from datetime import UTC, datetime, timedelta

    try:
        found = SystemClock().now() - timedelta(seconds=span_s(since))
    except ValueError:
        try:
            found = datetime.fromisoformat(since)
        except ValueError as error:
            raise BadRequest(f"--since {since!r} is no span, no ISO time and no number") from error
    at = (found if found.tzinfo else found.astimezone()).astimezone(UTC).isoformat()
    return {"since": at}, at


def _is_since(event: Row, since: str) -> bool:
    """Compare as times: two ISO texts of one moment may differ in their fractions."""
    from datetime import datetime

    return not since or datetime.fromisoformat(event["at"]) >= datetime.fromisoformat(since)


def _followed(start: Row, limit: int) -> Iterator[Row]:
    """Yield events for ever, over restarts of the daemon, none twice and none left out. Unreachable when it stays away."""
    for daemon in sessions(SystemClock()):
        try:
            for event in chain(_missed(daemon, start, limit), _newest(daemon, start, limit)):
                if event["seq"] is not None:  # what is told and not recorded has no number
                    start["since_seq"] = event["seq"]
                yield event
        except Unreachable:
            # Lost between two events: the next session goes on after the last one seen.
            continue


def _missed(daemon: Daemon, start: Row, limit: int) -> Iterator[Row]:
    """Page through what was recorded since a time, or after the last event seen."""
    more = bool(start)
    while more:
        body = daemon.request("events", {"limit": limit, "follow": False, **start})
        yield from body["events"]
        more = body["next"] is not None


def _newest(daemon: Daemon, start: Row, limit: int) -> Iterator[Row]:
    """Yield the newest events, or those after the last one seen, and then each as it comes."""
    body = daemon.request("events", {"limit": limit, "follow": True, **start})
    yield from body["events"]
    yield from _pushed(daemon.pushes())


def _pushed(pushes: Iterator[Row]) -> Iterator[Row]:
    for push in pushes:
        if push.get("push") == "event":
            yield push["event"]


def _print_event(event: Row, out: Output) -> None:
    line = render.json_text({"v": 1, **event}) if out.form == "jsonl" else event_line(event, out.screen)
    sys.stdout.write(line + "\n")


def event_line(event: Row, screen: render.Screen) -> str:
    """Write one event as a line: for people aligned, in a pipe separated by tabs.

    In a pipe: number, time, event, checkpoint, PROJECT/EXPERIMENT, step and data.
    """
    data = event.get("data") or {}
    subject = f"{event.get('project') or ''}/{event['name']}" if event.get("name") else ""
    step = event.get("step")
    if not screen.terminal:
        words = (*(event.get(key) for key in ("seq", "at", "event", "checkpoint")), subject, step)
        shown = [render.escape("" if word is None else word) for word in words]
        return "\t".join([*shown, render.json_text(data)])
    kind = str(event.get("event"))
    where = [subject, "" if step is None else f"step {step}", render.short(event.get("checkpoint"))]
    where += [f"{key}={render.metric(value)}" for key, value in data.items() if value not in (None, "")]
    style = render.COLOURS.get(kind.rpartition(".")[2], "bold")
    time_ = screen.paint(render.moment(event.get("at")), "dim")
    said = render.escape(" ".join(word for word in where if word))
    return f"{time_}  {screen.paint(render.escape(f'{kind:<22}'), style)}  {said}".rstrip()


def _print_audit(limit: int, out: Output) -> None:
    with connect() as daemon:
        body = daemon.request("audit", {"limit": limit})
    entries = list(reversed(body["entries"]))
    if out.json({**body, "entries": entries}):
        return
    if out.form == "jsonl":
        sys.stdout.write("".join(render.json_text({"v": 1, **entry}) + "\n" for entry in entries))
        return
    render.print_lines(out.screen, AUDIT.lines(out.screen, entries))


def _json_or_blank(value: object) -> str:
    return "" if value in (None, {}) else render.json_text(value)


AUDIT = render.Sheet(
    columns=(
        render.Column("WHEN", lambda row: render.moment(row.get("at"))),
        render.Column("WHO", lambda row: f"uid {row.get('uid')} pid {row.get('pid')}"),
        render.Column("DID", lambda row: row.get("action"), style=lambda _: "bold"),
        render.Column("TO", lambda row: render.short(row.get("checkpoint") or row.get("experiment"))),
        render.Column("BEFORE", lambda row: _json_or_blank(row.get("before"))),
        render.Column("AFTER", lambda row: _json_or_blank(row.get("after"))),
    ),
    fields=(
        lambda row: row.get("entry"),
        lambda row: row.get("at"),
        lambda row: row.get("uid"),
        lambda row: row.get("pid"),
        lambda row: row.get("action"),
        lambda row: row.get("checkpoint") or row.get("experiment"),
        lambda row: _json_or_blank(row.get("before")),
        lambda row: _json_or_blank(row.get("after")),
    ),
)
