"""Rows of storage roots."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import Row, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx
from ckptd.errors import NotFound
from ckptd.model import Origin, RootKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """One directory tree that ckptd manages or watches.

    mark, device  what the tree was known by when it was last seen (worker/rootmark.py); "": by nothing yet
    """

    id: int
    path: str
    kind: RootKind
    uid: int
    project: str
    allow_delete: bool
    allow_links: bool
    added_at: datetime
    reconciled_at: datetime | None = None
    mark: str = ""
    device: int = 0

    @property
    def may_link(self) -> bool:
        """Whether ckptd may place `latest` and `best` here."""
        return self.kind is RootKind.MANAGED or self.allow_links

    def may_remove(self, origin: Origin) -> bool:
        """Whether ckptd may remove a checkpoint here: what it wrote itself, and others' files by permission only."""
        ours = origin in {Origin.MEMORY, Origin.REBUILD}
        return self.allow_delete or (self.kind is RootKind.MANAGED and ours)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRoot:
    """A root as configuration, a trainer or a person names it."""

    path: str
    kind: RootKind
    uid: int
    project: str = ""
    allow_delete: bool = False
    allow_links: bool = False


_root = schema.root.c


async def ensure(tx: Tx, new: NewRoot) -> Root:
    """Return the root at that path, made if need be; its kind and permissions become those of `new`.

    Its owner stays who named it first. Emits root.added when new.
    """
    values = {
        "kind": new.kind,
        "project": new.project,
        "allow_delete": new.allow_delete,
        "allow_links": new.allow_links,
    }
    known = await by_path(tx.conn, new.path)
    if known is not None:
        await tx.conn.execute(update(schema.root).where(_root.no == known.id).values(values))
        return await get(tx.conn, known.id)
    number = await tx.add(
        schema.root,
        path=new.path,
        path_key=schema.path_key(new.path),
        uid=new.uid,
        added_at=tx.clock.now(),
        **values,
    )
    tx.tell("root.added", {"root": new.path, "kind": str(new.kind)})
    return await get(tx.conn, number)


async def get(conn: AsyncConnection, root_id: int) -> Root:
    """Return one root. NotFound."""
    row = (await conn.execute(select(schema.root).where(_root.no == root_id))).one_or_none()
    if row is None:
        raise NotFound(f"there is no root {root_id}")
    return _from_row(row)


async def by_path(conn: AsyncConnection, path: str) -> Root | None:
    """Return the root at exactly that path."""
    wanted = select(schema.root).where(_root.path_key == schema.path_key(path))
    row = (await conn.execute(wanted)).one_or_none()
    return None if row is None else _from_row(row)


async def at_paths(conn: AsyncConnection, paths: Collection[str]) -> list[Root]:
    """Return the roots at exactly these paths (a page of them), in no order."""
    wanted = select(schema.root).where(one_of(_root.path_key, [schema.path_key(path) for path in paths]))
    return [_from_row(row) for row in await conn.execute(wanted)]


async def above(conn: AsyncConnection, path: str) -> Root | None:
    """Return the nearest root that a path lies in, itself not counted: a look-up for each directory above it."""
    found = await at_paths(conn, [str(directory) for directory in PurePosixPath(path).parents])
    return max(found, key=lambda root: len(root.path), default=None)


async def all_roots(conn: AsyncConnection) -> list[Root]:
    """Return every root, oldest first."""
    return [_from_row(row) for row in await conn.execute(select(schema.root).order_by(_root.no))]


async def mark_reconciled(tx: Tx, root_id: int) -> None:
    """Note that a scan of the root has been completed now."""
    await tx.conn.execute(update(schema.root).where(_root.no == root_id).values(reconciled_at=tx.clock.now()))


async def remember_mark(tx: Tx, path: str, mark: str, device: int) -> None:
    """Note what the root at that path is known by from now on; "": by nothing."""
    seen = {"mark": mark or None, "device": device}
    await tx.conn.execute(update(schema.root).where(_root.path_key == schema.path_key(path)).values(seen))


def _from_row(row: Row[Any]) -> Root:
    return Root(
        id=row.no,
        path=row.path,
        kind=RootKind(row.kind),
        uid=row.uid,
        project=row.project,
        allow_delete=row.allow_delete,
        allow_links=row.allow_links,
        added_at=row.added_at,
        reconciled_at=row.reconciled_at,
        mark=row.mark or "",
        device=row.device or 0,
    )
