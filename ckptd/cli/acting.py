"""Deciding what stays: pin, unpin, rm, retention.

What destroys is shown first, asked about, and then done to exactly what was shown: ids and the
list of drops travel with the request, so that what arrived in between is not hit.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from ckptd.cli import render
from ckptd.cli.completion import complete_scope, complete_selector
from ckptd.cli.daemon_socket import FOREVER_S, Daemon, connect
from ckptd.cli.listing import label, parse_scope
from ckptd.cli.options import Family, Output, Verb, as_selector, asked, output, selecting, verb
from ckptd.errors import BadRequest

DROPS_PER_REQUEST_MAX = 20_000  # ids of 34 bytes each, in a frame of 1 MiB

Row = dict[str, Any]


def _named(row: Row) -> str:
    step = "" if row.get("step") is None else f" step {row['step']}"
    return render.escape(f"{label(row)}{step} ({render.short(row['checkpoint'])})")


@verb(
    ("ckpt pin imagenet/resnet50@best:val_loss --note 'table 3'", "keep it for the paper"),
    ("ckpt unpin 6f1c0e", "let the rules decide again"),
)
@selecting
@click.option("--note", metavar="TEXT", help="Why; shown by `ckpt show`.")
@output(ids=True)
def pin(where: dict[str, str | None], note: str | None, out: Output) -> None:
    """Keep a checkpoint, whatever the rules say."""
    _hold("pin", where, note, out)


@verb(("ckpt unpin 6f1c0e", "let the rules decide again"))
@selecting
@click.option("--note", metavar="TEXT", help="Why; kept in the audit trail.")
@output(ids=True)
def unpin(where: dict[str, str | None], note: str | None, out: Output) -> None:
    """Lift a pin."""
    _hold("unpin", where, note, out)


def _hold(op: str, where: dict[str, str | None], note: str | None, out: Output) -> None:
    with connect() as daemon:
        done = daemon.request(op, {"note": note, **where})
    if out.json(done):
        return
    if out.form == "ids":
        sys.stdout.write(f"{done['checkpoint']}\n")
        return
    said = f"{op}ned {_named(done)}"
    render.say(said if done.get("changed", True) else f"{_named(done)}: nothing to {op}")


@verb(
    ("ckpt rm --dry-run 6f1c0e", "what would happen"),
    ("ckpt rm imagenet/resnet50@step:100", "asks first"),
    ("ckpt rm --yes 6f1c0e 77ab01", "asks nothing"),
)
@click.argument("selectors", nargs=-1, required=True, metavar="SELECTOR...", shell_complete=complete_selector)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would happen.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@output(ids=True)
def rm(selectors: Sequence[str], out: Output, *, dry_run: bool, yes: bool) -> int:
    """Remove checkpoints, unless something holds them.

    Exit code 7, and nothing is removed, when one of them is pinned, leased, the best or the newest good one.
    """
    with connect() as daemon:
        shown = [daemon.request("remove", {"selector": as_selector(text), "dry_run": True}) for text in selectors]
        for row in shown:
            act = f"would {row.get('action')}" if dry_run else row.get("action")
            size = render.size(row.get("size_bytes"))
            render.say(f"{act} {_named(row)}, {size}, {render.escape(row.get('path') or '')}")
        if dry_run:
            _print_removed(shown, out, dry_run=True)
            return 0
        if not confirmed(f"remove {len(shown)} checkpoint{'s' if len(shown) > 1 else ''}?", yes=yes):
            return 1
        done = [daemon.request("remove", {"selector": row["checkpoint"], "dry_run": False}) for row in shown]
    _print_removed(done, out, dry_run=False)
    return 0


def _print_removed(rows: list[Row], out: Output, *, dry_run: bool) -> None:
    if out.json({"removed": rows, "dry_run": dry_run}):
        return
    if out.form == "ids":
        sys.stdout.write("".join(f"{row['checkpoint']}\n" for row in rows))
        return
    for row in () if dry_run else rows:
        reason = f": {row['reason']}" if row.get("reason") else ""
        render.say(f"removed {_named(row)}{render.escape(reason)}")


def confirmed(question: str, *, yes: bool) -> bool:
    """Ask on the terminal; True at once with --yes. BadRequest when nobody is there to be asked."""
    if yes:
        return True
    if not sys.stdin.isatty():
        message = "this asks before it acts, and standard input is no terminal"
        raise BadRequest(message, hint="give --yes, or look first with --dry-run")
    if click.confirm(question, err=True):
        return True
    render.say("nothing was done")
    return False


@click.group(
    cls=Family,
    examples=(
        ("ckpt retention plan imagenet", "what the rules keep and drop, and why"),
        ("ckpt retention apply imagenet", "shows it, asks, and does it"),
    ),
)
def retention() -> None:
    """Show or carry out what the retention rules decide."""


@retention.command(
    "plan",
    cls=Verb,
    examples=(
        ("ckpt retention plan", "for all experiments that have rules"),
        ("ckpt retention plan imagenet/resnet50 --json", "of one, for a program"),
    ),
)
@click.argument("scope", required=False, metavar="[PROJECT[/EXPERIMENT]]", shell_complete=complete_scope)
@output()
def plan(scope: str | None, out: Output) -> None:
    """Print what would be kept and dropped, with reasons; changes nothing.

    In a pipe: keep or drop, id, PROJECT/EXPERIMENT, step, bytes and reasons, separated by tabs.
    """
    with connect() as daemon:
        body = daemon.request("retention", {"apply": False, **parse_scope(scope)})
    if not out.json(body):
        render.print_lines(out.screen, plan_lines(body["plans"], out.screen))


@retention.command(
    "apply",
    cls=Verb,
    examples=(
        ("ckpt retention apply imagenet/resnet50", "shows the plan and asks"),
        ("ckpt retention apply --yes -q", "asks nothing, prints the ids that went"),
    ),
)
@click.argument("scope", required=False, metavar="[PROJECT[/EXPERIMENT]]", shell_complete=complete_scope)
@click.option("-n", "--dry-run", is_flag=True, help="The same as `retention plan`.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@output(ids=True)
def apply(scope: str | None, out: Output, *, dry_run: bool, yes: bool) -> int:
    """Carry out the plan: drop what no rule and no promise keeps.

    What the rules begin to drop between the question and the answer is left for the next time.
    """
    wanted = parse_scope(scope)
    with connect() as daemon:
        body = daemon.request("retention", {"apply": False, **wanted})
        drops = [row["checkpoint"] for plan in body["plans"] for row in plan["drop"]]
        if out.form == "human":
            render.print_lines(out.screen, plan_lines(body["plans"], out.screen))
        if drops and not dry_run:
            if not confirmed(f"drop {len(drops)} checkpoint{'s' if len(drops) > 1 else ''}?", yes=yes):
                return 1
            body = _apply(daemon, wanted, drops)
    _print_applied(body, out)
    return 0


def _apply(daemon: Daemon, wanted: dict[str, str], drops: list[str]) -> Row:
    """Have the drops carried out that were shown, a frame's worth at a time."""
    plans: list[Row] = []
    for at in range(0, len(drops), DROPS_PER_REQUEST_MAX):
        only = drops[at : at + DROPS_PER_REQUEST_MAX]
        within_s = asked().or_timeout_s(FOREVER_S)
        done = daemon.request("retention", {"apply": True, "only": only, **wanted}, within_s=within_s)
        plans += done["plans"]
    return {"plans": plans, "applied": True}


def _print_applied(body: Row, out: Output) -> None:
    applied = bool(body.get("applied"))
    dropped = [row["checkpoint"] for plan in body["plans"] for row in plan["drop"]]
    if out.json({**body, "applied": applied}):
        return
    if out.form == "ids":
        sys.stdout.write("".join(f"{checkpoint}\n" for checkpoint in dropped))
        return
    freed = sum(row.get("size_bytes") or 0 for plan in body["plans"] for row in plan["drop"])
    verb_ = "dropped" if applied else "would drop"
    render.say(f"{verb_} {len(dropped)} checkpoints, {render.size(freed)}")


def plan_lines(plans: Sequence[Row], screen: render.Screen) -> list[str]:
    """Set plans as lines: a headed table for each experiment, or one line for each checkpoint in a pipe."""
    if not screen.terminal:
        return PLAN.lines(screen, _decisions(plans))
    lines: list[str] = []
    for plan in plans:
        freed = render.size(sum(row.get("size_bytes") or 0 for row in plan["drop"]))
        rules = ", ".join(plan.get("rules") or ()) or "no rules: everything stays"
        head = screen.paint(render.escape(label(plan)), "bold")
        lines += [f"{head}  {render.escape(rules)}", *PLAN.lines(screen, _decisions([plan]))]
        lines += [f"keeps {len(plan['keep'])}, drops {len(plan['drop'])} ({freed})", ""]
    return lines[:-1] if lines else ["no experiment has rules that drop anything"]


def _decisions(plans: Sequence[Row]) -> Iterator[Row]:
    """Yield one row for each checkpoint, by step, with what was decided."""
    for plan in plans:
        rows = [{**row, "is": word} for word in ("keep", "drop") for row in plan[word]]
        names = {"project": plan.get("project"), "name": plan.get("name")}
        for row in sorted(rows, key=lambda row: -1 if row.get("step") is None else row["step"]):
            why = row.get("why")
            yield {**names, **row, "why": why if isinstance(why, str) else ", ".join(why or ())}


PLAN = render.Sheet(
    columns=(
        render.Column("", lambda row: row["is"], style=lambda row: str(row["is"])),
        render.Column("STEP", lambda row: row.get("step"), right=True),
        render.Column("ID", lambda row: render.short(row["checkpoint"])),
        render.Column("SIZE", lambda row: render.size(row.get("size_bytes")), right=True),
        render.Column("WHY", lambda row: row["why"]),
    ),
    fields=(
        lambda row: row["is"],
        lambda row: row["checkpoint"],
        label,
        lambda row: row.get("step"),
        lambda row: row.get("size_bytes"),
        lambda row: row["why"],
    ),
)
