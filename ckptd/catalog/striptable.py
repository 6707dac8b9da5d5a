"""The table of what was taken out of checkpoints that stay; catalog/strips.py says what its states mean."""

from sqlalchemy import BigInteger, Column, ForeignKey, Index, String, Table

from ckptd.catalog.columns import JSON, Utc
from ckptd.catalog.schema import WORD, metadata

strip = Table(
    "strip",
    metadata,
    Column("checkpoint_no", ForeignKey("checkpoint.sequence"), primary_key=True, autoincrement=False),
    Column("state", String(WORD), nullable=False),
    Column("at", Utc, nullable=False),
    Column("files", JSON, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Index(None, "state", "at"),
)
