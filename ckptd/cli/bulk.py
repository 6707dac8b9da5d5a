"""bulk: one act on every checkpoint that a query finds; the query is that of `ckpt ls`.

What would be acted on is counted and shown before anything is done. Each checkpoint is acted on for
itself: one that can't be is named, and the others go on. What is done stays done: the same command once
more goes on where an interrupted one stopped.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar, cast

import click

from ckptd.cli import render
from ckptd.cli.acting import confirmed
from ckptd.cli.completion import complete_scope
from ckptd.cli.daemon_socket import Daemon, connect
from ckptd.cli.each import REMOVE, Act, Result, Row, counted, do, try_each
from ckptd.cli.listing import named, pages, parse_scope
from ckptd.cli.options import Family, Output, Span, Verb, output
from ckptd.clock import SystemClock
from ckptd.errors import BadRequest, CkptdError

F = TypeVar("F", bound=Callable[..., Any])
SHOWN_MAX = 10  # checkpoints named before the question


@dataclass(frozen=True, slots=True)
class Query:
    """Which checkpoints, and how to go about it."""

    wanted: dict[str, str | None]
    dry_run: bool
    yes: bool
    older_s: float = 0.0  # leave out what was read back since


def querying(function: F) -> F:
    """Give a verb the query of `ckpt ls`, --dry-run and --yes; it gets `query`."""

    @functools.wraps(function)
    def run(scope: str | None, *, dry_run: bool, yes: bool, everything: bool, **given: Any) -> Any:
        wanted = {name: given.pop(name) for name in ("project", "state", "level", "tagged")}
        wanted["tag"] = wanted.pop("tagged")
        if scope is None and not everything and not any(wanted.values()):
            raise BadRequest("say which checkpoints", hint="PROJECT[/EXPERIMENT], a filter, or --all for every one")
        wanted |= parse_scope(scope)
        wanted["state"] = wanted["state"] or "live"
        return function(query=Query(wanted, dry_run, yes, given.pop("older_s", 0.0)), **given)

    wrapped: Any = run
    for option in (
        click.option("-y", "--yes", is_flag=True, help="Do not ask."),
        click.option("-n", "--dry-run", is_flag=True, help="Only count and show."),
        click.option("-a", "--all", "everything", is_flag=True, help="Every checkpoint there is, without a filter."),
        click.option("--tag", "tagged", metavar="TAG", help="Carrying this tag, or in an experiment that does."),
        click.option(
            "--level", type=click.Choice(["staged", "durable", "verified", "tiered"]), help="At least this good."
        ),
        click.option(
            "--state", type=click.Choice(["live", "corrupt", "missing", "failed"]), help="In this state; else live."
        ),
        click.option("--project", metavar="NAME", help="Of this project."),
        click.argument("scope", required=False, metavar="[PROJECT[/EXPERIMENT]]", shell_complete=complete_scope),
    ):
        wrapped = option(wrapped)
    return cast("F", wrapped)


@click.group(
    cls=Family,
    examples=(
        ("ckpt bulk tag sweep-7 imagenet --level verified", "counts, asks, tags each"),
        ("ckpt bulk rm imagenet/debug --dry-run", "how many, how large, and which are held"),
        ("ckpt bulk verify --all --older 7d --yes", "what was not read back for a week"),
    ),
)
def bulk() -> None:
    """Act on every checkpoint that a query finds: tag, untag, pin, unpin, rm, verify.

    Exit code 1 when one of them could not be acted on; the others were. Run it again to go on.
    """


@bulk.command("tag", cls=Verb, examples=(("ckpt bulk tag paper imagenet/resnet50", "all of one experiment"),))
@click.argument("tag", metavar="TAG")
@querying
@output(ids=True)
def tag(tag: str, query: Query, out: Output) -> int:
    """Give all of them a tag."""
    return _act(Act("tag", "tagged", "checkpoint.tag", {"add": [tag]}), query, out)


@bulk.command("untag", cls=Verb, examples=(("ckpt bulk untag paper --tag paper", "whatever carries it"),))
@click.argument("tag", metavar="TAG")
@querying
@output(ids=True)
def untag(tag: str, query: Query, out: Output) -> int:
    """Take a tag away from all of them."""
    return _act(Act("untag", "untagged", "checkpoint.tag", {"remove": [tag]}), query, out)


@bulk.command("pin", cls=Verb, examples=(("ckpt bulk pin imagenet --tag paper --note 'table 3'", "by their tag"),))
@click.option("--note", metavar="TEXT", help="Why; shown by `ckpt show`.")
@querying
@output(ids=True)
def pin(note: str | None, query: Query, out: Output) -> int:
    """Keep all of them, whatever the rules say."""
    return _act(Act("pin", "pinned", "pin", {"note": note}), query, out)


@bulk.command("unpin", cls=Verb, examples=(("ckpt bulk unpin imagenet --tag paper", "the rules decide again"),))
@querying
@output(ids=True)
def unpin(query: Query, out: Output) -> int:
    """Lift their pins."""
    return _act(Act("unpin", "unpinned", "unpin"), query, out)


@bulk.command("rm", cls=Verb, examples=(("ckpt bulk rm imagenet/debug --dry-run", "what would go, and what is held"),))
@querying
@output(ids=True)
def rm(query: Query, out: Output) -> int:
    """Move all of them to the trash, but those that something holds."""
    return _act(REMOVE, query, out)


@bulk.command("verify", cls=Verb, examples=(("ckpt bulk verify --all --older 7d", "goes on where it was stopped"),))
@click.option("--older", "older_s", type=Span(), default=0.0, help="Only what was not read back for this long.")
@querying
@output(ids=True)
def verify(query: Query, out: Output) -> int:
    """Read all of them back from the disk; one that is damaged counts as one that failed."""
    return _act(Act("verify", "verified", "verify"), query, out)


def _act(act: Act, query: Query, out: Output) -> int:
    with connect() as daemon:
        result = Result(list(_found(daemon, query)))
        if act.trial is not None:
            try_each(daemon, act, result)
        _show(act, result)
        if not query.dry_run and result.wanted:
            if not confirmed(f"{act.word} {counted(len(result.wanted))}?", yes=query.yes):
                return 1
            for row in result.wanted:
                do(daemon, act, row, result, out)
    _report(act, result, query, out)
    return CkptdError.exit_code if result.failed else 0


def _found(daemon: Daemon, query: Query) -> Iterator[Row]:
    before = SystemClock().now() - timedelta(seconds=query.older_s)
    for row, _ in pages(daemon, "list", limit=None, sort="newest", **query.wanted):
        read_at = row.get("verified_at")
        if not query.older_s or read_at is None or datetime.fromisoformat(read_at) <= before:
            yield row


def _show(act: Act, result: Result) -> None:
    size = render.size(sum(row.get("size_bytes") or 0 for row in result.wanted))
    render.say(f"{act.word}: {counted(len(result.wanted))}, {size}")
    for row in result.wanted[:SHOWN_MAX]:
        render.say(f"  {named(row)}")
    if len(result.wanted) > SHOWN_MAX:
        render.say(f"  and {len(result.wanted) - SHOWN_MAX} more")
    for row, error in result.failed:
        render.say(f"  not {named(row)}: {render.escape(error.message)}")


def _report(act: Act, result: Result, query: Query, out: Output) -> None:
    body = {
        "act": act.word,
        "dry_run": query.dry_run,
        "wanted": [row["checkpoint"] for row in result.wanted],
        "done": [row["checkpoint"] for row in result.done],
        "failed": [{"checkpoint": row["checkpoint"], "error": error.to_wire()} for row, error in result.failed],
    }
    if not out.json(body) and not query.dry_run:
        rest = f", {len(result.failed)} could not be" if result.failed else ""
        render.say(f"{act.past} {counted(len(result.done))}{rest}")
