"""cleanup: find what is no good checkpoint any more, say why, and take it away.

Bytes go to the trash, from where `ckpt restore` brings them back until its grace ends; a row without bytes
goes out of the lists. The daemon decides about each: here is only what a person would leave alone besides.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import click

from ckptd.cli import render
from ckptd.cli.completion import complete_scope
from ckptd.cli.daemon_socket import Daemon, connect
from ckptd.cli.each import REMOVE, Act, Result, Row, counted, do, once
from ckptd.cli.listing import label, named, pages, parse_scope, step
from ckptd.cli.options import Output, Span, output, verb
from ckptd.cli.verifying import in_words
from ckptd.clock import SystemClock
from ckptd.errors import CkptdError

YOUNG_S = 3600.0
KEPT_WITHOUT_FILES = frozenset({"pin", "lease", "parent", "upload"})  # holds that count for a row alone, too
TRASH, FORGET, LEAVE = "trash", "forget", "leave"
_LEFT_BY = frozenset({"held", "not_found", "changed"})  # a promise, or it is no longer what the list said


@dataclass(slots=True)
class Found:
    """One checkpoint that is no good.

    reasons  what is the matter with it
    action   "trash", "forget" (its row alone), or "leave", and then `left` says why
    error    what kept it from being looked at, or from being done
    """

    row: Row
    reasons: list[str]
    action: str = LEAVE
    left: str = ""
    done: bool = False
    error: CkptdError | None = None

    def to_wire(self) -> Row:
        """Return it as --json and --jsonl print it."""
        about = ("checkpoint", "project", "name", "step", "state", "size_bytes", "path")
        return {
            **{name: self.row.get(name) for name in about},
            "action": self.action,
            "reasons": self.reasons,
            "damage": (self.row.get("error") or {}).get("damage") or [],
            "left": self.left or None,
            "done": self.done,
            "error": None if self.error is None else self.error.to_wire(),
        }


@dataclass(slots=True)
class Surroundings:
    """What decides about a checkpoint beside its own row; asked for once each.

    troubled  roots that can't be looked at now, and why
    """

    daemon: Daemon
    younger_s: float
    troubled: dict[str, str]
    now: datetime = field(default_factory=SystemClock().now)
    newest_corrupt: dict[str, str] = field(default_factory=dict)  # by experiment
    _whole: dict[str, bool] = field(default_factory=dict)

    def has_whole(self, row: Row) -> bool:
        """Whether the experiment of `row` has a verified checkpoint."""
        experiment = row["experiment"]
        if experiment not in self._whole:
            wanted = {"project": row["project"], "name": row["name"], "state": "live", "level": "verified"}
            rows = pages(self.daemon, "list", limit=None, sort="newest", **wanted)
            self._whole[experiment] = any(one["experiment"] == experiment for one, _ in rows)
        return self._whole[experiment]

    def is_young(self, row: Row) -> bool:
        """Whether it came, or was saved, less than `younger_s` ago."""
        times = [row.get(name) for name in ("created_at", "staged_at", "durable_at")]
        newest = max((datetime.fromisoformat(at) for at in times if at), default=self.now)
        return self.now - newest < timedelta(seconds=self.younger_s)


@verb(
    ("ckpt cleanup", "what is damaged, missing or failed, and what would become of it; changes nothing"),
    ("ckpt cleanup imagenet --confirm", "does it; what has bytes can be restored from the trash"),
    ("ckpt cleanup --younger-than 1d --json", "leave alone what came in the last day"),
)
@click.argument("scope", required=False, metavar="[PROJECT[/EXPERIMENT]]", shell_complete=complete_scope)
@click.option("--confirm", is_flag=True, help="Do it. Without it nothing is changed.")
@click.option(
    "--younger-than",
    "younger_s",
    type=Span(),
    default="1h",
    metavar="SPAN",
    show_default=True,
    help="Leave alone what is younger.",
)
@output(lines=True, ids=True)
def cleanup(scope: str | None, younger_s: float, out: Output, *, confirm: bool) -> int:
    """Find checkpoints that are damaged, missing or failed; with --confirm take them away.

    Damaged ones go to the trash, until its grace ends; of the others only the row goes. Exit code 1 when one of them
    could not be looked at or taken away; the others were. In a pipe, by tabs: id, PROJECT/EXPERIMENT, step, state,
    bytes, what is done (trash, forget, leave), why, and what it is left for.
    """
    with connect() as daemon:
        every = list(_look(daemon, parse_scope(scope), younger_s))
        if out.form == "human":
            _show(every, out)
        wanted = [found for found in every if found.action != LEAVE]
        for found in wanted if confirm else ():
            _do(daemon, found, out)
    _print(every, out, confirm=confirm)
    _sum_up(every, confirm=confirm)
    return CkptdError.exit_code if any(found.error is not None for found in every) else 0


def _look(daemon: Daemon, scope: Row, younger_s: float) -> Iterator[Found]:
    """Find everything that is no good, and ask of each what would become of it."""
    roots = daemon.request("roots", {})["roots"]
    around = Surroundings(daemon, younger_s, {root["path"]: root["problem"] for root in roots if root.get("problem")})
    for state in ("corrupt", "missing", "failed"):
        for row in [row for row, _ in pages(daemon, "list", limit=None, sort="newest", state=state, **scope)]:
            if state == "corrupt":
                around.newest_corrupt.setdefault(row["experiment"], row["checkpoint"])
            yield _judged(row, around)
    for row, _ in pages(daemon, "list", limit=None, sort="newest", state="pending", **scope):
        if row.get("level") == "none" and not around.is_young(row):
            mine = "it may still be written to; mend or remove the file yourself"
            yield Found(row, [f"found {render.age(row.get('staged_at'))}, and not whole yet"], left=mine)


def _reasons(row: Row) -> list[str]:
    """Say what is the matter with a checkpoint, as the daemon recorded it."""
    error = row.get("error") or {}
    if row["state"] == "corrupt" and error.get("damage"):
        return [in_words(one) for one in error["damage"]]
    return [str(error.get("message") or f"it is {row['state']}")]


def _judged(row: Row, around: Surroundings) -> Found:
    """Decide about one: what a person would leave alone, what the daemon says, and what is the last of its kind."""
    found = Found(row, _reasons(row), left=_left_for(row, around))
    if found.left:
        return found
    answer = once(around.daemon, REMOVE.op, row, {"dry_run": True, "state": row["state"]})
    if not isinstance(answer, CkptdError):
        found.left = _last_one(row, around)
        found.action = LEAVE if found.left else answer["action"]
    elif answer.code in _LEFT_BY:
        said = answer.message.removeprefix(f"checkpoint {row['checkpoint']} is ")
        found.left = said + (f"; {answer.hint}" if answer.hint else "")
    else:
        found.error = answer
    return found


def _left_for(row: Row, around: Surroundings) -> str:
    """Say why it is left alone before the daemon is asked; "" for no such reason."""
    if around.is_young(row):
        return f"younger than {render.span(around.younger_s)}"
    if row["state"] == "corrupt":
        return "memory still holds it, and ckptd writes it again from there" if row.get("hot") else ""
    held = sorted(KEPT_WITHOUT_FILES.intersection(row.get("holds") or ()))
    if held:
        return f"held: {', '.join(held)}"
    problem = around.troubled.get(row.get("root") or "")
    return f"its root has a problem: {problem}" if problem else ""


def _last_one(row: Row, around: Surroundings) -> str:
    """Say that some of its bytes may be all there is of a training; "" where there is better."""
    if around.newest_corrupt.get(row["experiment"]) != row["checkpoint"] or around.has_whole(row):
        return ""
    return "the newest of its experiment, and no other is whole; `ckpt rm` removes it by name"


def _do(daemon: Daemon, found: Found, out: Output) -> None:
    """Take one away. Only while it is what it was called: one that was read back as good meanwhile stays."""
    result = Result([found.row])
    act = Act(REMOVE.word, REMOVE.past, REMOVE.op, {"dry_run": False, "state": found.row["state"]})
    do(daemon, act, found.row, result, out)
    found.done = bool(result.done)
    for _, error in result.failed:
        found.error = error
    _print_line(found, out)


def _print_line(found: Found, out: Output) -> None:
    if out.form == "jsonl":
        sys.stdout.write(render.json_text({"v": 1, **found.to_wire()}) + "\n")
        sys.stdout.flush()


def _print(every: list[Found], out: Output, *, confirm: bool) -> None:
    """Print what --json, --jsonl and -q want beside what was printed with each act."""
    if out.json({"dry_run": not confirm, "found": [found.to_wire() for found in every]}):
        return
    for found in every:
        acted_on = confirm and found.action != LEAVE
        if not acted_on:
            _print_line(found, out)
        if out.form == "ids" and not confirm and found.action != LEAVE:
            sys.stdout.write(f"{found.row['checkpoint']}\n")


SHEET = render.Sheet(
    columns=(),
    fields=(
        lambda found: found.row["checkpoint"],
        lambda found: label(found.row),
        lambda found: step(found.row),
        lambda found: found.row["state"],
        lambda found: found.row.get("size_bytes"),
        lambda found: found.action,
        lambda found: "; ".join(found.reasons),
        lambda found: found.error.message if found.error is not None else found.left,
    ),
)


def _show(every: list[Found], out: Output) -> None:
    """Show them: on a terminal as verify does, each with a line for every reason; else by tabs."""
    render.print_lines(
        out.screen,
        [line for found in every for line in _lines(found, out.screen)]
        if out.screen.terminal
        else SHEET.lines(out.screen, every),
    )


def _lines(found: Found, screen: render.Screen) -> list[str]:
    head = f"{screen.paint(f'{found.action:<6}', 'dim' if found.action == LEAVE else 'red')}  {named(found.row)}"
    lines = [f"{head}  {found.row['state']}  {render.size(found.row.get('size_bytes'))}"]
    lines += [render.escape(f"        {reason}") for reason in found.reasons]
    if found.error is not None:
        lines.append(render.escape(f"        could not be looked at: {found.error.message}"))
    elif found.left:
        lines.append(render.escape(f"        stays: {found.left}"))
    return lines


def _sum_up(every: list[Found], *, confirm: bool) -> None:
    left = sum(1 for found in every if found.left)
    failed = sum(1 for found in every if found.error is not None)
    rest = (f"; {left} left alone" if left else "") + (f"; {failed} could not be" if failed else "")
    wanted = [found for found in every if (found.done if confirm else found.action != LEAVE)]
    if not wanted:
        render.say(f"nothing {'was cleaned up' if confirm and failed else 'to clean up'}{rest}")
        return
    binned = [found for found in wanted if found.action == TRASH]
    size = render.size(sum(found.row.get("size_bytes") or 0 for found in binned))
    parts = [f"{len(binned)} to the trash, {size}"] if binned else []
    parts += [f"{len(wanted) - len(binned)} out of the lists"] if len(wanted) > len(binned) else []
    said = "cleaned up" if confirm else "would clean up"
    render.say(f"{said} {counted(len(wanted))}: {', '.join(parts)}{rest}")
    if not confirm:
        render.say("nothing was changed; the same command with --confirm does it")
    elif binned:
        render.say("`ckpt restore ID` brings one back from the trash until its grace ends")
