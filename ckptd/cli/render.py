"""How things look: colours, tables, sizes, times, JSON, complaints. The only file that decides it.

Names, notes and paths come from other people's programs: `escape` makes what could move the
cursor, recolour the terminal or reorder text visible, and every cell goes through it. On a terminal
a table has a header, short ids and ages; in a pipe it is tab-separated, without a header, with
whole ids, ISO times and bytes.
"""

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import click

from ckptd.clock import SystemClock
from ckptd.errors import BadConfig, Bug, CkptdError

SHORT_ID = 12
GAP = "  "
LAST_COLUMN_MIN = 12
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
COLOURS = {
    "verified": "green",
    "tiered": "green",
    "durable": "cyan",
    "staged": "yellow",
    "pending": "yellow",
    "corrupt": "red",
    "missing": "red",
    "failed": "red",
    "lost": "red",
    "running": "green",
    "ok": "green",
    "warn": "yellow",
    "fail": "red",
    "degraded": "red",
    "stuck": "red",
    "keep": "green",
    "drop": "red",
}


def escape(text: object) -> str:
    r"""Make control, bidirectional, invisible and undecodable characters visible.

    >>> escape("a" + chr(27) + "[31mb")
    'a\\x1b[31mb'
    """
    plain = str(text)
    if plain.isascii() and plain.isprintable():
        return plain
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], plain)


@dataclass(frozen=True, slots=True)
class Screen:
    """What standard output is: a terminal or not, in colour or not, how large."""

    terminal: bool
    colour: bool
    columns: int = 80
    lines: int = 24

    @classmethod
    def detect(cls, *, no_color: bool = False, environ: Mapping[str, str] | None = None) -> "Screen":
        """Look at standard output and the environment; --no-color and NO_COLOR beat FORCE_COLOR."""
        env = os.environ if environ is None else environ
        terminal = sys.stdout.isatty()
        columns, lines = _terminal_size(env) if terminal else (80, 24)
        return cls(terminal, wants_colour(env, terminal=terminal, no_color=no_color), columns, lines)

    def paint(self, text: str, style: str | None) -> str:
        """Return `text` in a style of _CODES or COLOURS, or as it is where colours are off."""
        code = _CODES.get(COLOURS.get(style or "", style or ""))
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code and text else text


def _terminal_size(env: Mapping[str, str]) -> tuple[int, int]:
    """Return columns and lines; COLUMNS and LINES beat what the terminal says, which may be 0."""
    try:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        columns, lines = 0, 0
    named = [int(env.get(name) or 0) if env.get(name, "").isdecimal() else 0 for name in ("COLUMNS", "LINES")]
    return named[0] or columns or 80, named[1] or lines or 24


def wants_colour(env: Mapping[str, str], *, terminal: bool, no_color: bool) -> bool:
    """Decide about colours as no-color.org and force-color.org ask."""
    if no_color or env.get("NO_COLOR"):
        return False
    if env.get("FORCE_COLOR", "0") not in {"", "0"}:
        return True
    return terminal and env.get("TERM") != "dumb"


class Column(NamedTuple):
    """One column of a table for people."""

    title: str
    cell: Callable[[Any], object]
    right: bool = False
    style: Callable[[Any], str] | None = None


def keys(words: str) -> tuple[Callable[[Any], object], ...]:
    """Return for each word of `words` a function that takes that key out of a row."""
    return tuple(partial(_get, word) for word in words.split())


def _get(key: str, row: Mapping[str, object]) -> object:
    return row.get(key)


class Sheet(NamedTuple):
    """One kind of row: as a table for people, and as tab-separated fields for programs."""

    columns: tuple[Column, ...]
    fields: tuple[Callable[[Any], object], ...]

    def lines(self, screen: Screen, rows: Iterable[Any]) -> list[str]:
        """Set rows as standard output wants them."""
        if screen.terminal:
            return table(screen, self.columns, rows)
        return ["\t".join(escape(_blank(field(row))) for field in self.fields) for row in rows]


def _blank(value: object) -> object:
    return "" if value is None else value


def width(text: str) -> int:
    """Return how many terminal cells `text` takes; wide East Asian characters take two."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def table(screen: Screen, columns: Sequence[Column], rows: Iterable[Any]) -> list[str]:
    """Set rows as an aligned table with a header; [] for no rows.

    Columns in which no row has anything to say are left out; the last one is cut at the screen's edge.
    """
    rows = list(rows)
    cells = [[escape(_blank(column.cell(row))) for column in columns] for row in rows]
    shown = [at for at in range(len(columns)) if any(line[at] for line in cells)]
    if not shown:
        return []
    widths = {at: max(width(columns[at].title), *(width(line[at]) for line in cells)) for at in shown}
    last = shown[-1]
    before = sum(widths[at] + len(GAP) for at in shown[:-1])
    widths[last] = min(widths[last], max(LAST_COLUMN_MIN, screen.columns - before))
    lines = [
        GAP.join(screen.paint(_fit(columns[at].title, widths[at], right=columns[at].right), "dim") for at in shown)
    ]
    for row, line in zip(rows, cells, strict=True):
        parts: list[str] = []
        for at in shown:
            style = columns[at].style
            text = _fit(line[at], widths[at], right=columns[at].right)
            parts.append(screen.paint(text, style(row) if style else None))
        lines.append(GAP.join(parts))
    return [line.rstrip() for line in lines]


def _fit(text: str, cells: int, *, right: bool) -> str:
    """Cut or fill `text` to exactly `cells` (one less where a wide character does not fit)."""
    if width(text) > cells:
        while text and width(text) > cells - 1:
            text = text[:-1]
        text += "…"
    space = " " * (cells - width(text))
    return space + text if right else text + space


def size(size_bytes: object) -> str:
    """Write a number of bytes for a person, in powers of 1024 as the configuration does.

    >>> size(1536), size(102400000)
    ('1.5 KiB', '97.7 MiB')
    """
    if not isinstance(size_bytes, int | float):
        return ""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:  # noqa: PLR2004 - the step between the units above
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} PiB"


def span(seconds: float) -> str:
    """Write a duration for a person, in its two largest units.

    >>> span(5400), span(0.25), span(90061)
    ('1h 30m', '0.2s', '1d 1h')
    """
    if seconds < 10:  # noqa: PLR2004 - below ten seconds the tenths matter
        return f"{seconds:.1f}s"
    parts: list[str] = []
    left = int(seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or parts:
            parts.append(f"{count}{unit}")
    return " ".join(part for part in parts[:2] if not part.startswith("0")) or "0s"


def age(at: object) -> str:
    """Write how long ago an ISO time was; "" for none, and the text itself when it is no time."""
    from datetime import datetime

    if not at:
        return ""
    try:
        seconds = (SystemClock().now() - datetime.fromisoformat(str(at))).total_seconds()
    except (ValueError, TypeError):
        return str(at)
    return span(seconds).split(" ")[0] + " ago" if seconds >= 0 else "in " + span(-seconds).split(" ")[0]


def moment(at: object) -> str:
    """Write an ISO time as local date and time to the second; "" for none."""
    from datetime import datetime

    if not at:
        return ""
    try:
        return f"{datetime.fromisoformat(str(at)).astimezone():%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return str(at)


def metric(value: object) -> str:
    """Write a metric's value: four digits, NaN and the infinities by name."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def metrics(values: Mapping[str, object] | None) -> str:
    """Write several metrics in one cell."""
    return " ".join(f"{name}={metric(value)}" for name, value in (values or {}).items())


def short(an_id: object) -> str:
    """Shorten an id for a person, who may type it again: never to digits alone, which would be a step."""
    text = str(an_id or "")
    size = SHORT_ID
    while size < len(text) and text[:size].isdigit():
        size += 1
    return text[:size]


def print_json(body: object, screen: Screen) -> None:
    """Print one JSON document: indented on a terminal, on one line in a pipe."""
    sys.stdout.write(json_text(body, indent=2 if screen.terminal else None) + "\n")


def json_text(body: object, *, indent: int | None = None) -> str:
    """Write JSON that is plain ASCII, so that no name in it can do anything to a terminal."""
    return json.dumps(body, indent=indent)


def print_lines(screen: Screen, lines: Sequence[str]) -> None:
    """Print lines; more than a terminal holds go through a pager, as git does it."""
    text = "".join(line + "\n" for line in lines)
    if screen.terminal and len(lines) >= screen.lines and _paged(text):
        return
    sys.stdout.write(text)


def _paged(text: str) -> bool:
    """Show `text` in $CKPTD_PAGER, $PAGER or less; say False when there is none to be had."""
    import shlex

    command = shlex.split(os.environ.get("CKPTD_PAGER", os.environ.get("PAGER", "less")))
    if not command or command == ["cat"] or os.environ.get("TERM") == "dumb":
        return False
    import subprocess

    try:
        subprocess.run(command, input=text.encode(errors="replace"), env={"LESS": "FRX", **os.environ}, check=False)
    except OSError:
        return False
    return True


def say(text: str) -> None:
    """Tell the person something that is not data."""
    sys.stderr.write(text + "\n")


def prepare_streams() -> None:
    """Let no character that a stream's encoding lacks raise; it is escaped instead."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="backslashreplace")


def write_examples(formatter: click.HelpFormatter, examples: Sequence[tuple[str, str]]) -> None:
    """Write pairs of a command line and its purpose into a help page."""
    if examples:
        with formatter.section("Examples"):
            formatter.write_dl(list(examples), col_max=50)


def complain(error: CkptdError, *, as_json: bool = False) -> None:
    """Print an error on standard error: one line, its hint, and its stable code."""
    if as_json:
        say(json_text({"v": 1, "error": error.to_wire()}))
        return
    # Only the configuration's errors are a list; anywhere else a line break is part of a name.
    lines = error.message.splitlines() if isinstance(error, BadConfig) else [error.message]
    say("\n".join(escape(line) for line in [f"ckpt: {lines[0]} [{error.code}]", *lines[1:]]))
    if error.hint:
        say(f"hint: {escape(error.hint)}")


def complain_usage(error: click.ClickException, *, as_json: bool = False) -> int:
    """Print what is wrong with the command line; return the exit code of a usage error."""
    if as_json:
        body = {"code": "usage", "message": error.format_message(), "hint": ""}
        say(json_text({"v": 1, "error": body}))
        return 2
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()  # the help page itself, on standard error
        return 2
    context = getattr(error, "ctx", None)
    say(f"ckpt: {escape(error.format_message())}")
    say(f"hint: `{context.command_path if context else 'ckpt'} -h` shows how it is used")
    return 2


def complain_bug(error: Exception, *, as_json: bool = False) -> int:
    """Print a defect of ckptd, or a full disk under standard output, as one line."""
    if os.environ.get("CKPTD_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EIO, errno.EDQUOT}:
        complain(CkptdError(f"can't write the output: {error.strerror}"), as_json=as_json)
        # What is left in the buffer can't be written either; Python would try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CkptdError.exit_code
    hint = "run it again with CKPTD_DEBUG=1 and report what it prints, with `ckpt --version`"
    complain(Bug(f"{type(error).__name__}: {error}", hint=hint), as_json=as_json)
    return Bug.exit_code
