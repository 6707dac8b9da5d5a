"""Column types that keep Python values whole on SQLite, PostgreSQL and MySQL alike."""

import math
import os
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, Dialect, Integer, LargeBinary, Text
from sqlalchemy import types as sql
from sqlalchemy.types import TypeDecorator, TypeEngine

from ckptd_client import wire

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_RAW = "//bytes/"  # no normalised path starts with two slashes
_SIGN = 1 << 63
_DIGEST_BYTES = 8

# SQLite gives only an INTEGER primary key its rowid, and with it a sequence.
RowNumber = BigInteger().with_variant(Integer(), "sqlite")
JSON = sql.JSON(none_as_null=True)  # None is NULL, not the word null

_SPECIAL_VALUES = (None, math.nan, math.inf, -math.inf)


def split_float(value: float) -> tuple[float | None, int]:
    """Turn a float into the pair (value, special) that every database keeps; SQLite stores a bare NaN as NULL.

    >>> split_float(math.inf)
    (None, 2)
    """
    if math.isfinite(value):
        return value, 0
    return None, 1 if math.isnan(value) else 2 if value > 0 else 3


def join_float(value: float | None, special: int) -> float:
    """Undo `split_float`."""
    found = _SPECIAL_VALUES[special] if special else value
    return math.nan if found is None else float(found)


class Utc(TypeDecorator[datetime]):
    """Aware UTC times as microseconds since 1970: exact, ordered, the same in every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Refuse naive times: they would silently mean the machine's zone."""
        del dialect
        return None if value is None else (value - EPOCH) // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        """Return an aware UTC time."""
        del dialect
        return None if value is None else EPOCH + timedelta(microseconds=value)


class Unsigned64(TypeDecorator[int]):
    """Device and inode numbers: some file systems use the 64th bit, signed columns keep it as a minus."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        """Fold into the signed range."""
        del dialect
        return value if value is None or value < _SIGN else value - 2 * _SIGN

    def process_result_value(self, value: int | None, dialect: Dialect) -> int | None:
        """Unfold."""
        del dialect
        return value if value is None or value >= 0 else value + 2 * _SIGN


class PathText(TypeDecorator[str]):
    """Paths byte for byte: one that is not UTF-8 is kept as hex behind a mark no real path has."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Replace what has no UTF-8 form."""
        del dialect
        if value is None or not any("\ud800" <= char <= "\udfff" for char in value):
            return value
        return _RAW + os.fsencode(value).hex()

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        """Undo."""
        del dialect
        if value is None or not value.startswith(_RAW):
            return value
        return os.fsdecode(bytes.fromhex(value.removeprefix(_RAW)))


class Numbers(TypeDecorator[dict[str, float]]):
    """Named floats as JSON that is JSON: NaN and the infinities are written as their names."""

    impl = sql.JSON
    cache_ok = True

    def process_bind_param(self, value: dict[str, float] | None, dialect: Dialect) -> Any:
        """Name what JSON can't say."""
        del dialect
        return None if value is None else {name: wire.number(number) for name, number in value.items()}

    def process_result_value(self, value: Any, dialect: Dialect) -> dict[str, float]:
        """Undo; NULL is no numbers."""
        del dialect
        return {name: wire.from_number(number) for name, number in (value or {}).items()}


class Digests64(TypeDecorator[tuple[str, ...]]):
    """The xxh3-64 of each MiB, packed to 8 bytes instead of 16 digits (a 20 GB file has 20,000)."""

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: Dialect) -> bytes:
        """Pack."""
        del dialect
        return bytes.fromhex("".join(value or ()))

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> tuple[str, ...]:
        """Unpack."""
        del dialect
        packed = bytes(value or b"")
        return tuple(packed[at : at + _DIGEST_BYTES].hex() for at in range(0, len(packed), _DIGEST_BYTES))
