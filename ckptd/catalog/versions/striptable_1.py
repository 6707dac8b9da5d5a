"""The table of strips as the first schema has it; a part of its step."""

import sqlalchemy as sa
from alembic import op

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLES = ("strip",)


def make() -> None:
    """Make it in the step's transaction."""
    op.create_table(
        "strip",
        sa.Column("checkpoint_no", NUMBER, autoincrement=False, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["checkpoint_no"], ["checkpoint.sequence"], name="fk_strip_checkpoint_no"),
        sa.PrimaryKeyConstraint("checkpoint_no", name="pk_strip"),
    )
    op.create_index("ix_strip_state_at", "strip", ["state", "at"])
