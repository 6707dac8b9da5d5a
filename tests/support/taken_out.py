"""Which files of a checkpoint were taken out of it, as the disk and the catalog say."""

import sqlite3
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

File = tuple[str, int, str]  # path, size, SHA-256


def named(manifest: Mapping[str, Any], away: Collection[str]) -> list[File]:
    """The files that a manifest names, but those that are away."""
    found = [(file["path"], file["size_bytes"], file["sha256"]) for file in manifest["files"]]
    return [file for file in found if file[0] not in away]


def recorded(raw: sqlite3.Connection) -> dict[int, set[str]]:
    """The files that the catalog says were taken out, or are on the move, by their checkpoint's sequence."""
    found: dict[int, set[str]] = defaultdict(set)
    for number, name in raw.execute("SELECT checkpoint_no, path FROM file WHERE stripped"):
        found[number].add(name)
    return found
