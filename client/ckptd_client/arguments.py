"""Checks of what a caller passes: each error names the field, its value and the rule. No I/O."""

import os
import re
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

from ckptd_client.capture import plain_of
from ckptd_client.metrics import checked

_ID = re.compile(r"[0-9a-f]{32}")

NAME_CHARACTERS_MAX = 128
NAME_BYTES_MAX = 240  # leaves room for the suffixes of temporary names within a file name's 255
TAGS_MAX = 256
NOTE_CHARACTERS_MAX = 65536
STEP_MAX = 1 << 62
PATH_BYTES_MAX = 4095
RESUME = ("allow", "never", "must")
ON_OVERLAP = ("wait", "spool", "skip", "replace")
FORMATS = ("safetensors", "torch")
MODES = ("online", "offline", "disabled")
STATUSES = ("completed", "failed")


class SaveFields(NamedTuple):
    """What one save says of itself, checked."""

    step: Optional[int]
    epoch: Optional[float]
    metrics: Dict[str, float]
    note: str
    meta: Dict[str, Any]
    update_best: bool
    format: str
    on_overlap: str


def bad(field: str, value: Any, rule: str) -> ValueError:
    """Make the error for one bad argument."""
    shown = repr(value)
    return ValueError(f"{field}={shown[:200]} {rule}")


def name(field: str, value: Any) -> str:
    """Check the name of a project or experiment: it becomes a directory's name."""
    if not isinstance(value, str) or not 1 <= len(value) <= NAME_CHARACTERS_MAX:
        raise bad(field, value, f"must be text of 1 to {NAME_CHARACTERS_MAX} characters")
    if value.startswith("."):
        raise bad(field, value, "must not begin with '.'")
    if "/" in value or not value.isprintable() or len(value.encode()) > NAME_BYTES_MAX:
        raise bad(field, value, f"must hold no '/' and only printable characters, {NAME_BYTES_MAX} bytes at most")
    return value


def tags(field: str, value: Any) -> List[str]:
    """Check tags; order is kept, repeats are dropped."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise bad(field, value, "must be a list of texts")
    found = list(dict.fromkeys(value))
    if len(found) > TAGS_MAX:
        raise bad(field, value, f"must hold at most {TAGS_MAX} tags")
    for tag in found:
        if not isinstance(tag, str) or not 1 <= len(tag) <= NAME_CHARACTERS_MAX:
            raise bad(field, tag, f"must hold texts of 1 to {NAME_CHARACTERS_MAX} characters")
    return found


def choice(field: str, value: Any, allowed: Tuple[str, ...]) -> str:
    """Check one of several words."""
    if not isinstance(value, str) or value not in allowed:
        raise bad(field, value, f"must be one of {', '.join(allowed)}")
    return value


def seconds(field: str, value: Any) -> float:
    """Check a limit in seconds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise bad(field, value, "must be a number of seconds, 0 or more")
    return float(value)


def path(field: str, value: Any) -> str:
    """Check a path and make it absolute; it is not looked at."""
    if not isinstance(value, (str, os.PathLike)):
        raise bad(field, value, "must be a path")
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        raise bad(field, value, "must be a path as text, not empty, without NUL")
    text = "/" + os.path.abspath(os.path.expanduser(text)).lstrip("/")
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise bad(field, value, "must be a path that is valid UTF-8") from error
    if size_bytes > PATH_BYTES_MAX:
        raise bad(field, value, f"must be at most {PATH_BYTES_MAX} bytes long")
    return text


def step(field: str, value: Any) -> Optional[int]:
    """Check a step: a whole number from 0; NumPy's and torch's integers are welcome."""
    if value is None:
        return None
    whole = _whole(value)
    if whole is None or not 0 <= whole <= STEP_MAX:
        raise bad(field, value, "must be a whole number, 0 or more")
    return whole


def epoch(field: str, value: Any) -> Optional[float]:
    """Check an epoch: a number from 0, whole or not."""
    if value is None:
        return None
    if not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = -1.0
        if 0 <= number < float("inf"):
            return number
    raise bad(field, value, "must be a finite number, 0 or more")


def note(field: str, value: Any) -> str:
    """Check a note."""
    if not isinstance(value, str) or len(value) > NOTE_CHARACTERS_MAX:
        raise bad(field, value, f"must be text of at most {NOTE_CHARACTERS_MAX} characters")
    return value


def meta(field: str, value: Any) -> Dict[str, Any]:
    """Check a checkpoint's own metadata and make it JSON values."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad(field, value, "must be a dict")
    return dict(plain_of(value, mask=False))


def flag(field: str, value: Any) -> bool:
    """Check a yes or no."""
    if not isinstance(value, bool):
        raise bad(field, value, "must be True or False")
    return value


def save_fields(given: Dict[str, Any]) -> SaveFields:
    """Check all arguments of a save or submit; the first wrong one is named."""
    return SaveFields(
        step=step("step", given.get("step")),
        epoch=epoch("epoch", given.get("epoch")),
        metrics=checked(given.get("metrics")),
        note=note("note", given.get("note", "")),
        meta=meta("meta", given.get("meta")),
        update_best=flag("update_best", given.get("update_best", True)),
        format=choice("format", given.get("format", "safetensors"), FORMATS),
        on_overlap=choice("on_overlap", given.get("on_overlap", "wait"), ON_OVERLAP),
    )


def known_fields(given: Dict[str, Any]) -> Dict[str, Any]:
    """Refuse keyword arguments that mean nothing."""
    for field, value in given.items():
        if field not in ("step", "epoch", "metrics", "note", "meta", "update_best"):
            raise bad(field, value, "is unknown; there are step, epoch, metrics, note, meta and update_best")
    return given


def mode() -> str:
    """Return what CKPTD_MODE says: "online", "offline" or "disabled"."""
    return choice("CKPTD_MODE", os.environ.get("CKPTD_MODE") or MODES[0], MODES)


def checkpoint_id(field: str, value: Any) -> str:
    """Return the id of a handle, or an id as it is."""
    found = getattr(value, "id", value)
    if not isinstance(found, str) or _ID.fullmatch(found) is None:
        raise bad(field, value, "must be a handle of save() or an id of 32 hex digits")
    return found


def selector(value: Any) -> str:
    """Check a selector: text, or a step as a whole number."""
    whole = None if isinstance(value, str) else _whole(value)
    if whole is not None and whole >= 0:
        return f"step:{whole}"
    if not isinstance(value, str) or not 1 <= len(value) <= 4 * NAME_CHARACTERS_MAX:
        raise bad("selector", value, 'must be "latest", "best", "best:METRIC", a step or an id')
    return value


def _whole(value: Any) -> Optional[int]:
    if isinstance(value, bool):
        return None
    index = getattr(value, "__index__", None)
    if index is None:
        return None
    try:
        return int(index())
    except (TypeError, ValueError, RuntimeError):  # an array of several numbers has __index__ too
        return None
