"""The tables of hooks as the first schema has them; a part of its step."""

import sqlalchemy as sa
from alembic import op

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLES = ("finding", "hook_run", "hook")  # in the order of dropping


def make() -> None:
    """Make the three tables in the step's transaction."""
    op.create_table(
        "hook",
        sa.Column("no", NUMBER, nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("enabled", sa.Boolean()),
        sa.Column("cursor", sa.BigInteger()),
        sa.Column("counts", sa.JSON(), nullable=False),
        sa.Column("added_at", sa.BigInteger(), nullable=False),
        sa.Column("last_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("no", name="pk_hook"),
        sa.UniqueConstraint("name", name="uq_hook_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "hook_run",
        sa.Column("no", NUMBER, nullable=False),
        sa.Column("hook_no", NUMBER, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("event", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=128), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("ms", sa.Double(), nullable=False),
        sa.Column("experiment_id", sa.String(length=32)),
        sa.Column("checkpoint_id", sa.String(length=32)),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("no", name="pk_hook_run"),
        sa.ForeignKeyConstraint(["hook_no"], ["hook.no"], name="fk_hook_run_hook_no"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_hook_run_hook_no_outcome_no", "hook_run", ["hook_no", "outcome", "no"])
    op.create_table(
        "finding",
        sa.Column("no", NUMBER, nullable=False),
        sa.Column("hook", sa.String(length=128), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("level", sa.String(length=16), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("experiment_id", sa.String(length=32)),
        sa.Column("checkpoint_id", sa.String(length=32)),
        sa.PrimaryKeyConstraint("no", name="pk_finding"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_finding_checkpoint_id_no", "finding", ["checkpoint_id", "no"])
    op.create_index("ix_finding_experiment_id_no", "finding", ["experiment_id", "no"])
