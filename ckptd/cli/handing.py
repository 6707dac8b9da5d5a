"""Handing files over: submit."""

import os
import secrets
import stat
import sys
from typing import Any

import click

from ckptd.cli import render
from ckptd.cli.daemon_socket import connect
from ckptd.cli.options import Output, output, verb
from ckptd.errors import BadPath, BadRequest, Denied, NotFound, Unreachable
from ckptd_client import wire

LEVELS = ("staged", "durable", "verified")


@verb(
    ("ckpt submit runs/last.ckpt", "a file that a trainer has finished writing"),
    ("ckpt submit ckpt-1000/ -p imagenet -e resnet50 --step 1000 -m val_loss=0.31", "with all that is known of it"),
    ("ckpt submit last.ckpt --wait durable", "comes back when a power cut can't take it any more"),
    ("ckpt submit last.ckpt --spool", "works without a daemon: the next one takes it in"),
)
@click.argument("path", type=click.Path())
@click.option("-p", "--project", metavar="NAME", help="The project; else the root's.")
@click.option("-e", "--experiment", metavar="NAME", help="The experiment; else named after the directory.")
@click.option("--step", type=click.IntRange(min=0), help="The training step; else read from name and contents.")
@click.option("--epoch", type=float, help="The epoch, which may be a fraction.")
@click.option("-m", "--metric", "metrics", multiple=True, metavar="NAME=VALUE", help="A metric; may be repeated.")
@click.option("--note", metavar="TEXT", help="A note to keep with it.")
@click.option("--wait", "level", type=click.Choice(LEVELS), help="Come back when it is this good; see --timeout.")
@click.option("--spool", is_flag=True, help="Without a daemon, leave the offer where the next one finds it.")
@output(ids=True)
def submit(path: str, level: str | None, out: Output, *, spool: bool, **told: Any) -> None:
    """Hand over a checkpoint that a program has written.

    PATH stays where it is: ckptd looks after it from now on. Prints the checkpoint's id.
    """
    if spool and level:
        message = "--wait needs a daemon, --spool is for when there is none"
        raise BadRequest(message)
    offer = {name: value for name, value in told.items() if value is not None}
    offer |= {"path": _checked(path), "checkpoint": secrets.token_hex(16), "metrics": _parsed(told["metrics"])}
    try:
        with connect() as daemon:
            taken = daemon.request("submit", offer)
    except Unreachable as gone:
        if not spool:
            gone.hint += "; --spool leaves it for the next daemon"
            raise
        taken = _spool(offer)
    if level:
        from ckptd.cli.watching import await_level, print_reached, raise_if_lost

        reached = await_level({"selector": taken["checkpoint"]}, level)
        print_reached(reached, out)
        raise_if_lost(reached)
        return
    if not out.json(taken):
        sys.stdout.write(f"{taken['checkpoint']}\n")


def _spool(offer: dict[str, Any]) -> dict[str, Any]:
    """Leave the offer in the spool. Denied or BadPath when that can't be."""
    from ckptd_client import places, spool

    try:
        state = places.ensure_state_dir(places.state_dir())
        left = spool.write_offer(places.spool_dir(state), offer["checkpoint"], offer)
    except places.PlaceError as error:
        raise BadPath(str(error)) from error
    except OSError as error:
        raise Denied(f"can't write to the spool: {error}") from error
    render.say(f"ckpt: no daemon answers; the offer waits at {render.escape(left)}")
    return {"checkpoint": offer["checkpoint"], "state": "spooled"}


def _checked(path: str) -> str:
    """Make a path absolute, links in it untouched. NotFound when nothing is there, BadPath when it is nothing to keep.

    A link passes: where it leads is for the daemon to say, beneath its roots. The daemon looks at all of it again.
    """
    absolute = os.path.abspath(os.path.expanduser(path))
    try:
        mode = os.lstat(absolute).st_mode
    except OSError as error:
        message = (
            f"nothing is at {absolute}" if isinstance(error, FileNotFoundError) else f"{absolute}: {error.strerror}"
        )
        raise NotFound(message, hint="the path is looked at from the current directory") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise BadPath(
            f"{absolute} is neither a file nor a directory",
            hint="submit what a trainer wrote: a file, or a directory of files",
        )
    return absolute


def _parsed(pairs: tuple[str, ...]) -> dict[str, float | str]:
    """Turn NAME=VALUE pairs into metrics fit for the wire. BadRequest names the wrong one."""
    found: dict[str, float | str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            found[name] = wire.number(float(value))
        except ValueError as error:
            raise BadRequest(f"--metric {pair!r}: {value!r} is no number") from error
        if not name or not equals:
            raise BadRequest(f"--metric {pair!r} is not NAME=VALUE")
    return found
