"""What a hook must be to be run at all: every reason to refuse one, before anything of it is started."""

import difflib
import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit

from ckptd.errors import BadConfig
from ckptd.hooks import condition
from ckptd.hooks.points import HookEvent, may_veto
from ckptd.hooks.spec import ASKABLE, NAME_CHARS_MAX, Kind, Spec

TIMEOUT_S_MAX = 24 * 3600.0
OPTIONS = {
    Kind.WEBHOOK: {"secret_file", "retries_max", "retry_s_max", "headers", "ca_file"},
    Kind.MAIL: {
        "sender",
        "to",
        "subject",
        "starttls",
        "user",
        "password_file",
        "retries_max",
        "retry_s_max",
        "ca_file",
    },
}
RETRIES_MAX = 20
_BY_NAME = {str(event): event for event in HookEvent} | dict(HookEvent.__members__)  # either is fine
_OURS = "ckptd.hooks.builtin."
_PYTHON = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:(@.+|[^\W\d]\w*(\.[^\W\d]\w*)*))?")
_NAME = re.compile(r"[^\x00-\x20\x7f]+( [^\x00-\x20\x7f]+)*")


def events(names: Iterable[str], hook: str) -> tuple[HookEvent, ...]:
    """Return the points of these names. BadConfig names the first that there is not, and what was perhaps meant."""
    found: list[HookEvent] = []
    for name in names:
        event = _BY_NAME.get(name)
        if event is None:
            near = difflib.get_close_matches(name, [str(event) for event in HookEvent], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; see reference/hooks.md"
            raise BadConfig(f"hook {hook!r}: there is no event {name!r}{hint}")
        if event not in found:
            found.append(event)
    return tuple(found)


def check(spec: Spec) -> None:
    """BadConfig when a hook can't be."""
    where = f"hook {spec.name!r}"
    if not _NAME.fullmatch(spec.name) or len(spec.name) > NAME_CHARS_MAX:
        raise BadConfig(f"{where}: a name is 1 to {NAME_CHARS_MAX} characters without control characters")
    if not 0 < spec.timeout_s <= TIMEOUT_S_MAX:
        raise BadConfig(f"{where}: timeout_s must be more than 0 and at most {TIMEOUT_S_MAX:.0f}")
    if not spec.events and spec.kind is not Kind.PYTHON:
        raise BadConfig(f"{where}: events must name at least one")
    asked = [str(event) for event in spec.events if may_veto(event)]
    if asked and spec.kind not in ASKABLE:
        raise BadConfig(f"{where}: a {spec.kind} tells and is never asked; it can't run at {asked[0]}")
    if asked and spec.in_background:
        raise BadConfig(f"{where}: {asked[0]} waits for its hooks, and nothing waits for one in the background")
    if spec.condition:
        try:
            condition.parse(spec.condition)
        except ValueError as error:
            raise BadConfig(f"{where}: when: {error}") from error
    _check_target(spec, where)
    _check_options(spec, where)


def is_here(host: str) -> bool:
    """Whether a host's name or address is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_target(spec: Spec, where: str) -> None:
    if spec.kind is Kind.INPROCESS and not spec.target.startswith(_OURS):
        raise BadConfig(f"{where}: only what ckptd brings runs in the daemon, not {spec.target!r}")
    if spec.kind in {Kind.PYTHON, Kind.INPROCESS}:
        if not _PYTHON.fullmatch(spec.target):
            raise BadConfig(f'{where}: {spec.target!r} is not "module:object" or "module"')
    elif spec.kind is Kind.EXEC:
        if not spec.target.startswith("/") or "\0" in spec.target + "".join(spec.arguments):
            raise BadConfig(f"{where}: {spec.target!r} is no absolute path of a program; no shell looks for it")
    elif spec.kind is Kind.WEBHOOK:
        _check_url(spec.target, where)
    else:
        _check_server(spec.target, where)


def _split(url: str, where: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # looked at only when it is asked for
    except ValueError as error:
        raise BadConfig(f"{where}: {url!r} is no URL: {error}") from error
    if not parts.hostname or any(char <= " " or char == "\x7f" for char in url):
        raise BadConfig(f"{where}: {url!r} is no URL with a host")
    if parts.username or parts.password:
        raise BadConfig(f"{where}: a URL is shown and logged; a secret belongs into a file")
    return parts


def _check_url(url: str, where: str) -> None:
    parts = _split(url, where)
    if parts.scheme == "https" or (parts.scheme == "http" and is_here(parts.hostname or "")):
        return
    raise BadConfig(f"{where}: a webhook is https://, or http:// to this machine alone, not {url!r}")


def _check_server(url: str, where: str) -> None:
    if _split(url, where).scheme not in {"smtp", "smtps"}:
        raise BadConfig(f'{where}: a mail server is written "smtp://host:port" or "smtps://host:port", not {url!r}')


def _check_options(spec: Spec, where: str) -> None:
    known = OPTIONS.get(spec.kind)
    unknown = sorted(spec.options.keys() - known) if known is not None else []
    if unknown:
        raise BadConfig(
            f"{where}: options: a {spec.kind} knows no {unknown[0]!r}; it knows {', '.join(sorted(known or ()))}"
        )
    if spec.kind is Kind.EXEC and spec.options:
        raise BadConfig(f"{where}: a program takes arguments and environment, no options")
    if spec.kind is Kind.MAIL and not (spec.options.get("sender") and spec.options.get("to")):
        raise BadConfig(f"{where}: options must have sender and to")
    for key in ("secret_file", "password_file", "ca_file"):
        path = spec.options.get(key)
        if path is not None and not (isinstance(path, str) and path.startswith("/")):
            raise BadConfig(f"{where}: options.{key} must be an absolute path")
    retries = spec.options.get("retries_max", 0)
    if not isinstance(retries, int) or isinstance(retries, bool) or not 0 <= retries <= RETRIES_MAX:
        raise BadConfig(f"{where}: options.retries_max must be a whole number from 0 to {RETRIES_MAX}")
    seconds = spec.options.get("retry_s_max", 0.0)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds <= TIMEOUT_S_MAX:
        raise BadConfig(f"{where}: options.retry_s_max must be a number of seconds from 0 to {TIMEOUT_S_MAX:.0f}")
    if not isinstance(spec.options.get("headers", {}), dict):
        raise BadConfig(f"{where}: options.headers must be a table")
