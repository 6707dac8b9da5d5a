"""A column's value is one of many keys: in statements of a few lengths, not in one of each length.

Every statement is compiled and kept by each connection. A page of 500 ids as so many parameters is one of some 100 KB in
SQLite, and the next page, of 499, would be another: they went on filling the caches of all connections for as long as a
daemon lived. So a short list is filled up with its last key, which changes no answer, and a long one is one parameter.
"""

import json
from collections.abc import Collection
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Dialect, Text, bindparam, func, select
from sqlalchemy.types import TypeDecorator, TypeEngine

T = TypeVar("T")

LENGTHS = (1, 8, 64, 512)  # a longer list stays as it is; whoever takes one splits it into parts of 500
PARAMETERS_MAX = 64  # of a list of keys; a longer one is JSON


class _List(TypeDecorator[Collection[Any]]):
    """Keys as one JSON array, each as its column keeps it."""

    impl = Text
    cache_ok = True

    def __init__(self, kept_as: TypeEngine[Any]) -> None:
        super().__init__()
        self.kept_as = kept_as

    def process_bind_param(self, value: Collection[Any] | None, dialect: Dialect) -> str:
        """Write the array. TypeError: the column keeps its values as something that JSON has no name for."""
        kept = self.kept_as.dialect_impl(dialect).bind_processor(dialect)
        return json.dumps([key if kept is None else kept(key) for key in value or ()])


def padded(keys: Collection[T]) -> list[T]:
    """Return the keys, the last of them again and again up to the next of LENGTHS; an empty list stays empty."""
    filled = list(keys)
    length = next((length for length in LENGTHS if length >= len(filled)), 0)
    return filled + filled[-1:] * (length - len(filled))


def one_of(column: ColumnElement[Any], keys: Collection[Any]) -> ColumnElement[bool]:
    """Say that the column holds one of the keys; nothing is one of none."""
    if len(keys) <= PARAMETERS_MAX:
        return column.in_(padded(keys))
    # SQLite's form. It makes a small index of the list once, and looks rows up by the column's own as it does for an IN.
    array = bindparam(None, keys, type_=_List(column.type))
    return column.in_(select(func.json_each(array).table_valued("value").c.value))
