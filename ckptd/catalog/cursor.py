"""One visit to the database's thread for each statement.

SQLAlchemy's cursor over aiosqlite makes four: open a cursor, execute, fetch, close. Each is a future, two
wake-ups and a hand-over of the interpreter's lock, and together they cost more than SQLite does. This one
executes, takes every row and closes in one visit. Both libraries are at work as before: their pool, their
types, their errors, their thread. What it touches of theirs that they don't promise (`_cursor_cls`,
`_execute_mutex`, `_execute`, `_conn`) is held by tests/unit/catalog/test_cursor.py.
docs/decisions/0011-one-visit-per-statement.md has the measurement.
"""

import sqlite3
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import aiosqlite
from sqlalchemy.dialects.sqlite.aiosqlite import (
    AsyncAdapt_aiosqlite_connection,
    AsyncAdapt_aiosqlite_cursor,
    AsyncAdapt_aiosqlite_dbapi,
)
from sqlalchemy.util import EMPTY_DICT
from sqlalchemy.util.concurrency import await_


class _Done(NamedTuple):
    """What a statement did."""

    rows: Sequence[Any] = ()
    description: Any = None
    rowcount: int = -1
    lastrowid: int | None = None


def _whole(driver: Any, sql: str, parameters: Any, *, many: bool, views: bool) -> _Done:
    """Run in the database's thread. sqlite3.Error; ValueError when the connection was closed."""
    cursor: sqlite3.Cursor = driver._conn.cursor()
    try:
        if views and not driver._conn.in_transaction:
            cursor.execute("BEGIN")
        if many:
            cursor.executemany(sql, parameters)
        elif parameters is None:
            cursor.execute(sql)
        else:
            cursor.execute(sql, parameters)
        rows = cursor.fetchall() if cursor.description else ()
        return _Done(rows, cursor.description, cursor.rowcount, cursor.lastrowid)
    finally:
        cursor.close()


class Cursor(AsyncAdapt_aiosqlite_cursor):
    """Rows of the last statement. Nothing of it is left in the database when `execute` has returned."""

    __slots__ = ("_done", "_views")

    def __init__(self, adapt_connection: Any) -> None:
        """Make none: each statement has one of its own."""
        self._adapt_connection = adapt_connection
        self._connection = adapt_connection._connection
        self._soft_closed_memoized = EMPTY_DICT
        self._rows = deque()
        self._done = _Done()
        self._views = adapt_connection.views

    @property
    def description(self) -> Any:
        """Columns of the last statement; None when it has none."""
        return self._done.description

    @property
    def rowcount(self) -> int:
        """How many rows the last statement changed."""
        return self._done.rowcount

    @property
    def lastrowid(self) -> Any:
        """Number of the row that was inserted last."""
        return self._done.lastrowid

    def execute(self, operation: Any, parameters: Any = None) -> Any:
        """Run one statement and take its rows."""
        return self._visit(operation, parameters, many=False)

    def executemany(self, operation: Any, seq_of_parameters: Any) -> Any:
        """Run one statement for each set of parameters."""
        return self._visit(operation, seq_of_parameters, many=True)

    def _visit(self, sql: str, parameters: Any, *, many: bool) -> None:
        try:
            done = await_(self._visited(sql, parameters, many=many))
        except Exception as error:  # noqa: BLE001 - the library's own sorting, which always raises
            self._adapt_connection._handle_exception(error)
        self._rows, self._done = deque(done.rows), done._replace(rows=())  # a row that was fetched is nobody's

    async def _visited(self, sql: str, parameters: Any, *, many: bool) -> _Done:
        driver: Any = self._connection
        async with self._adapt_connection._execute_mutex:
            done: _Done = await driver._execute(_whole, driver, sql, parameters, many=many, views=self._views)
        return done

    async def _async_soft_close(self) -> None:
        """There is nothing to close."""

    def close(self) -> None:
        """Forget the rows that nobody fetched."""
        self._rows.clear()


class _Connection(AsyncAdapt_aiosqlite_connection):
    __slots__ = ("views",)

    _cursor_cls = Cursor

    def __init__(self, dbapi: Any, connection: Any) -> None:
        super().__init__(dbapi, connection)
        self.views = False


class Driver(AsyncAdapt_aiosqlite_dbapi):
    """What create_async_engine(module=Driver()) connects with."""

    def __init__(self) -> None:
        """Adapt the two modules, as the dialect does."""
        super().__init__(aiosqlite, sqlite3)

    def connect(self, *arg: Any, **kw: Any) -> _Connection:
        """Connect as the library does; only the cursors are others."""
        return _Connection(self, super().connect(*arg, **kw)._connection)


def begin_views(connection: _Connection) -> None:
    """Let a connection that only reads begin its view in the visit of the first statement: a BEGIN asks nobody."""
    connection.views = True
