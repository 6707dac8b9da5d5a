"""Every table of the catalog, once, for SQLite, PostgreSQL and MySQL.

Rows refer to one another by short row numbers; ids (32 hex digits) are for people, wires and manifests. Text in an
index is bounded, because MySQL asks for it; a path is looked up by `path_key`, the first half of its SHA-256. A name
ending in `_no` is a row number, `special` says which non-finite number a NULL value stands for (columns.py). A change
here needs a migration beside it (versions/steps/); a test compares the two.
"""

import hashlib
import os

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    event,
)  # fmt: skip

from ckptd.catalog.columns import JSON, Digests64, Numbers, PathText, RowNumber, Unsigned64, Utc

ID = 32
NAME = 128
METRIC_NAME = 256
TAG = 128
WORD = 16  # states, levels, kinds

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def path_key(path: str) -> str:
    """Return what a path is looked up by: 32 hex digits, whatever its length and bytes."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:ID]


root = Table(
    "root",
    metadata,
    Column("no", RowNumber, primary_key=True),
    Column("path", PathText, nullable=False),
    Column("path_key", String(ID), nullable=False, unique=True),
    Column("kind", String(WORD), nullable=False),
    Column("uid", BigInteger, nullable=False),
    Column("project", String(NAME), nullable=False),
    Column("allow_delete", Boolean, nullable=False),
    Column("allow_links", Boolean, nullable=False),
    Column("added_at", Utc, nullable=False),
    Column("reconciled_at", Utc),
    Column("mark", String(ID)),  # of the file in the root that says which root it is; NULL: none was seen
    Column("device", Unsigned64),  # where that was
    sqlite_autoincrement=True,
)

project = Table(
    "project",
    metadata,
    Column("no", RowNumber, primary_key=True),
    Column("uid", BigInteger, nullable=False),
    Column("name", String(NAME), nullable=False),
    UniqueConstraint("uid", "name"),
    Index(None, "name"),
    sqlite_autoincrement=True,
)

experiment = Table(
    "experiment",
    metadata,
    Column("no", RowNumber, primary_key=True),
    Column("id", String(ID), nullable=False, unique=True),
    Column("uid", BigInteger, nullable=False),
    Column("project_no", ForeignKey("project.no"), nullable=False),
    Column("name", String(NAME), nullable=False),
    Column("status", String(WORD), nullable=False),
    Column("segment", Integer, nullable=False),
    Column("root", PathText, nullable=False),
    Column("config", JSON, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("parent_id", String(ID)),  # not a foreign key: the parent may live in another catalog
    Column("facts", JSON, nullable=False),
    Column("error", JSON),
    Column("last_step", BigInteger),
    Column("created_at", Utc, nullable=False),
    Column("heartbeat_at", Utc, nullable=False),
    Column("closed_at", Utc),
    UniqueConstraint("project_no", "name"),
    Index(None, "name"),
    Index(None, "uid", "no"),
    Index(None, "parent_id"),
    Index(None, "status", "heartbeat_at"),
    sqlite_autoincrement=True,
)

experiment_tag = Table(
    "experiment_tag",
    metadata,
    Column("tag", String(TAG), primary_key=True),
    Column("experiment_no", ForeignKey("experiment.no"), primary_key=True),
    Index(None, "experiment_no"),
)

segment = Table(
    "segment",
    metadata,
    Column("experiment_no", ForeignKey("experiment.no"), primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("opened_at", Utc, nullable=False),
    Column("start_step", BigInteger),  # the step it went on from; NULL: from the beginning, or not said
    Column("visible_to", BigInteger),  # points after this step were overtaken by a later segment
    Column("config", JSON, nullable=False),
    Column("facts", JSON, nullable=False),
)

metric_summary = Table(
    "metric_summary",
    metadata,
    Column("no", RowNumber, primary_key=True),
    Column("experiment_no", ForeignKey("experiment.no"), nullable=False),
    Column("name", String(METRIC_NAME), nullable=False),
    Column("points", BigInteger, nullable=False),
    Column("nonfinite", BigInteger, nullable=False),
    Column("last", Double),
    Column("last_special", SmallInteger, nullable=False),
    Column("last_segment", Integer, nullable=False),
    Column("last_step", BigInteger),
    Column("last_at", Utc, nullable=False),
    Column("min", Double),
    Column("min_step", BigInteger),
    Column("max", Double),
    Column("max_step", BigInteger),
    UniqueConstraint("experiment_no", "name"),
    sqlite_autoincrement=True,
)

metric = Table(
    "metric",
    metadata,
    Column("no", RowNumber, primary_key=True),
    Column("series_no", ForeignKey("metric_summary.no"), nullable=False),
    Column("experiment_no", ForeignKey("experiment.no"), nullable=False),
    Column("segment", Integer, nullable=False),
    Column("step", BigInteger),
    Column("value", Double),
    Column("special", SmallInteger, nullable=False),
    Column("at", Utc, nullable=False),
    Index(None, "series_no", "step", "no"),
    Index(None, "experiment_no", "no"),
    sqlite_autoincrement=True,
)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("sequence", RowNumber, primary_key=True),
    Column("id", String(ID), nullable=False, unique=True),
    Column("uid", BigInteger, nullable=False),
    Column("project_no", ForeignKey("project.no"), nullable=False),  # as its experiment's, for the index
    Column("experiment_no", ForeignKey("experiment.no"), nullable=False),
    Column("segment", Integer, nullable=False),
    Column("root_no", ForeignKey("root.no")),
    Column("state", String(WORD), nullable=False),
    Column("level", String(WORD), nullable=False),
    Column("level_rank", SmallInteger, nullable=False),  # position of `level` on the ladder, for "at least"
    Column("is_good", Boolean, nullable=False),  # model.Checkpoint.is_good, so that an index can answer "latest"
    Column("origin", String(WORD), nullable=False),
    Column("path", PathText, nullable=False),
    Column("path_key", String(ID), nullable=False),  # "" while there is no path
    Column("step", BigInteger),
    Column("epoch", Double),
    Column("revision", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("format", String(32), nullable=False),
    Column("created_at", Utc, nullable=False),
    Column("staged_at", Utc),
    Column("durable_at", Utc),
    Column("verified_at", Utc),
    Column("checked_at", Utc),  # the last time its bytes were read and compared, whatever came out
    Column("trashed_at", Utc),
    Column("dropped_at", Utc),
    Column("metrics", Numbers, nullable=False),
    Column("note", Text, nullable=False),
    Column("meta", JSON, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("parent_id", String(ID)),  # not a foreign key: the parent may live in another catalog
    Column("update_best", Boolean, nullable=False),
    Column("veto", Text),  # which hook kept it from counting, and why; NULL: none did
    Column("error", JSON),
    Column("arena", String(ID)),
    Column("trash", String(255)),
    Column("manifest_sha256", String(64), nullable=False),
    Column("dev", Unsigned64),
    Column("ino", Unsigned64),
    Column("inode_size_bytes", BigInteger),
    Column("mtime_ns", BigInteger),
    Column("ctime_ns", BigInteger),
    UniqueConstraint("experiment_no", "step", "revision"),
    Index(None, "path_key"),
    Index(None, "state", "sequence"),
    Index(None, "state", "trashed_at"),
    Index(None, "uid", "sequence"),
    Index("ix_checkpoint_newest_good", "experiment_no", "is_good", "segment", "step", "revision", "sequence"),
    Index(None, "experiment_no", "state", "sequence"),
    Index(None, "experiment_no", "sequence"),
    Index(None, "project_no", "sequence"),
    Index(None, "step", "sequence"),
    Index(None, "root_no", "sequence"),
    Index(None, "parent_id"),
    sqlite_autoincrement=True,
)

checkpoint_tag = Table(
    "checkpoint_tag",
    metadata,
    Column("tag", String(TAG), primary_key=True),
    Column("checkpoint_no", ForeignKey("checkpoint.sequence"), primary_key=True),
    Index(None, "checkpoint_no"),
)

checkpoint_metric = Table(
    "checkpoint_metric",
    metadata,
    Column("checkpoint_no", ForeignKey("checkpoint.sequence"), primary_key=True, autoincrement=False),
    Column("name", String(METRIC_NAME), primary_key=True),
    Column("experiment_no", ForeignKey("experiment.no"), nullable=False),
    Column("value", Double),
    Column("special", SmallInteger, nullable=False),
    Index(None, "name", "special", "value", "checkpoint_no"),
    Index("ix_checkpoint_metric_in_experiment", "experiment_no", "name", "special", "value", "checkpoint_no"),
)

file = Table(
    "file",
    metadata,
    Column("checkpoint_no", ForeignKey("checkpoint.sequence"), primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("path", PathText, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("xxh3", Digests64, nullable=False),
    Column("stripped", Boolean, nullable=False, default=False),  # taken out, or on the move: strip says where it is
)

copy = Table(
    "copy",
    metadata,
    Column("no", RowNumber, primary_key=True),
    Column("checkpoint_no", ForeignKey("checkpoint.sequence"), nullable=False),
    Column("tier", String(64), nullable=False),
    Column("location", PathText, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("copied_at", Utc, nullable=False),
    Column("checked_at", Utc),
    UniqueConstraint("checkpoint_no", "tier"),
    sqlite_autoincrement=True,
)

board = Table(
    "board",
    metadata,
    Column("no", RowNumber, primary_key=True),
    Column("scope", String(WORD), nullable=False),
    Column("owner_no", BigInteger, nullable=False),  # of the experiment, for scope "project" of the project
    Column("name", String(METRIC_NAME), nullable=False),
    Column("digest", String(ID), nullable=False),  # of the rule: another definition is another board
    Column("metric", String(METRIC_NAME), nullable=False),  # "" for a rule by several
    Column("mode", String(3), nullable=False),
    Column("rule", JSON, nullable=False),
    UniqueConstraint("scope", "owner_no", "name", "digest"),
    sqlite_autoincrement=True,
)

best = Table(
    "best",
    metadata,
    Column("board_no", ForeignKey("board.no"), primary_key=True, autoincrement=False),
    Column("checkpoint_no", ForeignKey("checkpoint.sequence"), primary_key=True, autoincrement=False),
    Column("rank", Integer, nullable=False),  # 1 is the best; 0 has no place and is remembered for those to come
    Column("experiment_no", ForeignKey("experiment.no"), nullable=False),  # where the checkpoint lies
    Column("value", Double, nullable=False),
    Column("standing", JSON, nullable=False),  # what was compared, and its place in the order of training
    Column("decided_at", Utc, nullable=False),
    Index(None, "board_no", "rank"),
    Index(None, "checkpoint_no"),
    Index(None, "experiment_no", "rank"),
)

pin = Table(
    "pin",
    metadata,
    Column("checkpoint_no", ForeignKey("checkpoint.sequence"), primary_key=True, autoincrement=False),
    Column("uid", BigInteger, nullable=False),
    Column("note", Text, nullable=False),
    Column("pinned_at", Utc, nullable=False),
)

lease = Table(
    "lease",
    metadata,
    Column("checkpoint_no", ForeignKey("checkpoint.sequence"), primary_key=True, autoincrement=False),
    Column("holder", String(NAME), primary_key=True),
    Column("until", Utc, nullable=False),
    Index(None, "until"),
    Index(None, "holder"),
)

cached = Table(
    "cached",
    metadata,
    Column("key", String(ID), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("fetched_at", Utc, nullable=False),
    Column("used", BigInteger, nullable=False),  # place in the order of use: a clock that is set changes no order
    Column("used_at", Utc, nullable=False),
)

cached_use = Table(
    "cached_use",
    metadata,
    Column("key", ForeignKey("cached.key"), primary_key=True),
    Column("holder", String(NAME), primary_key=True),
    Column("until", Utc, nullable=False),
)

job = Table(
    "job",
    metadata,
    Column("no", RowNumber, primary_key=True),
    Column("checkpoint_id", String(ID), nullable=False),
    Column("lane", String(NAME), nullable=False),
    Column("stage", String(WORD), nullable=False),
    Column("can_wait", Boolean, nullable=False),  # its bytes are on the disk: nobody's memory waits for it
    Column("state", String(WORD), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("claim", Integer, nullable=False),
    Column("not_before", Utc, nullable=False),
    Column("lease_until", Utc),
    Column("payload", JSON, nullable=False),
    Column("error", JSON),
    Column("queued_at", Utc, nullable=False),
    Index(None, "state", "not_before", "no"),
    Index(None, "state", "can_wait", "not_before", "no"),
    Index(None, "lane", "state", "no"),
    Index(None, "checkpoint_id", "state"),
    sqlite_autoincrement=True,
)

audit = Table(
    "audit",
    metadata,
    Column("no", RowNumber, primary_key=True),
    Column("at", Utc, nullable=False),
    Column("uid", BigInteger, nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("verb", String(64), nullable=False),
    Column("subject", String(512), nullable=False),
    Column("before", JSON),
    Column("after", JSON),
    Column("note", Text, nullable=False),
    Index(None, "subject", "no"),
    sqlite_autoincrement=True,
)

event_log = Table(
    "event",
    metadata,
    Column("sequence", RowNumber, primary_key=True),
    Column("at", Utc, nullable=False),
    Column("name", String(64), nullable=False),
    Column("experiment_id", String(ID)),
    Column("checkpoint_id", String(ID)),
    Column("data", JSON, nullable=False),
    Index(None, "checkpoint_id", "sequence"),
    Index(None, "experiment_id", "sequence"),
    sqlite_autoincrement=True,
)

# The trail is append-only in the file itself, whatever a later code path tries.
AUDIT_GUARDS = tuple(
    f"CREATE TRIGGER audit_keeps_every_row_{verb} BEFORE {verb} ON audit BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END"
    for verb in ("update", "delete")
)
for _guard in AUDIT_GUARDS:
    event.listen(audit, "after_create", DDL(_guard).execute_if(dialect="sqlite"))  # type: ignore[no-untyped-call]
