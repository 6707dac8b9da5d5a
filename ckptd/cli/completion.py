"""`ckpt completion`, and what the shell offers behind the verbs: names and ids that the daemon knows.

A shell that waits is worse than one that offers nothing: after COMPLETE_S there is no offer.
"""

import sys
from typing import TYPE_CHECKING

import click

from ckptd.cli.options import verb
from ckptd.cli.render import escape
from ckptd.clock import SystemClock
from ckptd.errors import CkptdError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMPLETE_S = 0.2
OFFERED_MAX = 50
SHELLS = ("bash", "zsh", "fish")
_WORDS = {"latest": "the newest verified one", "best": "the best by the experiment's rule"}


@verb(
    ("ckpt completion bash > ~/.local/share/bash-completion/completions/ckpt", "for bash"),
    ('ckpt completion zsh > "${fpath[1]}/_ckpt"', "for zsh"),
    ("ckpt completion fish > ~/.config/fish/completions/ckpt.fish", "for fish"),
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of a shell."""
    from click.shell_completion import ShellComplete, get_completion_class

    from ckptd.cli import COMPLETE_VARIABLE, ckpt

    found = get_completion_class(shell)
    assert found is not None
    script = found(ckpt, {}, "ckpt", COMPLETE_VARIABLE)
    # Not script.source(): for bash that starts a bash to ask for its version.
    sys.stdout.write(ShellComplete.source(script))


def complete_scope(ctx: click.Context, _: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Offer projects and PROJECT/NAME."""
    return _offers(ctx, incomplete, _scopes)


def complete_selector(ctx: click.Context, _: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Offer selectors: words, PROJECT/NAME, what may follow its "@", and ids."""
    return _offers(ctx, incomplete, _selectors)


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Ask = Callable[..., list[dict[str, object]]]


def _offers(
    ctx: click.Context, incomplete: str, source: "Callable[[Ask, str], Iterator[tuple[str, str]]]"
) -> "list[CompletionItem]":
    from click.shell_completion import CompletionItem

    from ckptd.cli.daemon_socket import connect

    clock = SystemClock()
    deadline = clock.monotonic_s() + COMPLETE_S
    with ctx.scope(cleanup=False):
        try:
            with connect() as daemon:

                def ask(op: str, **fields: object) -> list[dict[str, object]]:
                    left_s = max(0.0, deadline - clock.monotonic_s())
                    found: list[dict[str, object]] = daemon.request(op, fields, within_s=left_s)[
                        "experiments" if op == "experiments" else "checkpoints"
                    ]
                    return found

                offers = list(source(ask, incomplete))
        except (CkptdError, KeyError):
            # No daemon, a slow one, or one of another age: the person types on without offers.
            return []
    # A name that is not printable could break the shell's line, and nobody would type it.
    return [
        CompletionItem(value, help=escape(help_))
        for value, help_ in dict(offers).items()
        if value.startswith(incomplete) and value.isprintable()
    ][:OFFERED_MAX]


def _scopes(ask: "Ask", incomplete: str) -> "Iterator[tuple[str, str]]":
    project = incomplete.partition("/")[0] if "/" in incomplete else None
    for row in ask("experiments", project=project, limit=OFFERED_MAX):
        yield (f"{row['project']}/{row['name']}", str(row["status"])) if project else (str(row["project"]), "project")
        if not project:
            yield f"{row['project']}/{row['name']}", str(row["status"])


def _selectors(ask: "Ask", incomplete: str) -> "Iterator[tuple[str, str]]":
    scope, at, _ = incomplete.partition("@")
    if at:
        project, _, name = scope.partition("/")
        rows = ask("list", project=project, name=name, limit=OFFERED_MAX)
        for word, meaning in _WORDS.items():
            yield f"{scope}@{word}", meaning
        for row in rows:
            metrics = row.get("metrics")
            for metric in metrics if isinstance(metrics, dict) else ():
                yield f"{scope}@best:{metric}", "the best by this metric"
        for row in rows:
            yield f"{scope}@step:{row['step']}", str(row["level"])
        return
    yield from _WORDS.items()
    if incomplete and all(digit in "0123456789abcdef" for digit in incomplete):
        for row in ask("list", limit=OFFERED_MAX):
            yield str(row["checkpoint"]), f"{row['project']}/{row['name']} step {row['step']}"
    yield from _scopes(ask, incomplete if "/" in incomplete else "")
