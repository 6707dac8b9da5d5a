"""retention: what the rules decide, carried out as it was shown, and why one checkpoint stays or goes."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from ckptd.cli import render
from ckptd.cli.acting import confirmed
from ckptd.cli.completion import complete_scope
from ckptd.cli.daemon_socket import FOREVER_S, Daemon, connect
from ckptd.cli.listing import label, parse_scope
from ckptd.cli.options import Family, Output, Verb, asked, output, selecting
from ckptd.errors import CkptdError

DROPS_PER_REQUEST_MAX = 20_000  # ids of 34 bytes each, in a frame of 1 MiB

Row = dict[str, Any]


@click.group(
    cls=Family,
    examples=(
        ("ckpt retention plan imagenet", "what the rules keep and drop, and why"),
        ("ckpt retention apply imagenet", "shows it, asks, and does it"),
        ("ckpt retention explain 6f1c0e", "why it stays or goes, and what would change that"),
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
    if out.json(body):
        return
    render.print_lines(out.screen, plan_lines(body["plans"], out.screen))
    if not out.screen.terminal:
        for line in filter(None, map(_held, body["plans"])):
            render.say(line)


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
@click.option(
    "--plan", "named", metavar="DIGEST", help="Only if the plan is still this one, as `plan --json` calls it."
)
@output(ids=True)
def apply(scope: str | None, named: str | None, out: Output, *, dry_run: bool, yes: bool) -> int:
    """Carry out the plan: drop what no rule and no promise keeps.

    What the rules begin to drop between the question and the answer is left for the next time. With --plan
    nothing at all is done (exit code 7) when there is anything else to do than what that plan said.
    """
    wanted = parse_scope(scope)
    with connect() as daemon:
        body = daemon.request("retention", {"apply": False, **wanted})
        drops = [row["checkpoint"] for plan in body["plans"] for row in plan["drop"]]
        strips = [row["checkpoint"] for plan in body["plans"] for row in plan.get("strip") or ()]
        if out.form == "human":
            render.print_lines(out.screen, plan_lines(body["plans"], out.screen))
        if (drops or strips) and not dry_run:
            if not confirmed(_question(len(drops), len(strips)), yes=yes):
                return 1
            body = _apply(daemon, wanted, drops + strips) if named is None else _apply_named(daemon, wanted, named)
    return _print_applied(body, out)


def _question(drops: int, strips: int) -> str:
    """Ask for what will be done.

    >>> _question(2, 0), _question(1, 3)
    ('drop 2 checkpoints?', 'drop 1 checkpoint and strip 3?')
    """
    asks = [f"drop {drops} checkpoint{'s' if drops > 1 else ''}"] if drops else []
    asks += [f"strip {strips}"] if strips else []
    return " and ".join(asks) + "?"


def _apply(daemon: Daemon, wanted: dict[str, str], drops: list[str]) -> Row:
    """Have the drops carried out that were shown, a frame's worth at a time."""
    plans: list[Row] = []
    for at in range(0, len(drops), DROPS_PER_REQUEST_MAX):
        only = drops[at : at + DROPS_PER_REQUEST_MAX]
        within_s = asked().or_timeout_s(FOREVER_S)
        done = daemon.request("retention", {"apply": True, "only": only, **wanted}, within_s=within_s)
        plans += done["plans"]
    return {"plans": plans, "applied": True}


def _apply_named(daemon: Daemon, wanted: dict[str, str], named: str) -> Row:
    """Have a plan carried out that is still the one of this digest; another one is refused whole."""
    within_s = asked().or_timeout_s(FOREVER_S)
    done: Row = daemon.request("retention", {"apply": True, "plan": named, **wanted}, within_s=within_s)
    return done


def _print_applied(body: Row, out: Output) -> int:
    applied = bool(body.get("applied"))
    problems = [(label(plan), plan["problem"]) for plan in body["plans"] if plan.get("problem")]
    code = CkptdError.exit_code if problems else 0
    dropped = [row["checkpoint"] for plan in body["plans"] for row in plan["drop"]]
    stripped = [row["checkpoint"] for plan in body["plans"] for row in plan.get("strip") or ()]
    if out.json({**body, "applied": applied}):
        return code
    if out.form == "ids":
        sys.stdout.write("".join(f"{checkpoint}\n" for checkpoint in dropped))
        return code
    for name, problem in problems:
        render.say(f"{render.escape(name)}: {render.escape(problem)}")
    freed = sum(row.get("size_bytes") or 0 for plan in body["plans"] for row in plan["drop"])
    verb_ = "dropped" if applied else "would drop"
    render.say(f"{verb_} {len(dropped)} checkpoints, {render.size(freed)}")
    if stripped:
        render.say(f"{'stripped' if applied else 'would strip'} {len(stripped)} of their optimizer states")
    return code


@retention.command(
    "explain",
    cls=Verb,
    examples=(
        ("ckpt retention explain 6f1c0e", "why it stays or goes"),
        ("ckpt retention explain imagenet/resnet50@step:100", "by its step"),
    ),
)
@selecting
@output()
def explain(where: dict[str, str | None], out: Output) -> None:
    """Say why a checkpoint stays or goes, which rules looked at it, and what would change that."""
    with connect() as daemon:
        body = daemon.request("retention.explain", where)
    if not out.json(body):
        render.print_lines(out.screen, list(explained(body)))


_VERDICTS = {
    "keep": "stays",
    "spare": "stays while nothing needs its room",
    "drop": "goes with the next plan that is carried out",
}


def explained(body: Row) -> Iterator[str]:
    """Set an explanation as lines."""
    step = "" if body.get("step") is None else f" step {body['step']}"
    yield render.escape(f"{label(body)}{step} ({render.short(body['checkpoint'])}) {_VERDICTS[body['verdict']]}:")
    for why in body["why"]:
        yield render.escape(f"  {why}")
    if body.get("strip"):
        yield "  its optimizer states would be taken out"
    if body.get("stripped"):
        taken = body["stripped"]
        yield render.escape(f"  taken out of it: {', '.join(taken['files'])} ({taken['state']})")
    for rule in body["looked"]:
        mark = "keeps it" if rule["keeps"] else "does not"
        yield render.escape(f"rule {rule['words']}: {mark}: {rule['why']}")
    for change in body["changes"]:
        yield render.escape(f"{change}")


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
        lines += [f"keeps {len(plan['keep'])}, drops {len(plan['drop'])} ({freed})", *filter(None, [_held(plan)]), ""]
    return lines[:-1] if lines else ["no experiment has rules that drop anything"]


def _held(plan: Row) -> str:
    """Say that the daemon does nothing of a plan by itself, and why; "" when it does.

    >>> _held({"project": "p", "name": "run 1", "held": {"words": "it would drop 30 of 40"}})
    "p/run 1: held: ckptd does nothing of this by itself: it would drop 30 of 40; `ckpt retention apply 'p/run 1'` does it"
    """
    held = plan.get("held")
    if not held:
        return ""
    does = f"`ckpt retention apply {shlex.quote(label(plan))}` does it"
    return render.escape(f"{label(plan)}: held: ckptd does nothing of this by itself: {held['words']}; {does}")


def _decisions(plans: Sequence[Row]) -> Iterator[Row]:
    """Yield one row for each checkpoint, by step, with what was decided."""
    for plan in plans:
        stripped = {row["checkpoint"] for row in plan.get("strip") or ()}
        words = (("keep", plan["keep"]), ("drop", plan["drop"]))
        rows = [
            {**row, "is": "strip" if row["checkpoint"] in stripped else word} for word, found in words for row in found
        ]
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
