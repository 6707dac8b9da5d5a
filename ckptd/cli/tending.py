"""Looking after the daemon: roots, watch-root, rebuild, reload, stop."""

import os
from typing import Any

import click

from ckptd.cli import render
from ckptd.cli.daemon_socket import FOREVER_S, connect
from ckptd.cli.options import Family, Output, Verb, asked, output, verb
from ckptd.errors import CkptdError

STOP_S = 60.0  # twice the daemon's default of drain_s

ROOTS = render.Sheet(
    columns=(
        render.Column("ROOT", lambda row: row.get("path")),
        render.Column("KIND", lambda row: row.get("kind")),
        render.Column("PROJECT", lambda row: row.get("project")),
        render.Column("IS", lambda row: row.get("state"), style=lambda row: str(row.get("state"))),
        render.Column("TYPE", lambda row: row.get("filesystem")),
        render.Column("SAVES", lambda row: row.get("checkpoints"), right=True),
        render.Column("SIZE", lambda row: render.size(row.get("size_bytes")), right=True),
        render.Column("SCANNED", lambda row: render.age(row.get("scanned_at"))),
        render.Column("PROBLEM", lambda row: row.get("problem"), style=lambda _: "red"),
    ),
    fields=render.keys("path kind project state filesystem checkpoints size_bytes scanned_at problem"),
)


@click.group(
    cls=Family,
    invoke_without_command=True,
    examples=(
        ("ckpt roots", "all of them"),
        ("ckpt roots add /data/runs --watch", "take in what other programs write there"),
        ("ckpt roots add /scratch/ckpt", "let trainers save there"),
    ),
)
@output()
def roots(out: Output) -> None:
    """List the directory trees that ckptd manages or watches, or add one.

    In a pipe: path, kind, project, state, file system, checkpoints, bytes, last scan and problem, separated by tabs.
    """
    if click.get_current_context().invoked_subcommand:
        return
    with connect() as daemon:
        body = daemon.request("roots")
    if not out.json(body):
        render.print_lines(out.screen, ROOTS.lines(out.screen, body["roots"]))


@roots.command(
    "add",
    cls=Verb,
    examples=(
        ("ckpt roots add /data/runs --watch", "take in what other programs write there"),
        ("ckpt roots add /scratch/ckpt --project imagenet", "let trainers save there"),
    ),
)
@click.argument("path", type=click.Path())
@click.option("--watch", is_flag=True, help="Other programs write there; ckptd only looks.")
@click.option("-p", "--project", metavar="NAME", help="The project of what is found there.")
@output()
def add(path: str, project: str | None, out: Output, *, watch: bool) -> None:
    """Manage a directory tree, or with --watch only watch it."""
    _add(path, project, "watched" if watch else "managed", out)


@verb(
    ("ckpt watch-root /data/runs", "take in what other programs write there"),
    ("ckpt watch-root ~/lightning_logs -p mnist", "under a project of that name"),
)
@click.argument("path", type=click.Path())
@click.option("-p", "--project", metavar="NAME", help="The project of what is found there.")
@output()
def watch_root(path: str, project: str | None, out: Output) -> None:
    """Watch a directory that other programs write to."""
    _add(path, project, "watched", out)


def _add(path: str, project: str | None, kind: str, out: Output) -> None:
    absolute = os.path.abspath(os.path.expanduser(path))
    with connect() as daemon:
        done = daemon.request("root.add", {"path": absolute, "kind": kind, "project": project})
    if not out.json(done):
        said = "added" if done.get("added", True) else "already there"
        render.say(f"{said}: {render.escape(done['root'])} ({done.get('kind')})")


@verb(
    ("ckpt rebuild", "from all roots that are known"),
    ("ckpt rebuild /data/runs", "from one tree, known or not"),
)
@click.argument("root", required=False, type=click.Path())
@output()
def rebuild(root: str | None, out: Output) -> int:
    """Make the catalog again from the manifests on disk.

    Only adds: what the catalog knows already stays as it is. Exit code 1 when a root could not be read.
    """
    path = os.path.abspath(os.path.expanduser(root)) if root else None
    with connect() as daemon:
        body = daemon.request("rebuild", {"root": path}, within_s=asked().or_timeout_s(FOREVER_S))
    if not out.json(body):
        render.print_lines(out.screen, REBUILT.lines(out.screen, body["roots"]))
    return CkptdError.exit_code if any(row.get("problem") for row in body["roots"]) else 0


REBUILT = render.Sheet(
    columns=(
        render.Column("ROOT", lambda row: row.get("root")),
        render.Column("FOUND", lambda row: row.get("found"), right=True),
        render.Column("ADDED", lambda row: row.get("added"), right=True),
        render.Column("KNOWN", lambda row: row.get("known"), right=True),
        render.Column("DAMAGED", lambda row: row.get("damaged"), right=True),
        render.Column("PROBLEM", lambda row: row.get("problem"), style=lambda _: "red"),
    ),
    fields=render.keys("root found added known damaged problem"),
)


@verb(("ckpt reload", "after an edit of the configuration; `ckpt config check` checks it first"))
@output()
def reload(out: Output) -> None:
    """Make the daemon read its configuration again."""
    with connect() as daemon:
        done: dict[str, Any] = daemon.request("reload")
    if out.json(done):
        return
    changed = done.get("changed") or ["nothing"]
    render.say(f"changed: {render.escape(', '.join(changed))}")
    if done.get("restart_needed"):
        render.say(f"takes effect after a restart: {render.escape(', '.join(done['restart_needed']))}")


@verb(
    ("ckpt stop", "comes back when the daemon has ended"),
    ("ckpt stop --no-wait", "comes back at once"),
)
@click.option("--no-wait", is_flag=True, help="Do not wait until it has ended.")
@output()
def stop(out: Output, *, no_wait: bool) -> None:
    """Stop the daemon once its running jobs are done.

    Saves that trainers make meanwhile go to the spool; the next daemon takes them in.
    """
    with connect() as daemon:
        done = daemon.request("stop")
        if not no_wait:
            daemon.wait_closed(timeout_s=asked().or_timeout_s(STOP_S))
    if not out.json({**done, "ended": not no_wait}):
        render.say("the daemon was told to stop" if no_wait else "the daemon has stopped")
