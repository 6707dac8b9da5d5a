"""Looking things up: ls, experiments, show, path. All of them work without a daemon, from the catalog."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from ckptd.cli import render
from ckptd.cli.completion import complete_scope
from ckptd.cli.options import Output, output, selecting, verb
from ckptd.cli.reading import Source, open_source
from ckptd.cli.render import Column, Sheet
from ckptd.errors import BadRequest, NotFound

PAGE_MAX = 500
LIMIT = 50
_SPOILED = ("corrupt", "missing")  # whatever rung it had reached: a script must not read "verified" there

Row = dict[str, Any]


def condition(row: Row) -> str:
    """Say in one word how a checkpoint is: its level while nothing is the matter, else its state.

    >>> condition({"state": "live", "level": "verified"}), condition({"state": "corrupt", "level": "verified"})
    ('verified', 'corrupt')
    """
    state, level = str(row.get("state")), str(row.get("level"))
    return level if state == "live" or (state == "pending" and level != "none") else state


def label(row: Row) -> str:
    """Return PROJECT/NAME of a row."""
    return f"{row.get('project', '')}/{row.get('name', '')}"


def step(row: Row) -> str:
    """Return a row's step, "" for none; a second save of the same step names its revision."""
    if row.get("step") is None:
        return ""
    return f"{row['step']}" if (row.get("revision") or 1) == 1 else f"{row['step']} r{row['revision']}"


def named(row: Row) -> str:
    """Return what a sentence calls a checkpoint: PROJECT/NAME, its step and the start of its id."""
    of_step = "" if row.get("step") is None else f" step {row['step']}"
    return render.escape(f"{label(row)}{of_step} ({render.short(row['checkpoint'])})")


def _kept_by(row: Row) -> list[str]:
    """Return what keeps it; "veto" for one that no rule touches because a hook objected, and that is neither latest nor best."""
    return [*(row.get("holds") or ()), *(["veto"] if row.get("veto") else [])]


CHECKPOINTS = Sheet(
    columns=(
        Column("ID", lambda row: render.short(row["checkpoint"])),
        Column("EXPERIMENT", label),
        Column("STEP", step, right=True),
        Column("IS", condition, style=condition),
        Column("SIZE", lambda row: render.size(row.get("size_bytes")), right=True),
        Column("SAVED", lambda row: render.age(row.get("created_at"))),
        Column("HELD BY", lambda row: " ".join(_kept_by(row))),
        Column("METRICS", lambda row: render.metrics(row.get("metrics"))),
    ),
    fields=(
        lambda row: row["checkpoint"],
        label,
        lambda row: row.get("step"),
        lambda row: row.get("state"),
        lambda row: "none" if row.get("state") in _SPOILED else row.get("level"),
        lambda row: row.get("size_bytes"),
        lambda row: row.get("created_at"),
        lambda row: ",".join(_kept_by(row)),
        lambda row: row.get("path"),
    ),
)

EXPERIMENTS = Sheet(
    columns=(
        Column("EXPERIMENT", label),
        Column("STATUS", lambda row: row.get("status"), style=lambda row: str(row.get("status"))),
        Column("STEP", lambda row: row.get("last_step"), right=True),
        Column("SAVES", lambda row: row.get("checkpoints"), right=True),
        Column("SIZE", lambda row: render.size(row.get("size_bytes")), right=True),
        Column("LATEST", lambda row: (row.get("latest") or {}).get("step"), right=True),
        Column("SEEN", lambda row: render.age(row.get("seen_at"))),
        Column("BEST", lambda row: " ".join(_best(best) for best in row.get("best") or ())),
    ),
    fields=(
        lambda row: row["experiment"],
        label,
        lambda row: row.get("status"),
        lambda row: row.get("last_step"),
        lambda row: row.get("checkpoints"),
        lambda row: row.get("size_bytes"),
        lambda row: (row.get("latest") or {}).get("step"),
        lambda row: row.get("seen_at"),
        lambda row: " ".join(_best(best) for best in row.get("best") or ()),
    ),
)


def _best(best: Row) -> str:
    return f"{best.get('rule') or best.get('metric')}={render.metric(best.get('value'))}@{best.get('step')}"


def parse_scope(scope: str | None) -> dict[str, str]:
    """Split PROJECT or PROJECT/EXPERIMENT; {} for none. BadRequest when it has another form.

    >>> parse_scope("imagenet/resnet50")
    {'project': 'imagenet', 'name': 'resnet50'}
    """
    if scope is None:
        return {}
    parts = scope.split("/")
    if not all(parts) or len(parts) > 2:  # noqa: PLR2004 - project and name
        raise BadRequest(f"{scope!r} is neither PROJECT nor PROJECT/EXPERIMENT")
    return dict(zip(("project", "name"), parts, strict=False))


def pages(source: Source, op: str, *, limit: int | None, **wanted: Any) -> Iterator[tuple[Row, str | None]]:
    """Yield rows of `list` or `experiments` with the cursor after them; limit None: all there are."""
    left = limit
    after = None
    while left is None or left > 0:
        size = PAGE_MAX if left is None else min(left, PAGE_MAX)
        reply = source.request(op, {"limit": size, "after": after, **wanted})
        rows = reply["experiments" if op == "experiments" else "checkpoints"]
        after = reply.get("next")
        for row in rows:
            yield row, after
        if after is None:
            return
        left = None if left is None else left - len(rows)


def _print_rows(out: Output, found: Iterator[tuple[Row, str | None]], key: str, source: Source) -> None:
    """Print rows in the form that was asked for; --jsonl prints while pages still arrive."""
    if out.form == "jsonl":
        for row, _ in found:
            sys.stdout.write(render.json_text({"v": 1, **row}) + "\n")
        return
    everything = list(found)
    rows = [row for row, _ in everything]
    after = everything[-1][1] if everything else None
    if out.json({key: rows, "next": after, "source": source.kind}):
        return
    if out.form == "ids":
        sys.stdout.write("".join(f"{row[key[:-1]]}\n" for row in rows))
        return
    sheet = CHECKPOINTS if key == "checkpoints" else EXPERIMENTS
    render.print_lines(out.screen, sheet.lines(out.screen, rows))
    if not rows and out.screen.terminal:
        render.say(f"no {key}")
    if after is not None:
        render.say(f"there are more than these {len(rows)}: --all, or --limit N")


@verb(
    ("ckpt ls", "the newest of everything"),
    ("ckpt ls imagenet/resnet50 --sort step", "one experiment, the highest step first"),
    ("ckpt ls --state corrupt --all", "whatever is damaged"),
    ("ckpt ls imagenet --state all", "with those that were dropped or replaced"),
    ("ckpt ls --level verified -q | xargs -n1 ckpt verify", "ids for another program"),
    ("ckpt ls imagenet --summary", "counts and sizes only"),
)
@click.argument("scope", required=False, metavar="[PROJECT[/EXPERIMENT]]", shell_complete=complete_scope)
@click.option("--project", metavar="NAME", help="Of this project.")
@click.option(
    "--state",
    type=click.Choice(["pending", "live", "corrupt", "missing", "failed", "replaced", "trashed", "dropped", "all"]),
    help="Only in this state; all: dropped and replaced ones too.",
)
@click.option("--level", type=click.Choice(["staged", "durable", "verified", "tiered"]), help="At least this good.")
@click.option("--tag", metavar="TAG", help="Carrying this tag, or in an experiment that does.")
@click.option("--sort", type=click.Choice(["newest", "step"]), default="newest", show_default=True)
@click.option("-n", "--limit", type=click.IntRange(min=1), default=LIMIT, show_default=True, help="How many at most.")
@click.option("-a", "--all", "everything", is_flag=True, help="All there are.")
@click.option("--summary", is_flag=True, help="Counts, sizes, the newest, the oldest and the best, not the rows.")
@output(lines=True, ids=True)
def ls(scope: str | None, out: Output, *, everything: bool, summary: bool, **wanted: Any) -> None:
    """List checkpoints, newest first; those that were dropped or replaced only when asked for.

    In a pipe, by tabs: id, PROJECT/EXPERIMENT, step, state, level (none if damaged), bytes, time, holds, path.
    """
    limit = wanted.pop("limit")
    narrowing = {word for word in ("state", "level", "tag") if wanted[word] is not None}
    if summary and (narrowing or out.form not in {"human", "json"}):
        message = "--summary goes with PROJECT[/EXPERIMENT], --project and --json only"
        raise BadRequest(message)
    wanted |= parse_scope(scope)
    with open_source() as source:
        if summary:
            named = {word: wanted.get(word) for word in ("project", "name")}
            _print_summary(out, source.request("summary", named))
            return
        found = pages(source, "list", limit=None if everything else limit, **wanted)
        _print_rows(out, found, "checkpoints", source)


def _print_summary(out: Output, body: Row) -> None:
    if out.json(body):
        return
    lines = [
        f"{body.get('count', 0)} checkpoints, {render.size(body.get('size_bytes', 0))}",
        *(f"{body.get(word, 0):>8} {word}" for word in ("valid", "invalid", "recoverable")),
        "",
    ]
    named = [(word, body.get(word)) for word in ("newest", "oldest")]
    named += [(f"best {best.get('metric')}", best) for best in body.get("best") or ()]
    for word, row in named:
        if row:
            lines.append(
                f"{render.escape(word)}: {render.escape(label(row))} step {row.get('step')} {row['checkpoint']}"
            )
    render.print_lines(out.screen, lines)


@verb(
    ("ckpt experiments", "the newest"),
    ("ckpt experiments imagenet --json", "one project's, for a program"),
)
@click.argument("project", required=False, shell_complete=complete_scope)
@click.option("-n", "--limit", type=click.IntRange(min=1), default=LIMIT, show_default=True, help="How many at most.")
@click.option("-a", "--all", "everything", is_flag=True, help="All there are.")
@output(lines=True, ids=True)
def experiments(project: str | None, limit: int, out: Output, *, everything: bool) -> None:
    """List experiments, newest first.

    In a pipe: id, PROJECT/EXPERIMENT, status, last step, number of saves, bytes, step of the newest verified one,
    time of the last sign of life, best values, separated by tabs.
    """
    with open_source() as source:
        found = pages(source, "experiments", limit=None if everything else limit, project=project)
        _print_rows(out, found, "experiments", source)


@verb(
    ("ckpt path latest", "the newest verified checkpoint of all"),
    ("ckpt path imagenet/resnet50@best:val_loss", "the best of one experiment"),
    ('python train.py --resume "$(ckpt path imagenet/resnet50)"', "go on from the last good one"),
)
@selecting
@click.option(
    "--level",
    type=click.Choice(["durable", "verified"]),
    default="verified",
    show_default=True,
    help="At least so good.",
)
@output()
def path(where: dict[str, str | None], level: str, out: Output) -> None:
    """Print where a checkpoint lies, and nothing else.

    Exit code 3 when there is none that is good enough.
    """
    with open_source() as source:
        found = source.request("resolve", {"level": level, **where})
    if not found.get("path"):
        raise NotFound(
            f"checkpoint {found.get('checkpoint')} has no place on a disk yet", hint="`ckpt wait` waits for it"
        )
    if out.json(found):
        return
    if out.screen.terminal:
        sys.stdout.write(render.escape(found["path"]) + "\n")
    else:
        # A program gets the very bytes of the path, whatever they are.
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(found["path"]) + b"\n")


@verb(
    ("ckpt show latest", "the newest verified checkpoint"),
    ("ckpt show 6f1c0e", "by the start of its id"),
    ("ckpt show imagenet/resnet50@step:1000 --json", "for a program"),
)
@selecting
@output()
def show(where: dict[str, str | None], out: Output) -> None:
    """Everything known about one checkpoint."""
    with open_source() as source:
        body = source.request("show", where)
    if not out.json({**body, "source": source.kind}):
        from ckptd.cli.describing import describe

        render.print_lines(out.screen, describe(body, out.screen))
