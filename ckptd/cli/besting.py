"""best, measured: the best checkpoints by each rule, and what is told late. Looking works without a daemon."""

import sys
from typing import Any, NoReturn

import click

from ckptd.cli import render
from ckptd.cli.completion import complete_scope, complete_selector
from ckptd.cli.daemon_socket import FOREVER_S, connect
from ckptd.cli.listing import label, parse_scope
from ckptd.cli.options import Family, Output, Verb, as_selector, asked, output, verb
from ckptd.cli.reading import Source, open_source
from ckptd.cli.render import Column, Sheet
from ckptd.errors import BadRequest, NotFound
from ckptd_client.wire import number

PLACES_SHOWN_MAX = 500  # one reply's worth

Row = dict[str, Any]


def _metrics(row: Row) -> str:
    return " ".join(f"{name}={render.metric(value)}" for name, value in (row.get("metrics") or {}).items())


def _holder(row: Row) -> str:
    """Name where the winner lies when that is not the experiment the row is about."""
    return "" if row.get("checkpoint") and row.get("of") == label(row) else label(row)


LIST = Sheet(
    columns=(
        Column("EXPERIMENT", lambda row: row["of"]),
        Column("RULE", lambda row: row["rule"]),
        Column("STEP", lambda row: row.get("step"), right=True),
        Column("VALUE", lambda row: render.metric(row.get("value")) if row.get("checkpoint") else "", right=True),
        Column("PLACES", lambda row: row["count"], right=True),
        Column("CHECKPOINT", lambda row: render.short(row["checkpoint"]) if row.get("checkpoint") else "none yet"),
        Column("LIES IN", _holder),
    ),
    fields=(
        lambda row: row["of"],
        lambda row: row["rule"],
        lambda row: row.get("checkpoint"),
        lambda row: row.get("step"),
        lambda row: row.get("value"),
        lambda row: row["count"],
        lambda row: row.get("path"),
    ),
)
PLACES = Sheet(
    columns=(
        Column("RANK", lambda row: row["rank"], right=True),
        Column("EXPERIMENT", label),
        Column("STEP", lambda row: row.get("step"), right=True),
        Column("VALUE", lambda row: render.metric(row.get("value")), right=True),
        Column("METRICS", _metrics),
        Column("CHECKPOINT", lambda row: render.short(row["checkpoint"])),
    ),
    fields=(
        lambda row: row["rank"],
        lambda row: row["checkpoint"],
        label,
        lambda row: row.get("step"),
        lambda row: row.get("value"),
        _metrics,
        lambda row: row.get("path"),
    ),
)


@click.group(
    cls=Family,
    examples=(
        ("ckpt best list imagenet", "the best of each experiment by each rule"),
        ("ckpt best show imagenet/resnet50 val_loss", "all places of one rule"),
        ("ckpt best recompute --dry-run", "is every answer what the history says?"),
    ),
)
def best() -> None:
    """Show the best checkpoints by each rule, or decide them again."""


@best.command(
    "list",
    cls=Verb,
    examples=(
        ("ckpt best list", "of all experiments that have a rule"),
        ("ckpt best list imagenet/resnet50 --json", "of one, for a program"),
    ),
)
@click.argument("scope", required=False, metavar="[PROJECT[/EXPERIMENT]]", shell_complete=complete_scope)
@output(lines=True)
def list_(scope: str | None, out: Output) -> None:
    """List the first place of every rule.

    In a pipe: PROJECT/EXPERIMENT, rule, checkpoint, step, value, number of places and path, separated by tabs.
    """
    with open_source() as source:
        found = _all_experiments(source, parse_scope(scope))
    if out.form == "jsonl":
        sys.stdout.write("".join(render.json_text({"v": 1, **row}) + "\n" for row in found))
        return
    if out.json({"experiments": found, "source": source.kind}):
        return
    rows = [_first(one, board) for one in found for board in one["boards"]]
    render.print_lines(out.screen, LIST.lines(out.screen, rows))
    if not rows:
        render.say("no rule says what is best: `keep_best` in the configuration does")


def _all_experiments(source: Source, wanted: dict[str, str]) -> list[Row]:
    found: list[Row] = []
    after = None
    while True:
        body = source.request("best", {**wanted, "places": 1, "after": after})
        found += body["experiments"]
        after = body.get("next")
        if after is None:
            return found


def _first(one: Row, board: Row) -> Row:
    place = board["places"][0] if board["places"] else {}
    return {**place, "of": label(one), "rule": board["rule"], "count": board["count"]}


@best.command(
    "show",
    cls=Verb,
    examples=(
        ("ckpt best show imagenet/resnet50", "the places of all its rules"),
        ("ckpt best show imagenet/resnet50 front --json", "a Pareto set, for a program"),
    ),
)
@click.argument("experiment", metavar="PROJECT/EXPERIMENT", shell_complete=complete_scope)
@click.argument("rule", required=False)
@output()
def show(experiment: str, rule: str | None, out: Output) -> None:
    """Show who has which place, by one rule or by all.

    In a pipe: rank, checkpoint, PROJECT/EXPERIMENT, step, value, metrics and path, separated by tabs. Exit code 3
    when there is no such experiment or rule.
    """
    wanted = parse_scope(experiment)
    if "name" not in wanted:
        raise BadRequest(f"{experiment!r} is no PROJECT/EXPERIMENT", hint="`ckpt best list` shows whole projects")
    with open_source() as source:
        body = source.request("best", {**wanted, "rule": rule, "places": PLACES_SHOWN_MAX})
    boards = [board for one in body["experiments"] for board in one["boards"]]
    if not boards:
        what = f"rule {rule!r}" if rule else "rule for the best"
        raise NotFound(f"{experiment} has no {what}", hint="`ckpt best list` names them; `keep_best` makes them")
    if out.json({"experiment": experiment, "boards": boards, "source": source.kind}):
        return
    for position, board in enumerate(boards):
        if out.screen.terminal:
            lines = ["", board["words"]] if position else [board["words"]]
            render.print_lines(out.screen, lines)
        render.print_lines(out.screen, PLACES.lines(out.screen, board["places"]))
        if board["count"] > len(board["places"]):
            render.say(f"{board['rule']}: the first {len(board['places'])} of {board['count']} places")


@best.command(
    "recompute",
    cls=Verb,
    examples=(
        ("ckpt best recompute --dry-run", "which answers differ from the history? none should"),
        ("ckpt best recompute imagenet/resnet50", "decide one experiment again"),
    ),
)
@click.argument("scope", required=False, metavar="[PROJECT[/EXPERIMENT]]", shell_complete=complete_scope)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would change.")
@output()
def recompute(scope: str | None, out: Output, *, dry_run: bool) -> None:
    """Decide the best again from everything that is known of every checkpoint.

    The answer is kept up with every save, so this finds nothing to change; links and retention follow when it does.
    """
    with connect() as daemon:
        fields = {**parse_scope(scope), "dry_run": dry_run}
        body = daemon.request("best.recompute", fields, within_s=asked().or_timeout_s(FOREVER_S))
    if out.json(body):
        return
    for one in body["experiments"]:
        sys.stdout.write(f"{render.escape(label(one))}\t{render.escape(', '.join(one['changed']))}\n")
    did = "differ" if dry_run else "changed"
    render.say(f"{len(body['experiments'])} of {body['looked_at']} experiments {did}")


@verb(
    ("ckpt measured imagenet/resnet50@step:1200 val_loss=0.21 acc=0.91", "validation has ended"),
    ("ckpt measured 6f1c0e val_loss=nan", "it diverged: never the best by this metric"),
)
@click.argument("selector", metavar="SELECTOR", shell_complete=complete_selector)
@click.argument("values", nargs=-1, required=True, metavar="NAME=VALUE...")
@output()
def measured(selector: str, values: tuple[str, ...], out: Output) -> None:
    """Say what was measured of a checkpoint after its save.

    A value given before is replaced. What is best is decided again at once, before any rule may retire anything.
    """
    metrics = dict(map(_pair, values))
    with connect() as daemon:
        row = daemon.request("resolve", {"selector": as_selector(selector)})
        daemon.request("checkpoint.metrics", {"checkpoint": row["checkpoint"], "metrics": metrics})
    if not out.json({"checkpoint": row["checkpoint"], "metrics": metrics}):
        said = ", ".join(f"{name}={value}" for name, value in metrics.items())
        render.say(f"{render.short(row['checkpoint'])}: {render.escape(said)}")


def _pair(text: str) -> tuple[str, Any]:
    """Split NAME=VALUE at the last "=". BadRequest when it has another form.

    >>> _pair("val_loss=0.21"), _pair("x=nan")
    (('val_loss', 0.21), ('x', 'NaN'))
    """
    name, sign, value = text.rpartition("=")
    try:
        return (name, number(float(value))) if name and sign else _no_pair(text)
    except ValueError:
        return _no_pair(text)


def _no_pair(text: str) -> NoReturn:
    raise BadRequest(f"{text!r} is no NAME=VALUE with a number", hint="for instance val_loss=0.21")
