"""Options that many verbs share, and the class of a verb: examples first, global options everywhere."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import click

from ckptd.cli import render
from ckptd.errors import BadRequest

F = TypeVar("F", bound=Callable[..., Any])

_SPAN_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw]?)", re.IGNORECASE)
_SPAN_UNITS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


@dataclass(slots=True)
class Globals:
    """What was asked for outside of any one verb. Filled while the command line is parsed.

    socket      a daemon's socket that was named with --socket
    timeout_s   --timeout: how long one request, or a whole `wait`, may take
    """

    socket: str | None = None
    timeout_s: float | None = None
    no_color: bool = False
    as_json: bool = False

    def or_timeout_s(self, default_s: float) -> float:
        """Return --timeout where it was given, else the verb's own default."""
        return default_s if self.timeout_s is None else self.timeout_s


def asked() -> Globals:
    """Return the global options of the running command line."""
    found = click.get_current_context().find_root().obj
    assert isinstance(found, Globals)
    return found


def span_s(text: str) -> float:
    """Turn "90", "30s" or "1h30m" into seconds; ValueError for anything else.

    >>> span_s("1h30m")
    5400.0
    """
    compact = text.replace(" ", "")
    parts = _SPAN_PART.findall(compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        message = f"{text!r} is no duration; write for instance 30s, 24h or 7d12h"
        raise ValueError(message)
    if len(parts) > 1 and any(not unit for _, unit in parts):
        message = f"{text!r} has a number without a unit"
        raise ValueError(message)
    return sum(float(number) * _SPAN_UNITS[unit.lower()] for number, unit in parts)


class Span(click.ParamType[float]):
    """A duration on the command line."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        try:
            return span_s(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _remember(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def keep(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        found = ctx.find_root().obj
        if value is not None and value is not False and isinstance(found, Globals):
            setattr(found, name, value)

    return keep


def global_options() -> list[click.Parameter]:
    """Return the options that stand before or after the verb, as people happen to type them."""
    return [
        click.Option(
            ["--socket"],
            metavar="PATH",
            expose_value=False,
            callback=_remember("socket"),
            help="The daemon's socket, instead of $CKPTD_SOCKET, the user's and the system's.",
        ),
        click.Option(
            ["--timeout"],
            type=Span(),
            metavar="SPAN",
            expose_value=False,
            callback=_remember("timeout_s"),
            help="How long to wait for the daemon, such as 5s or 2m.",
        ),
        click.Option(
            ["--no-color"],
            is_flag=True,
            expose_value=False,
            callback=_remember("no_color"),
            help="No colours; NO_COLOR=1 does the same.",
        ),
    ]


class _Helping:
    """What a verb and a group of verbs have in common: their help."""

    examples: tuple[tuple[str, str], ...]

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the usage, examples, then what it does and the options."""
        self.format_usage(ctx, formatter)  # type: ignore[attr-defined]
        render.write_examples(formatter, self.examples)
        self.format_help_text(ctx, formatter)  # type: ignore[attr-defined]
        self.format_options(ctx, formatter)  # type: ignore[attr-defined]


class Verb(_Helping, click.Command):
    """One verb. Takes the global options too, so that they may follow it."""

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **settings: Any) -> None:
        """Add the global options after the verb's own."""
        super().__init__(*args, **settings)
        self.examples = tuple(examples)
        self.params.extend(global_options())


class Family(_Helping, click.Group):
    """Verbs under a noun: `config show`, `retention plan`."""

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **settings: Any) -> None:
        """Take the global options between noun and verb as well."""
        super().__init__(*args, **settings)
        self.examples = tuple(examples)
        self.params.extend(global_options())

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; a wrong one is answered with those that exist."""
        if not ctx.resilient_parsing and not args[0].startswith("-") and args[0] not in self.commands:
            ctx.fail(f"no verb {args[0]!r} here; there is {', '.join(self.commands)}.")
        return super().resolve_command(ctx, args)


def verb(*examples: tuple[str, str], name: str | None = None) -> Callable[[Callable[..., Any]], Verb]:
    """Make a function a verb; `examples` are pairs of a command line and what it is for."""
    return click.command(name, cls=Verb, examples=examples)


@dataclass(frozen=True, slots=True)
class Output:
    """How one run of a verb speaks: `form` is "human", "json", "jsonl" or "ids"."""

    form: str
    screen: render.Screen = field(default_factory=lambda: render.Screen.detect(no_color=asked().no_color))

    def json(self, body: dict[str, Any]) -> bool:
        """Print `body` as the one object of --json and say True; say False for other forms."""
        if self.form != "json":
            return False
        render.print_json({"v": 1, **body}, self.screen)
        return True


def output(*, lines: bool = False, ids: bool = False) -> Callable[[F], F]:
    """Give a verb --json (with `lines` also --jsonl, with `ids` also -q) and hand it an Output as `out`."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, **given: Any) -> Any:
            flags = {form: given.pop(f"as_{form}", False) for form in ("json", "jsonl", "ids")}
            chosen = [form for form, is_set in flags.items() if is_set]
            if len(chosen) > 1:
                message = "--json, --jsonl and -q exclude one another"
                raise BadRequest(message)
            asked().as_json = chosen in (["json"], ["jsonl"])
            return function(*args, out=Output(chosen[0] if chosen else "human"), **given)

        wrapped: Any = run
        if ids:
            wrapped = click.option("-q", "--quiet", "as_ids", is_flag=True, help="Print ids only.")(wrapped)
        if lines:
            wrapped = click.option("--jsonl", "as_jsonl", is_flag=True, help="Print one JSON object per line.")(wrapped)
        return cast("F", click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(wrapped))

    return decorate


def selecting(function: F) -> F:
    """Give a verb SELECTOR and the options that say among whose checkpoints it is meant.

    The function takes `where`: {"selector", "project", "name"} as the daemon wants them.
    """
    from ckptd.cli.completion import complete_selector

    @functools.wraps(function)
    def run(selector: str, project: str | None, experiment: str | None, **given: Any) -> Any:
        return function(where={"selector": as_selector(selector), "project": project, "name": experiment}, **given)

    wrapped: Any = run
    wrapped = click.option("-e", "--experiment", metavar="NAME", help="Look in this experiment.")(wrapped)
    wrapped = click.option("-p", "--project", metavar="NAME", help="Look in this project.")(wrapped)
    return cast("F", click.argument("selector", shell_complete=complete_selector)(wrapped))


def as_selector(text: str) -> str:
    """Make a path among selectors absolute; the daemon's working directory is not ours."""
    import os

    return os.path.abspath(os.path.expanduser(text)) if is_path(text) else text


def is_path(text: str) -> bool:
    """Say whether a selector is meant as a path: PROJECT/NAME is not, ./PROJECT/NAME is."""
    return text in {".", ".."} or text.startswith(("/", "./", "../", "~"))
