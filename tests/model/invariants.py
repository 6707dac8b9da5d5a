"""What must hold in every state that a power cut leaves, as questions about a tree of names and bytes."""

import hashlib
import json
from functools import lru_cache
from typing import Any

from tests.model.explore import Says, Symlink, Tree

MANIFEST = "manifest.json"
STRIPPED = "stripped.json"
_KEPT = 1 << 16


@lru_cache(_KEPT)
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@lru_cache(_KEPT)
def _files_of(text: bytes) -> tuple[tuple[str, int, str], ...] | None:
    try:
        found = json.loads(text)
        return tuple((each["path"], each["size_bytes"], each["sha256"]) for each in found["files"])
    except (ValueError, KeyError, TypeError):
        return None


def damage(tree: Tree, path: str) -> str:
    """Say what keeps the directory at `path` from being a whole checkpoint; "" when nothing does."""
    text = tree.get(f"{path}/{MANIFEST}")
    if not isinstance(text, bytes):
        return f"{path} has no manifest"
    files = _files_of(text)
    if files is None:
        return f"the manifest of {path} is damaged"
    away = _stripped(tree.get(f"{path}/{STRIPPED}"))
    for name, size_bytes, digest in files:
        data = tree.get(f"{path}/{name}")
        if data is None and f"{path}/{name}" not in tree and name in away:
            continue
        if not isinstance(data, bytes):
            return f"{path}/{name} is not there"
        if len(data) != size_bytes or sha256(data) != digest:
            return f"{path}/{name} is damaged"
    return ""


def _stripped(text: Any) -> list[str]:
    """Files that stripped.json beside a manifest names: they may be away."""
    try:
        return list(json.loads(text)["files"]) if isinstance(text, bytes) else []
    except (ValueError, KeyError, TypeError):
        return []


def final_names(tree: Tree, directory: str) -> list[str]:
    """Directories in `directory` that stand under a name of their own: neither temporary nor hidden."""
    inside = f"{directory}/"
    names = (path.removeprefix(inside) for path, found in tree.items() if found is None and path.startswith(inside))
    return [f"{directory}/{name}" for name in names if "/" not in name and not name.startswith(".")]


def whole_or_absent(tree: Tree, directory: str) -> str:
    """I2: a final name holds a complete checkpoint or does not exist."""
    return next((f"I2: {why}" for name in final_names(tree, directory) if (why := damage(tree, name))), "")


def said(says: Says, what: str) -> list[Any]:
    """The facts of every promise of this kind, oldest first."""
    return [say.fact for say in says if say.what == what]


def target_of(tree: Tree, path: str) -> str | None:
    """Where the symlink at `path` leads; None when there is none."""
    found = tree.get(path)
    return str(found) if isinstance(found, Symlink) else None
