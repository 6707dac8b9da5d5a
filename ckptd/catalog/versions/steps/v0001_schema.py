"""The first schema: everything."""

import sqlalchemy as sa
from alembic import op

from ckptd.catalog.versions import cachetables_1, hooktables_1, striptable_1

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make every table."""
    _queue_and_logs()
    _owners()
    _points()
    _checkpoints()
    _parts()
    _holds()
    cachetables_1.make()
    hooktables_1.make()
    striptable_1.make()
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("update", "delete"):
            op.execute(
                f"CREATE TRIGGER audit_keeps_every_row_{verb} BEFORE {verb} ON audit "
                "BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END"
            )


def downgrade() -> None:
    """Drop every table; its indexes and triggers go with it."""
    for table in (
        *cachetables_1.TABLES, "lease", "pin", "best", "board", "checkpoint_tag", "checkpoint_metric", "copy",
        "file", *striptable_1.TABLES, "checkpoint", "metric", "metric_summary", "segment", "experiment_tag",
        "experiment", "project", "root", "audit", "event", "job", *hooktables_1.TABLES,
    ):  # fmt: skip
        op.drop_table(table)


def _queue_and_logs() -> None:
    op.create_table(
        "job",
        sa.Column("no", NUMBER, nullable=False),
        sa.Column("checkpoint_id", sa.String(length=32), nullable=False),
        sa.Column("lane", sa.String(length=128), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("can_wait", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("claim", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.BigInteger(), nullable=False),
        sa.Column("lease_until", sa.BigInteger()),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("error", sa.JSON()),
        sa.Column("queued_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("no", name="pk_job"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_job_checkpoint_id_state", "job", ["checkpoint_id", "state"])
    op.create_index("ix_job_lane_state_no", "job", ["lane", "state", "no"])
    op.create_index("ix_job_state_not_before_no", "job", ["state", "not_before", "no"])
    op.create_index("ix_job_state_can_wait_not_before_no", "job", ["state", "can_wait", "not_before", "no"])
    op.create_table(
        "event",
        sa.Column("sequence", NUMBER, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("experiment_id", sa.String(length=32)),
        sa.Column("checkpoint_id", sa.String(length=32)),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_event"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_event_checkpoint_id_sequence", "event", ["checkpoint_id", "sequence"])
    op.create_index("ix_event_experiment_id_sequence", "event", ["experiment_id", "sequence"])
    op.create_table(
        "audit",
        sa.Column("no", NUMBER, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("uid", sa.BigInteger(), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("verb", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=512), nullable=False),
        sa.Column("before", sa.JSON()),
        sa.Column("after", sa.JSON()),
        sa.Column("note", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("no", name="pk_audit"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_audit_subject_no", "audit", ["subject", "no"])


def _owners() -> None:
    op.create_table(
        "root",
        sa.Column("no", NUMBER, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("path_key", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("uid", sa.BigInteger(), nullable=False),
        sa.Column("project", sa.String(length=128), nullable=False),
        sa.Column("allow_delete", sa.Boolean(), nullable=False),
        sa.Column("allow_links", sa.Boolean(), nullable=False),
        sa.Column("added_at", sa.BigInteger(), nullable=False),
        sa.Column("reconciled_at", sa.BigInteger()),
        sa.Column("mark", sa.String(length=32)),
        sa.Column("device", sa.BigInteger()),
        sa.PrimaryKeyConstraint("no", name="pk_root"),
        sa.UniqueConstraint("path_key", name="uq_root_path_key"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "project",
        sa.Column("no", NUMBER, nullable=False),
        sa.Column("uid", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("no", name="pk_project"),
        sa.UniqueConstraint("uid", "name", name="uq_project_uid_name"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_project_name", "project", ["name"])
    op.create_table(
        "experiment",
        sa.Column("no", NUMBER, nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("uid", sa.BigInteger(), nullable=False),
        sa.Column("project_no", NUMBER, nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("segment", sa.Integer(), nullable=False),
        sa.Column("root", sa.Text(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("parent_id", sa.String(length=32)),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("error", sa.JSON()),
        sa.Column("last_step", sa.BigInteger()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("heartbeat_at", sa.BigInteger(), nullable=False),
        sa.Column("closed_at", sa.BigInteger()),
        sa.ForeignKeyConstraint(["project_no"], ["project.no"], name="fk_experiment_project_no"),
        sa.PrimaryKeyConstraint("no", name="pk_experiment"),
        sa.UniqueConstraint("id", name="uq_experiment_id"),
        sa.UniqueConstraint("project_no", "name", name="uq_experiment_project_no_name"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_experiment_name", "experiment", ["name"])
    op.create_index("ix_experiment_parent_id", "experiment", ["parent_id"])
    op.create_index("ix_experiment_status_heartbeat_at", "experiment", ["status", "heartbeat_at"])
    op.create_index("ix_experiment_uid_no", "experiment", ["uid", "no"])
    op.create_table(
        "experiment_tag",
        sa.Column("tag", sa.String(length=128), nullable=False),
        sa.Column("experiment_no", NUMBER, nullable=False),
        sa.ForeignKeyConstraint(["experiment_no"], ["experiment.no"], name="fk_experiment_tag_experiment_no"),
        sa.PrimaryKeyConstraint("tag", "experiment_no", name="pk_experiment_tag"),
    )
    op.create_index("ix_experiment_tag_experiment_no", "experiment_tag", ["experiment_no"])
    op.create_table(
        "segment",
        sa.Column("experiment_no", NUMBER, autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("opened_at", sa.BigInteger(), nullable=False),
        sa.Column("start_step", sa.BigInteger()),
        sa.Column("visible_to", sa.BigInteger()),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["experiment_no"], ["experiment.no"], name="fk_segment_experiment_no"),
        sa.PrimaryKeyConstraint("experiment_no", "number", name="pk_segment"),
    )


def _points() -> None:
    op.create_table(
        "metric_summary",
        sa.Column("no", NUMBER, nullable=False),
        sa.Column("experiment_no", NUMBER, nullable=False),
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("points", sa.BigInteger(), nullable=False),
        sa.Column("nonfinite", sa.BigInteger(), nullable=False),
        sa.Column("last", sa.Double()),
        sa.Column("last_special", sa.SmallInteger(), nullable=False),
        sa.Column("last_segment", sa.Integer(), nullable=False),
        sa.Column("last_step", sa.BigInteger()),
        sa.Column("last_at", sa.BigInteger(), nullable=False),
        sa.Column("min", sa.Double()),
        sa.Column("min_step", sa.BigInteger()),
        sa.Column("max", sa.Double()),
        sa.Column("max_step", sa.BigInteger()),
        sa.ForeignKeyConstraint(["experiment_no"], ["experiment.no"], name="fk_metric_summary_experiment_no"),
        sa.PrimaryKeyConstraint("no", name="pk_metric_summary"),
        sa.UniqueConstraint("experiment_no", "name", name="uq_metric_summary_experiment_no_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "metric",
        sa.Column("no", NUMBER, nullable=False),
        sa.Column("series_no", NUMBER, nullable=False),
        sa.Column("experiment_no", NUMBER, nullable=False),
        sa.Column("segment", sa.Integer(), nullable=False),
        sa.Column("step", sa.BigInteger()),
        sa.Column("value", sa.Double()),
        sa.Column("special", sa.SmallInteger(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["experiment_no"], ["experiment.no"], name="fk_metric_experiment_no"),
        sa.ForeignKeyConstraint(["series_no"], ["metric_summary.no"], name="fk_metric_series_no"),
        sa.PrimaryKeyConstraint("no", name="pk_metric"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_metric_experiment_no_no", "metric", ["experiment_no", "no"])
    op.create_index("ix_metric_series_no_step_no", "metric", ["series_no", "step", "no"])


def _checkpoints() -> None:
    op.create_table(
        "checkpoint",
        sa.Column("sequence", NUMBER, nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("uid", sa.BigInteger(), nullable=False),
        sa.Column("project_no", NUMBER, nullable=False),
        sa.Column("experiment_no", NUMBER, nullable=False),
        sa.Column("segment", sa.Integer(), nullable=False),
        sa.Column("root_no", NUMBER),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("level", sa.String(length=16), nullable=False),
        sa.Column("level_rank", sa.SmallInteger(), nullable=False),
        sa.Column("is_good", sa.Boolean(), nullable=False),
        sa.Column("origin", sa.String(length=16), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("path_key", sa.String(length=32), nullable=False),
        sa.Column("step", sa.BigInteger()),
        sa.Column("epoch", sa.Double()),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("format", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("staged_at", sa.BigInteger()),
        sa.Column("durable_at", sa.BigInteger()),
        sa.Column("verified_at", sa.BigInteger()),
        sa.Column("checked_at", sa.BigInteger()),
        sa.Column("trashed_at", sa.BigInteger()),
        sa.Column("dropped_at", sa.BigInteger()),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("meta", sa.JSON(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("parent_id", sa.String(length=32)),
        sa.Column("update_best", sa.Boolean(), nullable=False),
        sa.Column("veto", sa.Text()),
        sa.Column("error", sa.JSON()),
        sa.Column("arena", sa.String(length=32)),
        sa.Column("trash", sa.String(length=255)),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=False),
        sa.Column("dev", sa.BigInteger()),
        sa.Column("ino", sa.BigInteger()),
        sa.Column("inode_size_bytes", sa.BigInteger()),
        sa.Column("mtime_ns", sa.BigInteger()),
        sa.Column("ctime_ns", sa.BigInteger()),
        sa.ForeignKeyConstraint(["experiment_no"], ["experiment.no"], name="fk_checkpoint_experiment_no"),
        sa.ForeignKeyConstraint(["project_no"], ["project.no"], name="fk_checkpoint_project_no"),
        sa.ForeignKeyConstraint(["root_no"], ["root.no"], name="fk_checkpoint_root_no"),
        sa.PrimaryKeyConstraint("sequence", name="pk_checkpoint"),
        sa.UniqueConstraint("experiment_no", "step", "revision", name="uq_checkpoint_experiment_no_step_revision"),
        sa.UniqueConstraint("id", name="uq_checkpoint_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_checkpoint_experiment_no_sequence", "checkpoint", ["experiment_no", "sequence"])
    op.create_index("ix_checkpoint_experiment_no_state_sequence", "checkpoint", ["experiment_no", "state", "sequence"])
    op.create_index(
        "ix_checkpoint_newest_good",
        "checkpoint",
        ["experiment_no", "is_good", "segment", "step", "revision", "sequence"],
    )
    op.create_index("ix_checkpoint_parent_id", "checkpoint", ["parent_id"])
    op.create_index("ix_checkpoint_path_key", "checkpoint", ["path_key"])
    op.create_index("ix_checkpoint_project_no_sequence", "checkpoint", ["project_no", "sequence"])
    op.create_index("ix_checkpoint_root_no_sequence", "checkpoint", ["root_no", "sequence"])
    op.create_index("ix_checkpoint_state_sequence", "checkpoint", ["state", "sequence"])
    op.create_index("ix_checkpoint_state_trashed_at", "checkpoint", ["state", "trashed_at"])
    op.create_index("ix_checkpoint_step_sequence", "checkpoint", ["step", "sequence"])
    op.create_index("ix_checkpoint_uid_sequence", "checkpoint", ["uid", "sequence"])


def _parts() -> None:
    op.create_table(
        "file",
        sa.Column("checkpoint_no", NUMBER, autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("xxh3", sa.LargeBinary(), nullable=False),
        sa.Column("stripped", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["checkpoint_no"], ["checkpoint.sequence"], name="fk_file_checkpoint_no"),
        sa.PrimaryKeyConstraint("checkpoint_no", "position", name="pk_file"),
    )
    op.create_table(
        "copy",
        sa.Column("no", NUMBER, nullable=False),
        sa.Column("checkpoint_no", NUMBER, nullable=False),
        sa.Column("tier", sa.String(length=64), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("copied_at", sa.BigInteger(), nullable=False),
        sa.Column("checked_at", sa.BigInteger()),
        sa.ForeignKeyConstraint(["checkpoint_no"], ["checkpoint.sequence"], name="fk_copy_checkpoint_no"),
        sa.PrimaryKeyConstraint("no", name="pk_copy"),
        sa.UniqueConstraint("checkpoint_no", "tier", name="uq_copy_checkpoint_no_tier"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "checkpoint_metric",
        sa.Column("checkpoint_no", NUMBER, autoincrement=False, nullable=False),
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("experiment_no", NUMBER, nullable=False),
        sa.Column("value", sa.Double()),
        sa.Column("special", sa.SmallInteger(), nullable=False),
        sa.ForeignKeyConstraint(["checkpoint_no"], ["checkpoint.sequence"], name="fk_checkpoint_metric_checkpoint_no"),
        sa.ForeignKeyConstraint(["experiment_no"], ["experiment.no"], name="fk_checkpoint_metric_experiment_no"),
        sa.PrimaryKeyConstraint("checkpoint_no", "name", name="pk_checkpoint_metric"),
    )
    op.create_index(
        "ix_checkpoint_metric_in_experiment",
        "checkpoint_metric",
        ["experiment_no", "name", "special", "value", "checkpoint_no"],
    )
    op.create_index(
        "ix_checkpoint_metric_name_special_value_checkpoint_no",
        "checkpoint_metric",
        ["name", "special", "value", "checkpoint_no"],
    )
    op.create_table(
        "checkpoint_tag",
        sa.Column("tag", sa.String(length=128), nullable=False),
        sa.Column("checkpoint_no", NUMBER, nullable=False),
        sa.ForeignKeyConstraint(["checkpoint_no"], ["checkpoint.sequence"], name="fk_checkpoint_tag_checkpoint_no"),
        sa.PrimaryKeyConstraint("tag", "checkpoint_no", name="pk_checkpoint_tag"),
    )
    op.create_index("ix_checkpoint_tag_checkpoint_no", "checkpoint_tag", ["checkpoint_no"])


def _holds() -> None:
    op.create_table(
        "board",
        sa.Column("no", NUMBER, nullable=False),
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("owner_no", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("digest", sa.String(length=32), nullable=False),
        sa.Column("metric", sa.String(length=256), nullable=False),
        sa.Column("mode", sa.String(length=3), nullable=False),
        sa.Column("rule", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("no", name="pk_board"),
        sa.UniqueConstraint("scope", "owner_no", "name", "digest", name="uq_board_scope_owner_no_name_digest"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "best",
        sa.Column("board_no", NUMBER, autoincrement=False, nullable=False),
        sa.Column("checkpoint_no", NUMBER, autoincrement=False, nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("experiment_no", NUMBER, nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("standing", sa.JSON(), nullable=False),
        sa.Column("decided_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["board_no"], ["board.no"], name="fk_best_board_no"),
        sa.ForeignKeyConstraint(["checkpoint_no"], ["checkpoint.sequence"], name="fk_best_checkpoint_no"),
        sa.ForeignKeyConstraint(["experiment_no"], ["experiment.no"], name="fk_best_experiment_no"),
        sa.PrimaryKeyConstraint("board_no", "checkpoint_no", name="pk_best"),
    )
    op.create_index("ix_best_board_no_rank", "best", ["board_no", "rank"])
    op.create_index("ix_best_checkpoint_no", "best", ["checkpoint_no"])
    op.create_index("ix_best_experiment_no_rank", "best", ["experiment_no", "rank"])
    op.create_table(
        "pin",
        sa.Column("checkpoint_no", NUMBER, autoincrement=False, nullable=False),
        sa.Column("uid", sa.BigInteger(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("pinned_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["checkpoint_no"], ["checkpoint.sequence"], name="fk_pin_checkpoint_no"),
        sa.PrimaryKeyConstraint("checkpoint_no", name="pk_pin"),
    )
    op.create_table(
        "lease",
        sa.Column("checkpoint_no", NUMBER, autoincrement=False, nullable=False),
        sa.Column("holder", sa.String(length=128), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["checkpoint_no"], ["checkpoint.sequence"], name="fk_lease_checkpoint_no"),
        sa.PrimaryKeyConstraint("checkpoint_no", "holder", name="pk_lease"),
    )
    op.create_index("ix_lease_holder", "lease", ["holder"])
    op.create_index("ix_lease_until", "lease", ["until"])
