"""How training goes: grid, recovery. Both work without a daemon, from the catalog."""

import sys
from typing import Any

import click

from ckptd.cli import render
from ckptd.cli.completion import complete_scope
from ckptd.cli.listing import label
from ckptd.cli.options import Output, output, verb
from ckptd.cli.reading import open_source
from ckptd.cli.render import Column, Sheet
from ckptd.errors import BadRequest

ID_DIGITS = 32
GRAVE = {"silent": "red", "stalled": "yellow", "lost": "red", "failed": "red", "running": "running"}

Row = dict[str, Any]


def _share(row: Row) -> str:
    return "" if row.get("progress") is None else f"{row['progress']:.0%}"


def _steps(row: Row) -> object:
    if row.get("total") is None or row.get("unit") != "steps":
        return row.get("step")
    return f"{row.get('step') if row.get('step') is not None else '-'}/{row['total']:.0f}"


def _left(row: Row) -> str:
    return "" if row.get("eta_s") is None else render.span(row["eta_s"])


def _rate(row: Row) -> str:
    return "" if row.get("steps_per_s") is None else f"{row['steps_per_s']:.3g}"


def _style(row: Row) -> str:
    return GRAVE.get(str(row.get("condition")), "")


def _metric(word: str) -> Any:
    def cell(row: Row) -> str:
        value = (row.get("metric") or {}).get(word)
        return "" if value is None else render.metric(value)

    return cell


def sheet(metric: str | None) -> Sheet:
    """Return how the grid is set; with a metric it has columns for its last, lowest and highest value."""
    columns = [
        Column("EXPERIMENT", label),
        Column("IS", lambda row: row.get("condition"), style=_style),
        Column("DONE", _share, right=True),
        Column("STEP", _steps, right=True),
        Column("STEPS/S", _rate, right=True),
        Column("LEFT", _left, right=True),
        Column("SEEN", lambda row: render.age(row.get("seen_at"))),
    ]
    words = ("last", "min", "max") if metric else ()
    columns += [Column(f"{metric} {word}".upper(), _metric(word), right=True) for word in words]
    keys = "experiment project name condition progress step total unit steps_per_s eta_s seen_at silent_s"
    return Sheet(tuple(columns), (*render.keys(keys), *(_metric(word) for word in words)))


@verb(
    ("ckpt grid --tag sweep7", "every experiment that bears the tag"),
    ("ckpt grid --parent imagenet/base --metric val_loss", "those that grew from one, with a metric"),
    ("ckpt grid imagenet --json", "one project's, for a program"),
)
@click.argument("project", required=False, shell_complete=complete_scope)
@click.option("--tag", metavar="TAG", help="Bearing this tag.")
@click.option("--parent", metavar="EXPERIMENT", help="Grown from this one: PROJECT/NAME, or an id.")
@click.option("--metric", metavar="NAME", help="Show this metric's last, lowest and highest value.")
@click.option("-n", "--limit", type=click.IntRange(1, 500), default=500, show_default=True, help="The newest so many.")
@output(lines=True)
def grid(out: Output, **wanted: Any) -> None:
    """Show how a sweep is doing: progress, time left, and who has fallen silent.

    A running experiment is silent without a sign of life, stalled when its process lives and makes no step. How far it
    is meant to go is read from its config (max_steps, epochs and the like); the time left follows from its pace so far.
    Exit code 3 when no experiment fits what was named. In a pipe: id, project, name, condition, progress, step, total,
    its unit, steps a second, seconds left, time of the last sign of life and seconds since, then the metric's last,
    lowest and highest value, separated by tabs.
    """
    with open_source() as source:
        body = source.request("grid", wanted)
    if out.form == "jsonl":
        sys.stdout.write("".join(render.json_text({"v": 1, **row}) + "\n" for row in body["rows"]))
        return
    if out.json({**body, "source": source.kind}):
        return
    lines = sheet(wanted["metric"]).lines(out.screen, body["rows"])
    if out.screen.terminal:
        lines += ["", _whole(body["summary"])]
    render.print_lines(out.screen, lines)
    if body.get("more"):
        render.say(f"there are more than these {len(body['rows'])}: narrow it by --tag, --parent or PROJECT")


def _whole(summary: Row) -> str:
    """Say in one line how the sweep is doing."""
    parts = [f"{summary['experiments']} experiments"]
    parts += [f"{count} {word}" for word, count in summary["by_condition"].items()]
    if summary.get("progress") is not None:
        parts.append(f"{summary['progress']:.0%} done")
    if summary.get("eta_s") is not None:
        parts.append(f"{render.span(summary['eta_s'])} left")
    return ", ".join(parts)


@verb(
    ("ckpt recovery imagenet/resnet50", "what is needed to go on, and the command"),
    ("ckpt recovery imagenet/resnet50 --command | sh", "go on"),
)
@click.argument("experiment", metavar="EXPERIMENT", shell_complete=complete_scope)
@click.option("--command", "only_command", is_flag=True, help="Print the command alone.")
@output()
def recovery(experiment: str, out: Output, *, only_command: bool) -> None:
    """Show how an experiment can go on: its last good checkpoint, and the command that it was started with.

    EXPERIMENT is PROJECT/NAME or an id. Exit code 3 when there is none, or with --command when its process did not
    say how it was started.
    """
    wanted = reference(experiment)
    with open_source() as source:
        body = source.request("recovery", wanted)
    if only_command:
        if not body.get("command"):
            from ckptd.errors import NotFound

            raise NotFound(f"{label(body)} did not say how it was started", hint="`ckpt recovery` tells what is known")
        sys.stdout.write(body["command"] + "\n")
        return
    if not out.json({**body, "source": source.kind}):
        head = f"{label(body)} {body['status']}"
        render.print_lines(out.screen, [out.screen.paint(render.escape(head), "bold"), *lines_of(body, out.screen)])


def reference(text: str) -> dict[str, str]:
    """Read an experiment's name on the command line. BadRequest when it is neither PROJECT/NAME nor an id."""
    if len(text) == ID_DIGITS and all(digit in "0123456789abcdef" for digit in text):
        return {"experiment": text}
    project, slash, name = text.partition("/")
    if not (project and slash and name) or "/" in name:
        raise BadRequest(f"{text!r} is neither PROJECT/NAME nor an id", hint="`ckpt experiments` lists them")
    return {"project": project, "name": name}


def lines_of(body: Row, screen: render.Screen) -> list[str]:
    """Set the recovery object as lines."""
    good = body.get("checkpoint")
    facts = body.get("facts") or {}
    steps = f"{body['steps_again']} steps to make again" if body.get("steps_again") else ""
    named = (
        f"step {good['step']}, {render.short(good['checkpoint'])}, {render.age(good['verified_at'])}" if good else ""
    )
    commit = facts.get("git_commit")
    shown = (
        ("failed", (body.get("error") or {}).get("message")),
        ("last good", named or "none"),
        ("", good and good["path"]),
        ("reached", " ".join(filter(None, [f"step {body.get('last_step')},", steps])).rstrip(",")),
        ("not good", f"{body['lost']} later saves" if body.get("lost") else ""),
        ("host", facts.get("host")),
        ("commit", f"{commit}{' with changes' if facts.get('git_dirty') else ''}" if commit else ""),
        *(("note", hint) for hint in body.get("hints") or ()),
        ("command", body.get("command")),
    )
    return [
        f"  {screen.paint(f'{word:<9}', 'dim')} {render.escape(value)}"
        for word, value in shown
        if value not in (None, "")
    ]
