"""`ckpt hooks`: which hooks there are and how they do, on and off, a trial run, what came of recent runs."""

import json
import sys
from typing import Any

import click

from ckptd.cli import render
from ckptd.cli.daemon_socket import FOREVER_S, connect
from ckptd.cli.options import Family, Output, Verb, asked, output
from ckptd.errors import BadRequest, CkptdError

Row = dict[str, Any]
STATES = {"ok": "green", "failed": "red", "timeout": "red", "vetoed": "yellow", "open": "yellow", "skipped": "dim"}


def _state(row: Row) -> str:
    if row.get("problem"):
        return "broken"
    if not row.get("enabled"):
        return "disabled"
    return "resting" if row.get("circuit") == "open" else "on"


def _style(row: Row) -> str:
    return {"broken": "red", "resting": "yellow", "disabled": "dim"}.get(_state(row), "green")


def _ms(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else ""


LISTED = render.Sheet(
    columns=(
        render.Column("HOOK", lambda row: row.get("name")),
        render.Column("IS", _state, style=_style),
        render.Column("KIND", lambda row: row.get("kind")),
        render.Column("PRIORITY", lambda row: row.get("priority")),
        render.Column("RUNS AT", lambda row: " ".join(row.get("events") or ())),
        render.Column("PROBLEM", lambda row: row.get("problem"), style=lambda _: "red"),
    ),
    fields=(
        *render.keys("name"), _state, *render.keys("kind priority"), lambda row: " ".join(row.get("events") or ()),
        *render.keys("problem"),
    ),
)  # fmt: skip

FIGURES = render.Sheet(
    columns=(
        render.Column("HOOK", lambda row: row.get("name")),
        render.Column("IS", _state, style=_style),
        *(
            render.Column(word.upper(), lambda row, word=word: row.get(word), right=True)  # type: ignore[misc]
            for word in ("calls", "ok", "failed", "timeout", "vetoed", "skipped", "open", "missed", "behind")
        ),
        render.Column("P50 MS", lambda row: _ms(row.get("p50_ms")), right=True),
        render.Column("P95 MS", lambda row: _ms(row.get("p95_ms")), right=True),
        render.Column("LAST ERROR", lambda row: row.get("last_error"), style=lambda _: "red"),
    ),
    fields=(
        *render.keys("name"), _state,
        *render.keys("calls ok failed timeout vetoed skipped open missed behind p50_ms p95_ms last_error"),
    ),
)  # fmt: skip

RUNS = render.Sheet(
    columns=(
        render.Column("AT", lambda row: render.moment(row.get("at"))),
        render.Column("HOOK", lambda row: row.get("hook")),
        render.Column("EVENT", lambda row: row.get("event")),
        render.Column("OUTCOME", lambda row: row.get("outcome"), style=lambda row: STATES.get(str(row["outcome"]), "")),
        render.Column("MS", lambda row: _ms(row.get("ms")), right=True),
        render.Column("CHECKPOINT", lambda row: render.short(row.get("checkpoint"))),
        render.Column("DETAIL", lambda row: row.get("detail")),
    ),
    fields=render.keys("at hook event outcome ms checkpoint key detail"),
)


@click.group(
    cls=Family,
    invoke_without_command=True,
    examples=(
        ("ckpt hooks", "all of them"),
        ("ckpt hooks test notify --data '{\"val_loss\": 0.1}'", "run one now, with no effect on anything"),
        ("ckpt hooks disable notify", "from now on, and after a restart"),
        ("ckpt hooks log --outcome failed", "what went wrong lately"),
    ),
)
def hooks() -> None:
    """List hooks, try one, switch one on or off, see how they do."""
    context = click.get_current_context()
    if context.invoked_subcommand is None:
        context.invoke(listed, as_json=False)


@hooks.command("list", cls=Verb, examples=(("ckpt hooks list", "in order of registration"),))
@output()
def listed(out: Output) -> None:
    """List every hook, with what it runs at and whether it does.

    In a pipe: name, state, kind, priority, events and problem, separated by tabs.
    """
    _print_sheet(LISTED, out)


@hooks.command("stats", cls=Verb, examples=(("ckpt hooks stats", "calls, failures and durations"),))
@output()
def stats(out: Output) -> None:
    """How often each hook ran, how that ended and how long it took (of the newest runs).

    In a pipe: name, state, calls, ok, failed, timeout, vetoed, skipped, open, missed, behind, p50 and p95 in
    milliseconds and the last error, separated by tabs.
    """
    _print_sheet(FIGURES, out)


def _print_sheet(sheet: render.Sheet, out: Output) -> None:
    with connect() as daemon:
        body = daemon.request("hooks")
    if out.json(body):
        return
    render.print_lines(out.screen, sheet.lines(out.screen, body["hooks"]))
    if not body.get("enabled", True):
        render.say("hooks_defaults.enabled is false: none of them runs")


@hooks.command("show", cls=Verb, examples=(("ckpt hooks show notify", "everything about one"),))
@click.argument("name")
@output()
def show(name: str, out: Output) -> None:
    """Everything about one hook. Exit code 3 when there is none of this name."""
    with connect() as daemon:
        body = daemon.request("hooks")
    found = next((row for row in body["hooks"] if row["name"] == name), None)
    if found is None:
        from ckptd.errors import NotFound

        message = f"there is no hook named {name!r}"
        raise NotFound(message, hint="`ckpt hooks list` names them")
    if out.json({"hook": found}):
        return
    for key, value in found.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else value
        if text not in {None, ""}:
            sys.stdout.write(f"{key + ':':<16}{render.escape(text)}\n")


@hooks.command(
    "test",
    cls=Verb,
    examples=(
        ("ckpt hooks test notify", "at its first event"),
        ("ckpt hooks test gate --event checkpoint.before_save --checkpoint 6f1c…", "with a real checkpoint's facts"),
    ),
)
@click.argument("name")
@click.option("--event", metavar="EVENT", help="The event or point; its first one when none is named.")
@click.option("--checkpoint", metavar="ID", help="A whole id: the hook is told what the catalog knows of it.")
@click.option("--data", metavar="JSON", help="An object: what the hook finds in context.data.")
@output()
def test(name: str, out: Output, *, event: str | None, checkpoint: str | None, data: str | None) -> int:
    """Run one hook now. Nothing is counted, and a veto changes nothing.

    Exit code 1 when it fails or takes too long.
    """
    fields = {"hook": name, "event": event, "checkpoint": checkpoint, "data": _object(data)}
    with connect() as daemon:
        body = daemon.request("hooks.test", fields, within_s=asked().or_timeout_s(FOREVER_S))
    run = body["run"]
    if not out.json(body):
        why = f": {run['error']}" if run.get("error") else ""
        render.say(
            render.escape(f"{name} at {run['event']}: {run['outcome']} in {run['duration_s'] * 1000:.1f} ms{why}")
        )
        for finding in run.get("findings") or ():
            render.say(render.escape(f"{finding['level']}: {finding['text']}"))
        for line in str(run.get("output") or "").splitlines():
            sys.stdout.write(render.escape(line) + "\n")
    return CkptdError.exit_code if run["outcome"] in {"failed", "timeout"} else 0


def _object(text: str | None) -> Row:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        message = f"--data is no JSON: {error}"
        raise BadRequest(message) from error
    if not isinstance(found, dict):
        message = "--data must be a JSON object"
        raise BadRequest(message, hint="such as '{\"val_loss\": 0.1}'")
    return found


@hooks.command("enable", cls=Verb, examples=(("ckpt hooks enable notify", "with the next event"),))
@click.argument("name")
@output()
def enable(name: str, out: Output) -> None:
    """Let a hook run from now on, after restarts as well. Its circuit is closed."""
    _switch(name, out, enabled=True)


@hooks.command("disable", cls=Verb, examples=(("ckpt hooks disable notify", "until it is enabled again"),))
@click.argument("name")
@output()
def disable(name: str, out: Output) -> None:
    """Let a hook rest from now on, after restarts as well. What happens meanwhile it never hears of."""
    _switch(name, out, enabled=False)


def _switch(name: str, out: Output, *, enabled: bool) -> None:
    with connect() as daemon:
        done = daemon.request("hooks.switch", {"hook": name, "enabled": enabled})
    if not out.json(done):
        word = "enabled" if enabled else "disabled"
        render.say(render.escape(f"{name} is {word}" if done["changed"] else f"{name} was {word} already"))


@hooks.command(
    "log",
    cls=Verb,
    examples=(
        ("ckpt hooks log", "the newest runs of all"),
        ("ckpt hooks log notify --outcome failed", "the failures of one"),
    ),
)
@click.argument("name", required=False)
@click.option(
    "--outcome",
    type=click.Choice(["ok", "skipped", "failed", "timeout", "vetoed", "open"]),
    help="Only runs that ended so.",
)
@click.option("-n", "--limit", type=click.IntRange(1, 500), default=50, show_default=True, help="How many at most.")
@output(lines=True)
def log(name: str | None, limit: int, out: Output, *, outcome: str | None) -> None:
    """What came of recent runs, newest first.

    In a pipe: time, hook, event, outcome, milliseconds, checkpoint, idempotency key and detail, separated by tabs.
    """
    with connect() as daemon:
        body = daemon.request("hooks.log", {"hook": name, "outcome": outcome, "limit": limit})
    if out.json(body):
        return
    if out.form == "jsonl":
        sys.stdout.write("".join(render.json_text(run) + "\n" for run in body["runs"]))
        return
    render.print_lines(out.screen, RUNS.lines(out.screen, body["runs"]))
