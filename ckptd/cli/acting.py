"""Deciding what stays and what counts: pin, unpin, unveto, tag, untag, rm, restore.

What destroys is shown first, asked about, and then done to exactly what was shown: ids and the
list of drops travel with the request, so that what arrived in between is not hit.
"""

import sys
from collections.abc import Sequence
from typing import Any

import click

from ckptd.cli import render
from ckptd.cli.completion import complete_selector
from ckptd.cli.daemon_socket import FOREVER_S, connect
from ckptd.cli.listing import named
from ckptd.cli.options import Output, as_selector, asked, output, selecting, verb
from ckptd.errors import BadRequest

Row = dict[str, Any]


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


@verb(
    ("ckpt show 6f1c0e", "which hook vetoed it, and why"),
    ("ckpt unveto 6f1c0e --note 'looked at it'", "from now on it may be the latest and the best"),
)
@selecting
@click.option("--note", metavar="TEXT", help="Why; kept in the audit trail.")
@output(ids=True)
def unveto(where: dict[str, str | None], note: str | None, out: Output) -> None:
    """Let a checkpoint count whose save a hook vetoed.

    The latest and the best are decided again with it, and the rules may retire it like any other. What the hook says
    of later saves is heard as before.
    """
    with connect() as daemon:
        done = daemon.request("unveto", {"note": note, **where})
    if out.json(done):
        return
    if out.form == "ids":
        sys.stdout.write(f"{done['checkpoint']}\n")
        return
    render.say(f"{named(done)} {'counts now' if done['changed'] else 'was not vetoed'}")


def _hold(op: str, where: dict[str, str | None], note: str | None, out: Output) -> None:
    with connect() as daemon:
        done = daemon.request(op, {"note": note, **where})
    if out.json(done):
        return
    if out.form == "ids":
        sys.stdout.write(f"{done['checkpoint']}\n")
        return
    said = f"{op}ned {named(done)}"
    render.say(said if done.get("changed", True) else f"{named(done)}: nothing to {op}")


@verb(
    ("ckpt rm --dry-run 6f1c0e", "what would happen"),
    ("ckpt rm imagenet/resnet50@step:100", "asks first"),
    ("ckpt rm --yes 6f1c0e 77ab01", "asks nothing"),
    ("ckpt rm --give-up 6f1c0e", "a save that can't be written and waits in memory: it is lost"),
)
@click.argument("selectors", nargs=-1, required=True, metavar="SELECTOR...", shell_complete=complete_selector)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would happen.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--give-up", is_flag=True, help="Saves on their way, whose bytes are nowhere else; nothing else.")
@output(ids=True)
def rm(selectors: Sequence[str], out: Output, *, dry_run: bool, yes: bool, give_up: bool) -> int:
    """Remove checkpoints, unless something holds them.

    Exit code 7, and nothing is removed, when one of them is pinned, leased, the best or the newest good one, or on its
    way without --give-up.
    """
    also = {"give_up": True} if give_up else {}
    with connect() as daemon:
        shown = [
            daemon.request("remove", {"selector": as_selector(text), "dry_run": True, **also}) for text in selectors
        ]
        for row in shown:
            what = f"would {row.get('action')}" if dry_run else row.get("action")
            size = render.size(row.get("size_bytes"))
            render.say(f"{what} {named(row)}, {size}, {render.escape(row.get('path') or '')}")
        if dry_run:
            _print_removed(shown, out, dry_run=True)
            return 0
        if not confirmed(f"remove {len(shown)} checkpoint{'s' if len(shown) > 1 else ''}?", yes=yes):
            return 1
        done = [daemon.request("remove", {"selector": row["checkpoint"], "dry_run": False, **also}) for row in shown]
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
        render.say(f"removed {named(row)}{render.escape(reason)}")


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


@verb(
    ("ckpt tag paper imagenet/resnet50@best:val_loss", "find it again with `ckpt ls --tag paper`"),
    ("ckpt bulk tag paper imagenet --level verified", "all that `ckpt ls` would list"),
)
@click.argument("tag", metavar="TAG")
@selecting
@output(ids=True)
def tag(tag: str, where: dict[str, str | None], out: Output) -> None:
    """Give a checkpoint a tag."""
    _tag({"add": [tag]}, where, out)


@verb(("ckpt untag paper 6f1c0e", "it is one no more"))
@click.argument("tag", metavar="TAG")
@selecting
@output(ids=True)
def untag(tag: str, where: dict[str, str | None], out: Output) -> None:
    """Take a tag away from a checkpoint."""
    _tag({"remove": [tag]}, where, out)


def _tag(change: dict[str, list[str]], where: dict[str, str | None], out: Output) -> None:
    with connect() as daemon:
        done = daemon.request("checkpoint.tag", {**change, **where})
    if out.json(done):
        return
    if out.form == "ids":
        sys.stdout.write(f"{done['checkpoint']}\n")
        return
    render.say(f"{named(done)}: {render.escape(', '.join(done.get('tags') or ()) or 'no tag')}")


@verb(
    ("ckpt restore 6f1c0e", "back from the trash, and pinned so that the rules leave it alone"),
    ("ckpt restore 6f1c0e --no-pin", "the rules decide again at the next save"),
)
@selecting
@click.option("--no-pin", is_flag=True, help="Do not pin it.")
@output(ids=True)
def restore(where: dict[str, str | None], out: Output, *, no_pin: bool) -> None:
    """Bring back what lies in the trash: a checkpoint, or the optimizer states that were taken out of one.

    Exit code 3 when the trash has been emptied since.
    """
    with connect() as daemon:
        done = daemon.request("restore", {"pin": not no_pin, **where}, within_s=asked().or_timeout_s(FOREVER_S))
    if out.json(done):
        return
    if out.form == "ids":
        sys.stdout.write(f"{done['checkpoint']}\n")
        return
    what: Any = done.get("restored")
    said = "restored" if what == "checkpoint" else f"restored {', '.join(what)} of"
    pinned = ", and pinned it" if done.get("pinned") else ""
    damaged = "; it is damaged, as it was before" if done.get("state") == "corrupt" else ""
    render.say(f"{render.escape(said)} {named(done)}{pinned}: {render.escape(done.get('path') or '')}{damaged}")
