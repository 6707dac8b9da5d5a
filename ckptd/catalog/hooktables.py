"""Tables of hooks: each one's place in the event log and its switch, its recent runs, and what hooks found."""

from sqlalchemy import BigInteger, Boolean, Column, Double, ForeignKey, Index, String, Table, Text

from ckptd.catalog.columns import JSON, RowNumber, Utc
from ckptd.catalog.schema import ID, NAME, WORD, metadata

hook = Table(
    "hook",
    metadata,
    Column("no", RowNumber, primary_key=True),
    Column("name", String(NAME), nullable=False, unique=True),
    Column("enabled", Boolean),  # a person's word; NULL: as the configuration says
    Column("cursor", BigInteger),  # the last event that needs no delivery any more; NULL: it begins with the next
    Column("counts", JSON, nullable=False),
    Column("added_at", Utc, nullable=False),
    Column("last_at", Utc),
    sqlite_autoincrement=True,
)

hook_run = Table(
    "hook_run",
    metadata,
    Column("no", RowNumber, primary_key=True),
    Column("hook_no", ForeignKey("hook.no"), nullable=False),
    Column("at", Utc, nullable=False),
    Column("event", String(64), nullable=False),
    Column("key", String(NAME), nullable=False),
    Column("outcome", String(WORD), nullable=False),
    Column("ms", Double, nullable=False),
    Column("experiment_id", String(ID)),
    Column("checkpoint_id", String(ID)),
    Column("detail", Text, nullable=False),
    Index(None, "hook_no", "outcome", "no"),
    sqlite_autoincrement=True,
)

finding = Table(
    "finding",
    metadata,
    Column("no", RowNumber, primary_key=True),
    Column("hook", String(NAME), nullable=False),
    Column("at", Utc, nullable=False),
    Column("level", String(WORD), nullable=False),
    Column("text", Text, nullable=False),
    Column("facts", JSON, nullable=False),
    Column("experiment_id", String(ID)),
    Column("checkpoint_id", String(ID)),
    Index(None, "checkpoint_id", "no"),
    Index(None, "experiment_id", "no"),
    sqlite_autoincrement=True,
)
