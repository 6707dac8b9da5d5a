"""A large catalog in seconds: rows through the real schema, in bulk, in a file that nobody else has open.

The schema is made by the daemon's own code; rows are made inside SQLite, without indexes, which are built
once at the end. What lies at the paths is nobody's business here: the root is of the kind that no scan visits.
"""

import random
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine

from ckptd.catalog import schema, versions

PROJECTS = 20
CHECKPOINTS_EACH = 1000  # of one experiment
RARE, COMMON = "rare", "common"
SEED = 20
ROOT = "/mnt/filled"
_NOW_US = 1_800_000_000_000_000

_EXPERIMENTS = """
INSERT INTO experiment (id, uid, project_no, name, status, segment, root, config, tags, facts, last_step, created_at, heartbeat_at)
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :experiments)
SELECT noise(i), :uid, 1 + i % :projects, 'run-' || i, 'completed', 1, :root, '{}', CASE WHEN i % 50 = 0 THEN '["rare"]' ELSE '[]' END,
       '{}', :each, :now + i, :now + i FROM n
"""
_CHECKPOINTS = """
INSERT INTO checkpoint (sequence, id, uid, project_no, experiment_no, segment, root_no, state, level, level_rank, is_good, origin,
  path, path_key, step, revision, size_bytes, format, created_at, staged_at, durable_at, verified_at, checked_at, metrics, note,
  meta, tags, update_best, manifest_sha256, dev, ino, inode_size_bytes, mtime_ns, ctime_ns)
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :checkpoints)
SELECT i, noise(-i), :uid, 1 + (1 + i % :experiments) % :projects, 1 + i % :experiments, 1, 1,
       CASE WHEN i / :experiments % 10 = 0 THEN 'dropped' ELSE 'live' END, 'verified', 3, i / :experiments % 10 <> 0, 'memory',
       path_of(i), path_key(path_of(i)), i / :experiments * 100, 1, 1 << 30, 'safetensors', :now + i, :now + i, :now + i, :now + i, :now + i,
       '{"val_loss": ' || fraction(i) || '}', '', '{}', CASE WHEN i % 4 = 0 THEN '["common"]' ELSE '[]' END, 1, noise(i) || noise(-i),
       1, i, 4096, :now * 1000, :now * 1000 FROM n
"""
_FILES = """
INSERT INTO file (checkpoint_no, position, path, size_bytes, sha256, xxh3, stripped)
SELECT sequence, p.value, 'model-' || p.value || '.safetensors', 8388608, lower(hex(randomblob(32))), randomblob(64), 0
FROM checkpoint JOIN json_each(:positions) AS p
"""
_OTHERS = (
    "INSERT INTO checkpoint_metric SELECT sequence, 'val_loss', experiment_no, fraction(sequence), 0 FROM checkpoint",
    "INSERT INTO checkpoint_tag SELECT 'common', sequence FROM checkpoint WHERE sequence % 4 = 0",
    "INSERT INTO experiment_tag SELECT 'rare', no FROM experiment WHERE no % 50 = 0",
)


@dataclass(frozen=True)
class Filled:
    """What lies in a filled catalog."""

    path: Path
    checkpoints: int
    files: int
    experiments: int
    took_s: float

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size


def noise(number: int) -> str:
    """32 hex digits that follow from a number."""
    return f"{random.Random(number).getrandbits(128):032x}"


def path_of(number: int) -> str:
    """Where the checkpoint with this sequence would lie."""
    return f"{ROOT}/run/step_{number:010d}"


def fill(path: Path, checkpoints: int, files_each: int, uid: int) -> Filled:
    """Make a catalog of so many checkpoints at `path`, which must not exist."""
    begun_s = time.monotonic()
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as made:
        versions.create(made)
    engine.dispose()
    experiments = max(PROJECTS, checkpoints // CHECKPOINTS_EACH)
    known = {
        "uid": uid, "projects": PROJECTS, "experiments": experiments, "checkpoints": checkpoints, "each": CHECKPOINTS_EACH,
        "root": ROOT, "now": _NOW_US, "positions": str(list(range(files_each))),
    }  # fmt: skip
    with sqlite3.connect(path) as db:
        for name, given in ((noise, 1), (path_of, 1), (schema.path_key, 1), (_fraction, 1)):
            db.create_function(name.__name__.lstrip("_"), given, name, deterministic=True)
        # Nobody reads it yet and a half-made one is thrown away: no journal, no sync.
        db.execute("PRAGMA journal_mode=OFF")
        db.execute("PRAGMA synchronous=OFF")
        db.execute("PRAGMA cache_size=-262144")
        indexes = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL").fetchall()
        for name, _ in indexes:
            db.execute(f'DROP INDEX "{name}"')
        _enter(db, known)
        for _, sql in indexes:
            db.execute(sql)
    db.close()
    return Filled(path, checkpoints, checkpoints * files_each, experiments, time.monotonic() - begun_s)


def _fraction(number: int) -> float:
    return random.Random(number).random()


def _enter(db: sqlite3.Connection, known: dict[str, object]) -> None:
    db.execute(
        "INSERT INTO root (path, path_key, kind, uid, project, allow_delete, allow_links, added_at) VALUES (?, ?, 'submitted', ?, '', 0, 0, ?)",
        (ROOT, schema.path_key(ROOT), known["uid"], _NOW_US),
    )
    projects = [(known["uid"], f"project-{number}") for number in range(PROJECTS)]
    db.executemany("INSERT INTO project (uid, name) VALUES (?, ?)", projects)
    for statement in (_EXPERIMENTS, _CHECKPOINTS, _FILES):
        db.execute(statement, {name: value for name, value in known.items() if f":{name}" in statement})
    for statement in _OTHERS:
        db.execute(statement)
