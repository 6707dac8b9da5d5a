"""The tables of what was fetched back from an archive, as they were in version 1, never to be touched again."""

import sqlalchemy as sa
from alembic import op

TABLES = ("cached_use", "cached")


def make() -> None:
    """Make both."""
    op.create_table(
        "cached",
        sa.Column("key", sa.String(length=32), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("fetched_at", sa.BigInteger(), nullable=False),
        sa.Column("used", sa.BigInteger(), nullable=False),
        sa.Column("used_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_cached"),
    )
    op.create_table(
        "cached_use",
        sa.Column("key", sa.String(length=32), nullable=False),
        sa.Column("holder", sa.String(length=128), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["key"], ["cached.key"], name="fk_cached_use_key"),
        sa.PrimaryKeyConstraint("key", "holder", name="pk_cached_use"),
    )
