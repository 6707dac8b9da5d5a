"""config: what is in force and who said so, and whether a file would be taken."""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptd.cli import render
from ckptd.cli.options import Family, Output, Verb, output
from ckptd.errors import BadConfig

if TYPE_CHECKING:
    from ckptd.origins import Loaded

_PASSWORD = re.compile(r"(://[^:/@]*:)[^@]*@")
_PARAMETER = re.compile(r"(?i)([?&][^=&]*(?:token|secret|passw|key|credential|cert)[^=&]*=)[^&]*")


@click.group(
    cls=Family,
    examples=(
        ("ckpt config show --origin", "every setting, and the file and line that set it"),
        ("ckpt config check new.toml", "every error in it; exit 78"),
    ),
)
def config() -> None:
    """Show the configuration and where it comes from, or check it."""


@config.command(
    "show",
    cls=Verb,
    examples=(
        ("ckpt config show --origin | grep retention", "who set the retention rules"),
        ("ckpt config show --json | jq .settings.arenas", "for a program"),
    ),
)
@click.option("--origin", is_flag=True, help="Say behind each setting where it comes from.")
@click.option("--config", "file", metavar="FILE", help="Read this file instead of $CKPTD_CONFIG and the usual ones.")
@output()
def show(file: str | None, out: Output, *, origin: bool) -> None:
    """Print every setting as the daemon would read it now, as TOML; passwords are left out.

    A running daemon may have read an older state of the files: `ckpt reload`.
    """
    loaded = load(file)
    settings = loaded.settings.model_dump(mode="json")
    url = _PASSWORD.sub(r"\1***@", settings["catalog"]["url"])
    settings["catalog"]["url"] = _PARAMETER.sub(r"\1***", url)
    settings["web"] |= {"socket": str(loaded.settings.web_socket), "token": "***" if settings["web"]["token"] else ""}
    settings["cache"]["directory"] = str(loaded.settings.cache_dir)
    body = {"settings": settings, "origins": loaded.origins, "files": [str(path) for path in loaded.files]}
    if not out.json(body):
        lines = list(setting_lines(settings, loaded.origins if origin else {}, out.screen))
        render.print_lines(out.screen, lines)


@config.command(
    "check",
    cls=Verb,
    examples=(
        ("ckpt config check", "the files that the daemon would read"),
        ("ckpt config check new.toml && sudo cp new.toml /etc/ckptd/config.toml", "before it is put in place"),
    ),
)
@click.argument("file", required=False, type=click.Path())
@output()
def check(file: str | None, out: Output) -> int:
    """Check the configuration; every error of every file at once.

    Exit code 78 when there is one.
    """
    try:
        loaded = load(file)
    except BadConfig as error:
        if out.json({"valid": False, "errors": error.details.get("errors", [error.to_wire()]), "problems": []}):
            return error.exit_code
        raise
    problems, files = list(loaded.problems), [str(path) for path in loaded.files]
    if not out.json({"valid": True, "errors": [], "problems": problems, "files": files}):
        for problem in problems:
            render.say(f"odd: {render.escape(problem)}")
        if not files:
            from ckptd.origins.files import own

            render.say(f"no configuration file is there; yours would be {render.escape(str(own(os.environ)))}")
        sys.stdout.write(f"valid: {render.escape(', '.join(files) or 'defaults only')}\n")
    return 0


def load(file: str | None = None) -> "Loaded":
    """Read the configuration as the daemon would: from `file`, else $CKPTD_CONFIG, else the usual files. BadConfig."""
    from ckptd import origins

    return origins.load(None if file is None else Path(file))


def setting_lines(settings: Mapping[str, Any], origins: Mapping[str, str], screen: render.Screen) -> Iterator[str]:
    """Yield every setting as a line of TOML with a dotted key; what has no value is a comment."""
    for key, value in _leaves(settings):
        text = toml(value)
        line = render.escape(f"{key} = {text}" if text else f"# {key} =")
        said = f"  # {origins[key]}" if key in origins else ""
        yield line + screen.paint(render.escape(said), "dim")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def toml(value: object) -> str:
    """Write a value as TOML; "" for None, which TOML can't say.

    >>> toml([{"metric": "loss", "k": 1}])
    '[{metric = "loss", k = 1}]'
    """
    if value is None:
        return ""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(inner)}" for name, inner in value.items() if inner is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(inner) for inner in value) + "]"
    return json.dumps(value)
