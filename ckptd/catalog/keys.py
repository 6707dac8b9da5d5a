"""A column's value is one of many keys: in statements of four lengths, not in one of each length.

Every statement is compiled and kept by each connection, 128 of them. A page of 500 ids is one of some 100 KB in SQLite,
and the next page, of 499, would be another: they went on filling the caches of all connections for as long as a daemon
lived. So a list is filled up with its last key, which changes no answer.
"""

from collections.abc import Collection
from typing import Any, TypeVar

from sqlalchemy import ColumnElement

T = TypeVar("T")

LENGTHS = (1, 8, 64, 512)  # a longer list stays as it is; whoever takes one splits it into parts of 500


def padded(keys: Collection[T]) -> list[T]:
    """Return the keys, the last of them again and again up to the next of LENGTHS; an empty list stays empty."""
    filled = list(keys)
    length = next((length for length in LENGTHS if length >= len(filled)), 0)
    return filled + filled[-1:] * (length - len(filled))


def one_of(column: ColumnElement[Any], keys: Collection[Any]) -> ColumnElement[bool]:
    """Say that the column holds one of the keys; nothing is one of none."""
    return column.in_(padded(keys))
