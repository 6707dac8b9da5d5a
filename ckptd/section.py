"""A table of the configuration file, and how the values in it may be written: sizes "200G", durations "7d12h"."""

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_SIZE = re.compile(r"(?i)\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(?:i?b)?\s*")
_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_SPAN = re.compile(r"(?i)(?:\s*\d+(?:\.\d+)?\s*(?:ms|[smhdw]))+\s*")
_SPAN_PART = re.compile(r"(?i)(\d+(?:\.\d+)?)\s*(ms|[smhdw])")
_SPAN_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_size(value: object) -> object:
    """Turn "64M" into bytes (powers of 1024); anything but text passes through.

    >>> parse_size("1.5G")
    1610612736
    """
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value)
    if found is None:
        message = f'{value!r} is no size; write for instance "512M" or "200G"'
        raise ValueError(message)
    return int(float(found[1]) * _SIZE_UNITS[found[2].lower()])


def parse_span(value: object) -> object:
    """Turn "7d12h" into seconds; anything but text passes through.

    >>> parse_span("1h30m")
    5400.0
    """
    if not isinstance(value, str):
        return value
    if _SPAN.fullmatch(value) is None:
        message = f'{value!r} is no duration; write for instance "30s", "24h" or "7d12h"'
        raise ValueError(message)
    return sum(float(n) * _SPAN_UNITS[unit.lower()] for n, unit in _SPAN_PART.findall(value))


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
Span = Annotated[float, BeforeValidator(parse_span), Field(ge=0)]
PositiveSpan = Annotated[float, BeforeValidator(parse_span), Field(gt=0)]


class Section(BaseModel):
    """A table of the configuration file: frozen, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def changed_settings(old: BaseModel, new: BaseModel, head: str = "") -> list[str]:
    """Name the settings that differ, "section.key" for those in a section."""
    found = []
    for name in type(new).model_fields:
        one, other = getattr(old, name), getattr(new, name)
        if isinstance(one, BaseModel) and isinstance(other, BaseModel):
            found += changed_settings(one, other, f"{head}{name}.")
        elif one != other:
            found.append(head + name)
    return found
