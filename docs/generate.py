"""Write what the pages under docs/ say about code from the code itself: `make docs`, in the repository.

docs/reference/errors.md from ckptd.errors, events.md from ckptd.events, failpoints.md from ckptd.failpoint,
python.md from the docstrings of the client and of its modules of checks, the two diagrams in docs/design/handoff.md from ckptd.model's tables of transitions, and the tables in hooks.md
from ckptd.hooks.
The command line and the settings have generators of their own (ckptd.cli.reference, ckptd.origins);
tests/test_docs.py keeps all pages current.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from types import ModuleType

import ckptd_client
from ckptd import errors, events, failpoint, model
from ckptd.hooks import child, condition, host, hosts, registry, result, runner, tally
from ckptd.hooks.points import POINTS, HookEvent, Point
from ckptd_client import quaternions, rotations
from ckptd_client.cadence import Cadence

ERRORS = Path("docs/reference/errors.md")
EVENTS = Path("docs/reference/events.md")
FAILPOINTS = Path("docs/reference/failpoints.md")
PYTHON = Path("docs/reference/python.md")
HANDOFF = Path("docs/design/handoff.md")
HOOKS = Path("docs/reference/hooks.md")
DRAWN = re.compile(r"(<!-- drawn from (\w+) by docs/generate\.py -->\n).*?(<!-- end -->)", re.DOTALL)

RETURNED = {"Handle", "Cadence", "Quaternions", "Verdict"}  # nobody makes one: save(), every() and check() do
CHECKS = (quaternions, rotations)  # modules that are imported by name, so that the package does not import them
# What the client itself calls on a handle; a script has no use for it.
INSIDE = {("Handle", name) for name in ("apply", "fail", "set_spooled", "wait_acknowledged", "wait_settled")}
CODES = {
    "skipped": "an earlier save was still on its way, and `on_overlap` is `skip`",
    "closed": "the experiment was closed before the save",
    "arena_not_leased": "an arena was to be written that its daemon has taken back",
    "arena_too_small": "a state is larger than the arena that was leased for it",
    "descriptor_too_large": "config, note and meta together do not fit into one arena's descriptor",
}
HOOK_LIMITS = [
    ("importing a hook's module", f"{hosts.START_S_MAX:g} s"),
    ("the first question's wait for what Python hooks say of themselves", f"{runner.DECLARING_S_MAX:g} s"),
    ("webhooks and mails under way at once", f"{runner.LETTERS_MAX}"),
    ("silence of a host after its hook's time is up", f"{hosts.BACKSTOP_S:g} s"),
    ("between two looks at memory and processes", f"{host.LOOK_S:g} s"),
    ("a host's own end after it was hung up on", f"{child.EXIT_S_MAX:g} s"),
    ("hooks", f"{registry.HOOKS_MAX}"),
    ("findings of one run", f"{result.FINDINGS_MAX}"),
    ("a reason, an error, a finding's text", f"{result.TEXT_CHARS_MAX} characters"),
    ("a condition", f"{condition.CHARS_MAX} characters, {condition.NODES_MAX} parts, {condition.DEPTH_MAX} deep"),
    ("the sample behind p50 and p95", f"{tally.SAMPLE_MAX} newest runs"),
]

_ERRORS_HEAD = """\
# Errors

Generated from `ckptd/errors.py` by `docs/generate.py`; a test keeps it current.

Each error has a stable `code`: on the wire, in `--json`, and in brackets behind a message. Its class says who must act.
The exit code is the one `ckpt` ends with ([exit-codes.md](exit-codes.md)); a hint in a reply may say more than the one here.
Python scripts get the exceptions of [python.md](python.md); the `code` of a `Refused` is one of these.
"""
_EVENTS_HEAD = """\
# Events

Generated from `ckptd/events.py` by `docs/generate.py`; a test keeps it current.

Facts, told after the commit that made them true: `ckpt log` shows them, `ckpt log -f` as they happen; the
operation `events` in [wire-control.md](wire-control.md) says how they travel. Every key of `data` may be absent.
"""
_FAILPOINTS_HEAD = """\
# Fail points

Generated from `ckptd/failpoint.py` by `docs/generate.py`; a test keeps it current.

Named steps of everything that promises something, in the order of a checkpoint's way. The crash suites kill the process
at each of them, start it again and check every promise ([architecture](../architecture.md)). `CKPTD_FAIL`
arms points in tests: `CKPTD_FAIL=publish.renamed:2=kill` kills at the second time, `eio` and `enospc` raise, `delay:1` waits a
second. A daemon that has one armed says so at its start and in `ckpt doctor`.
"""
_PYTHON_HEAD = """\
# Python

Generated from the docstrings of `ckptd_client` by `docs/generate.py`; a test keeps it current.

What a training script imports: `import ckptd_client as ckptd`. Python 3.9, standard library only. The guides show it at
work: [from memory](../guide/memory.md), [files](../guide/files.md).
"""


def render_errors() -> str:
    """Return docs/reference/errors.md: one table for each kind of error, which is who must act."""
    parts = [_ERRORS_HEAD]
    for kind in (errors.Weather, errors.Refused, errors.Operator, errors.Bug):
        parts.append(f"## {kind.__name__}\n")
        parts.append(f"{_line(kind)}\n")
        parts.append("| code | exit | meaning | hint |\n|---|---|---|---|")
        parts += [_error(cls) for cls in errors.BY_CODE.values() if issubclass(cls, kind)]
        parts.append("")
    parts.append("## Any other\n")
    parts.append("| code | exit | meaning | hint |\n|---|---|---|---|")
    parts.append(_error(errors.CkptdError))
    return "\n".join(parts) + "\n"


def _error(cls: type[errors.CkptdError]) -> str:
    return f"| `{cls.code}` | {cls.exit_code} | {_line(cls)} | {_cell(cls.default_hint)} |"


def _line(documented: object) -> str:
    """The first sentence of a docstring, which may go over several lines."""
    return _cell(" ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split()))


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def render_events() -> str:
    """Return docs/reference/events.md: every event, what it means, and the keys of its data."""
    rows = [
        f"| `{name}` | {declared.meaning} | {', '.join(f'`{key}`' for key in declared.keys)} |"
        for name, declared in events.EVENTS.items()
    ]
    return "\n".join([_EVENTS_HEAD, "| event | meaning | `data` |", "|---|---|---|", *rows]) + "\n"


def render_failpoints() -> str:
    """Return docs/reference/failpoints.md: every named step, who reaches it, and what is true there."""
    rows = [f"| `{name}` | {process} | {meaning} |" for name, (process, meaning) in failpoint.POINTS.items()]
    return "\n".join([_FAILPOINTS_HEAD, "| point | process | what is true there |", "|---|---|---|", *rows]) + "\n"


def render_python() -> str:
    """Return docs/reference/python.md: every public name of the client with its signature and docstring."""
    plain = [name for name in ckptd_client.__all__ if not name.startswith("_")]
    found = {name: getattr(ckptd_client, name) for name in plain} | {"Cadence": Cadence}
    raised = [name for name, value in found.items() if inspect.isclass(value) and issubclass(value, Exception)]
    parts = [_PYTHON_HEAD]
    for name in [name for name in found if name not in raised]:
        parts += _documented(name, found[name])
        parts += _methods(name, found[name])
    for module in CHECKS:
        parts += _module(module)
    parts.append("## Exceptions\n\nA save raises none of them unless `raise_errors` is set.\n")
    parts += [f"| exception | meaning |\n|---|---|\n{_exceptions(found, raised)}"]
    parts.append("\nThe `code` of a `Refused` is one of [errors.md](errors.md), or the client's own:\n")
    parts.append("| code | meaning |\n|---|---|\n" + "\n".join(f"| `{c}` | {said} |" for c, said in CODES.items()))
    return "\n".join(parts) + "\n"


def _exceptions(found: Mapping[str, object], names: list[str]) -> str:
    return "\n".join(f"| `{name}` | {_line(found[name])} |" for name in names)


def _documented(name: str, value: Callable[..., object], heading: str = "##") -> Iterator[str]:
    """Yield heading, signature and docstring."""
    yield f"{heading} {name}\n"
    signature = "" if name in RETURNED else f"{name}{_signature(value)}\n\n"
    yield f"```text\n{signature}{inspect.getdoc(value)}\n```\n"


def _signature(value: Callable[..., object]) -> str:
    """The names and defaults; types would fill the page and are in the source."""
    given = inspect.signature(value)
    kept = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in given.parameters.values()
        if parameter.name != "self"
    ]
    return str(given.replace(parameters=kept, return_annotation=inspect.Signature.empty))


def _methods(name: str, value: object) -> Iterator[str]:
    if not inspect.isclass(value):
        return
    attributes = [(key, found) for key, found in vars(value).items() if isinstance(found, property)]
    if attributes:
        yield "\n".join(f"- `{key}`: {_line(found)}" for key, found in attributes) + "\n"
    for method, function in vars(value).items():
        if inspect.isfunction(function) and not method.startswith("_") and (name, method) not in INSIDE:
            yield from _documented(method, function, "###")


def _module(module: ModuleType) -> Iterator[str]:
    """Yield a module: how it is imported, its docstring, and each public function and class that it defines."""
    name = module.__name__.rpartition(".")[2]
    yield f"## {name}\n\n`from {module.__package__} import {name}`\n"
    yield f"```text\n{inspect.getdoc(module)}\n```\n"
    for key, value in vars(module).items():
        if not key.startswith("_") and getattr(value, "__module__", "") == module.__name__ and callable(value):
            yield from _documented(key if key in RETURNED else f"{name}.{key}", value, "###")
            if lines := list(_members(value)):
                yield "\n".join(lines) + "\n"


def _members(value: object) -> Iterator[str]:
    """Yield one line for each public property and method of a class."""
    for name, found in vars(value).items():
        if not name.startswith("_") and (inspect.isfunction(found) or isinstance(found, property)):
            signature = "" if isinstance(found, property) else _signature(found)
            yield f"- `{name}{signature}`: {_line(found)}"


def draw(begin: StrEnum, table: Mapping[StrEnum, frozenset[StrEnum]]) -> str:
    """Return a Mermaid diagram of a table of transitions, in the table's own order."""
    order = list(type(begin))
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {begin}"]
    for old in order:
        lines += [f"    {old} --> {new}" for new in sorted(table[old], key=order.index)]
        if not table[old]:
            lines.append(f"    {old} --> [*]")
    return "\n".join([*lines, "```", ""])


def render_handoff(page: str) -> str:
    """Return docs/design/handoff.md with its diagrams drawn anew."""
    drawings = {
        "STATE_TRANSITIONS": draw(model.State.PENDING, model.STATE_TRANSITIONS),  # type: ignore[arg-type]
        "JOB_TRANSITIONS": draw(model.JobState.QUEUED, model.JOB_TRANSITIONS),  # type: ignore[arg-type]
    }
    return DRAWN.sub(lambda found: found[1] + drawings[found[2]] + found[3], page)


def render_hooks(page: str) -> str:
    """Return docs/reference/hooks.md with its tables of points and limits drawn anew."""
    points = list(POINTS.values())
    aliases = [pair for pair in HookEvent.__members__.items() if pair[0] != pair[1].upper().replace(".", "_")]
    drawings = {
        "ASKED": _points([point for point in points if point.may_veto], "| event | what is about to happen | a veto |"),
        "TOLD": _points([point for point in points if not point.may_veto], "| event | what happened |"),
        "ALIASES": "| name | event |\n|---|---|\n" + "".join(f"| `{name}` | `{event}` |\n" for name, event in aliases),
        "LIMITS": "| limit | value |\n|---|---|\n" + "".join(f"| {said} | {value} |\n" for said, value in HOOK_LIMITS),
    }
    return DRAWN.sub(lambda found: found[1] + drawings[found[2]] + found[3], page)


def _points(points: list[Point], head: str) -> str:
    lines = [head[:-1] + "| `data` |", "|---" * head.count("|") + "|"]
    for point in points:
        effect = f" {point.effect} |" if point.may_veto else ""
        keys = ", ".join(f"`{key}`" for key in point.keys)
        lines.append(f"| `{point.event}` | {point.meaning} |{effect} {keys} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write all pages under the current directory."""
    pages = {ERRORS: render_errors(), EVENTS: render_events(), PYTHON: render_python()}
    pages[FAILPOINTS] = render_failpoints()
    pages[HANDOFF] = render_handoff(HANDOFF.read_text(encoding="utf-8"))
    pages[HOOKS] = render_hooks(HOOKS.read_text(encoding="utf-8"))
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
