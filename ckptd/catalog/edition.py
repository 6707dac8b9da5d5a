"""Which edition of the catalog this is: a number for each table that goes up with every commit that may have changed it.

Read off the statements themselves as they go to the one writing connection, so no row function can
forget it. A statement that this file does not understand counts for every table. How far a running
experiment is (PROGRESS) counts apart: it changes all the time, and lists of checkpoints do not show it.
Only for a catalog that nobody else writes.
"""

import re
from collections import Counter
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

_CHANGES = re.compile(
    r'\s*(?:INSERT\s+(?:OR\s+\w+\s+)?INTO|REPLACE\s+INTO|UPDATE|DELETE\s+FROM)\s+"?(\w+)', re.IGNORECASE
)
_READS = re.compile(r"\s*(?:SELECT|BEGIN|COMMIT|ROLLBACK|SAVEPOINT|RELEASE|PRAGMA)\b", re.IGNORECASE)
_PROGRESS = re.compile(
    r"UPDATE experiment SET (?:heartbeat_at|last_step)=\?(?:, (?:heartbeat_at|last_step)=\?)* WHERE experiment\.id = \?"
)
_EVERY = "*"
PROGRESS = "experiment.progress"


class Edition:
    """Counts commits by table."""

    def __init__(self) -> None:
        """Begin with edition 0 of everything."""
        self._committed: Counter[str] = Counter()
        self._touched: set[str] = set()

    def follow(self, engine: AsyncEngine) -> None:
        """Note every statement of this engine, in the thread that runs it: one at a time, between two `bump`s."""

        def executing(_conn: Any, _cursor: Any, statement: str, *_more: Any) -> None:
            self.note(statement)

        event.listen(engine.sync_engine, "before_cursor_execute", executing)

    def note(self, statement: str) -> None:
        """Remember which table a statement may change."""
        found = _CHANGES.match(statement)
        if _PROGRESS.match(statement):
            self._touched.add(PROGRESS)
        elif found:
            self._touched.add(found[1].lower())
        elif not _READS.match(statement):
            self._touched.add(_EVERY)

    def bump(self) -> None:
        """What was noted is committed, or undone: the editions of its tables are over. Before anybody is told."""
        touched, self._touched = self._touched, set()
        self._committed.update(touched)

    def of(self, without: frozenset[str] = frozenset()) -> int:
        """Return the edition of all tables but these; it never goes down."""
        return sum(count for table, count in self._committed.items() if table not in without)
