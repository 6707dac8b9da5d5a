"""A tree of many small whole files, and a catalog that knows them all already."""

import os
import sqlite3
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import create_engine

from ckptd.catalog import schema, versions
from ckptd.model import new_id

FILES_EACH = 100  # of one directory
_HEADER = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
SMALL = struct.pack("<Q", len(_HEADER)) + _HEADER + struct.pack("<f", 1.0)  # the smallest whole safetensors file
_COLUMNS = (
    "id, uid, project_no, experiment_no, segment, root_no, state, level, level_rank, is_good, origin, path, path_key, step, revision,"
    "size_bytes, format, created_at, metrics, note, meta, tags, update_best, manifest_sha256, dev, ino, inode_size_bytes, mtime_ns, ctime_ns"
)


def grow(root: Path, count: int) -> None:
    """Write `count` small files, a hundred to a directory."""
    for number in range(count):
        directory = root / f"run-{number // FILES_EACH}"
        if number % FILES_EACH == 0:
            directory.mkdir(parents=True)
        fd = os.open(directory / f"model_{number}.safetensors", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, SMALL)
        os.close(fd)


def know(catalog: Path, root: Path, uid: int) -> int:
    """Make a catalog in which every file under `root` is verified, as it lies there now; return how many there are."""
    engine = create_engine(f"sqlite:///{catalog}")
    with engine.begin() as made:
        versions.create(made)
    engine.dispose()
    now_us = time.time_ns() // 1000
    with sqlite3.connect(catalog) as db:
        db.execute(
            "INSERT INTO root (path, path_key, kind, uid, project, allow_delete, allow_links, added_at) VALUES (?, ?, 'watched', ?, 'known', 0, 0, ?)",
            (str(root), schema.path_key(str(root)), uid, now_us),
        )
        db.execute("INSERT INTO project (uid, name) VALUES (?, 'known')", (uid,))
        marks = ", ".join("?" * (_COLUMNS.count(",") + 1))
        count = db.executemany(
            f"INSERT INTO checkpoint ({_COLUMNS}) VALUES ({marks})", _rows(db, root, uid, now_us)
        ).rowcount
    db.close()
    return count


def _rows(db: sqlite3.Connection, root: Path, uid: int, now_us: int) -> Iterator[tuple[object, ...]]:
    for number, directory in enumerate(sorted(os.listdir(root)), start=1):
        db.execute(
            "INSERT INTO experiment (no, id, uid, project_no, name, status, segment, root, config, tags, facts, created_at, heartbeat_at)"
            " VALUES (?, ?, ?, 1, ?, 'completed', 1, ?, '{}', '[]', '{}', ?, ?)",
            (number, new_id(), uid, directory, str(root), now_us, now_us),
        )
        for entry in os.scandir(root / directory):
            seen = entry.stat()
            step = int(entry.name.removeprefix("model_").removesuffix(".safetensors"))
            yield (
                new_id(), uid, 1, number, 1, 1, "live", "verified", 3, 1, "watch", entry.path, schema.path_key(entry.path), step, 1,
                seen.st_size, "safetensors", now_us, "{}", "", "{}", "[]", 1, "", seen.st_dev, seen.st_ino, seen.st_size,
                seen.st_mtime_ns, seen.st_ctime_ns,
            )  # fmt: skip
