"""docs/reference/cli.md and exit-codes.md, made from the verbs and the errors: `python -m ckptd.cli.reference`.

Run in the repository; a test keeps the stored pages equal to what this makes.
"""

from collections.abc import Iterator
from pathlib import Path

import click

from ckptd import errors
from ckptd.cli import INTERRUPTED, PIPE_CLOSED, VERBS, ckpt
from ckptd.cli.options import Family, Verb, global_options

CLI = Path("docs/reference/cli.md")
EXIT_CODES = Path("docs/reference/exit-codes.md")

_HEAD = """\
# The command line

Generated from the verbs by `python -m ckptd.cli.reference`; a test keeps it current.

Data goes to standard output, everything else to standard error. On a terminal, lists are tables with short ids
and ages; in a pipe they are tab-separated lines without a header, with whole ids, ISO times and bytes. `--json` prints
one object with `"v": 1` (the fields of docs/reference/wire-control.md), `--jsonl` one such object per line, `-q` ids
only. With `--json` an error is one JSON object on standard error, too. What comes from other people's
programs (names, notes, paths) is escaped wherever it could steer a terminal; `ckpt path` in a pipe gives the very bytes.

While no daemon runs, `ls`, `show`, `path` and `experiments` read the catalog themselves and say so on standard error;
every other verb exits 5.

A SELECTOR is `latest`, `best`, `best:RULE`, a step (`1000` or `step:1000`), an id or its first six or more digits,
`PROJECT/EXPERIMENT`, or `PROJECT/EXPERIMENT@` and one of the former. Colours: `--no-color` and `NO_COLOR` beat
`FORCE_COLOR`; `TERM=dumb` has none. Long output on a terminal goes through `$CKPTD_PAGER`, `$PAGER` or `less`.

Every verb also takes these, before or after its name:
"""

_MEANINGS = {
    0: "done",
    1: "failed, or a check of `doctor` or a probe did",
    2: "the command line is wrong, or names something that can't be meant",
    3: "no such checkpoint, experiment, root or file",
    4: "a checkpoint is damaged or its files are gone",
    5: "no daemon answers",
    6: "it took longer than `--timeout`",
    7: "refused: held by a pin, a lease or a promise, or not allowed",
    78: "the configuration has errors; all are listed",
    INTERRUPTED: "interrupted from the keyboard",
    PIPE_CLOSED: "whoever read the output closed it; said quietly, as a shell says of any program",
}


def render_cli() -> str:
    """Return docs/reference/cli.md: one heading for each verb, with usage, examples and options."""
    parts = [_HEAD, *_options(global_options()), ""]
    context = click.Context(ckpt, info_name="ckpt", **ckpt.context_settings)
    for family, verbs in VERBS.items():
        parts.append(f"## {family}\n")
        for name in verbs:
            command = ckpt.get_command(context, name)
            assert isinstance(command, Verb | Family)
            parts += _verb(command, click.Context(command, info_name=name, parent=context), "###")
    return "\n".join(parts).rstrip() + "\n"


def _verb(command: Verb | Family, context: click.Context, heading: str) -> Iterator[str]:
    yield f"{heading} {context.command_path}\n"
    yield f"    {command.get_usage(context).removeprefix('Usage: ')}\n"
    yield from (part.strip() + "\n" for part in (command.help or "").split("\n\n"))
    yield "```sh"
    yield from (f"{line}  # {purpose}" for line, purpose in command.examples)
    yield "```\n"
    own = [param for param in command.params if isinstance(param, click.Option) and param.expose_value]
    yield from _options(own)
    if own:
        yield ""
    for name, inner in getattr(command, "commands", {}).items():
        assert isinstance(inner, Verb)
        yield from _verb(inner, click.Context(inner, info_name=name, parent=context), heading + "#")


def _options(options: list[click.Option] | list[click.Parameter]) -> Iterator[str]:
    """Yield a table of options, nothing for none."""
    if options:
        yield "| option | does |"
        yield "|---|---|"
    for option in options:
        assert isinstance(option, click.Option)
        context = click.Context(click.Command("any"))
        record = option.get_help_record(context)
        assert record is not None
        yield f"| `{record[0].replace('|', ', ')}` | {record[1].replace('|', ', ')} |"


def render_exit_codes() -> str:
    """Return docs/reference/exit-codes.md: every exit code, its meaning, and the errors that lead to it."""
    by_exit: dict[int, list[str]] = {}
    for code, cls in errors.BY_CODE.items():
        by_exit.setdefault(cls.exit_code, []).append(f"`{code}`")
    lines = [
        "# Exit codes",
        "",
        "Generated from `ckptd/errors.py` by `python -m ckptd.cli.reference`; a test keeps it current.",
        "",
        "What `ckpt` and `ckptd` exit with. [errors.md](errors.md) says more about each error.",
        "",
        "| code | meaning | errors |",
        "|---|---|---|",
        *(f"| {code} | {meaning} | {', '.join(by_exit.get(code, []))} |" for code, meaning in _MEANINGS.items()),
        "",
        "A defect of ckptd itself exits 1 with the code `internal`, in one line; `CKPTD_DEBUG=1` adds the traceback.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write both pages under the current directory."""
    for path, text in ((CLI, render_cli()), (EXIT_CODES, render_exit_codes())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
