"""The file cache: cache ls, cache trim."""

from typing import Any

import click

from ckptd.cli import render
from ckptd.cli.daemon_socket import FOREVER_S, connect
from ckptd.cli.options import Family, Output, Verb, asked, output
from ckptd.section import parse_size

FILES = render.Sheet(
    columns=(
        render.Column("KEY", lambda row: render.short(row["key"])),
        render.Column("SIZE", lambda row: render.size(row["size_bytes"]), right=True),
        render.Column("USED", lambda row: render.age(row["used_at"])),
        render.Column("FETCHED", lambda row: render.age(row["fetched_at"])),
        render.Column("", lambda row: "in use" if row["in_use"] else ""),
        render.Column("PATH", lambda row: row["path"]),
    ),
    fields=render.keys("key size_bytes used_at fetched_at in_use path"),
)


class Bytes(click.ParamType[int]):
    """A size on the command line."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        try:
            found = parse_size(value if isinstance(value, int) else str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not isinstance(found, int):
            self.fail(f"{value!r} is no size", param, ctx)
        return found


@click.group(
    cls=Family,
    examples=(
        ("ckpt cache ls", "what is kept, the longest unused first"),
        ("ckpt cache trim --to 20G", "give up the longest unused until the rest has 20 GiB"),
    ),
)
def cache() -> None:
    """List the files that were fetched back from an archive, or give some up."""


@cache.command("ls", cls=Verb, examples=(("ckpt cache ls", "the longest unused first"),))
@output()
def list_files(out: Output) -> None:
    """List what is kept, the longest unused first.

    In a pipe: key, bytes, last use, when it was fetched, whether it is in use, and path, separated by tabs.
    """
    with connect() as daemon:
        body = daemon.request("cache")
    if out.json(body):
        return
    render.print_lines(out.screen, FILES.lines(out.screen, body["entries"]))
    if out.screen.terminal:
        room = f"{render.size(body['bytes_used'])} of {render.size(body['bytes_max'])}"
        render.say(f"{len(body['entries'])} in {render.escape(body['directory'])}, {room}")


@cache.command("trim", cls=Verb, examples=(("ckpt cache trim --to 20G", "the longest unused go first"),))
@click.option("--to", "to_bytes", type=Bytes(), required=True, metavar="SIZE", help="What may stay; 0: nothing.")
@output()
def trim(to_bytes: int, out: Output) -> None:
    """Give up the longest unused until the rest fits; what is in use stays."""
    with connect() as daemon:
        body = daemon.request("cache.trim", {"to_bytes": to_bytes}, within_s=asked().or_timeout_s(FOREVER_S))
    if not out.json(body):
        freed = sum(row["size_bytes"] for row in body["dropped"])
        render.say(f"gave up {len(body['dropped'])}, {render.size(freed)}; {render.size(body['bytes_used'])} stay")
