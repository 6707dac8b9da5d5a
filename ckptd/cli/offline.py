"""The catalog, read by this process while no daemon runs. Reads only, and answers as the daemon would.

Imported only then: SQLAlchemy comes along. What only a running daemon knows (which checkpoints have
a hot copy) is missing from the answers.
"""

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import anyio
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd import config, origins
from ckptd.catalog import (
    bests,
    checkpoints,
    eventlog,
    experiments,
    figures,
    holds,
    hookruns,
    listing,
    open_reader,
    selectors,
)
from ckptd.clock import SystemClock
from ckptd.errors import BadConfig, NotFound, Unreachable
from ckptd.intake import describe
from ckptd.intake.sweeprequests import Recovery
from ckptd.intake.sweeps import after_bad_end, recover
from ckptd.model import Checkpoint, Level, State
from ckptd.query.boards import Asked as AskedOfBoards
from ckptd.query.boards import boards
from ckptd.query.grid import Asked, grid
from ckptd.query.totals import totals
from ckptd_client import places
from ckptd_client.wire import number

CATALOG = "catalog.sqlite"
FILES_SHOWN_MAX = 1000

Fields = Mapping[str, Any]
Answer = dict[str, Any]


def find_catalog() -> str | None:
    """Return the path of this user's catalog, None when there is none."""
    try:
        state_dir = str(origins.places().state_dir)
    except BadConfig:
        # A broken configuration must not hide the checkpoints: look where they are by default.
        state_dir = places.state_dir()
    path = os.path.join(state_dir, CATALOG)
    return path if os.path.isfile(path) else None


class OfflineCatalog:
    """A reading.Source over a catalog file. Operations that need a daemon raise the Unreachable it was made with."""

    kind: ClassVar[str] = "catalog"

    def __init__(self, path: str, gone: Unreachable) -> None:
        """Remember where to read, and what to say about the rest."""
        self._path = Path(path)
        self._gone = gone
        self._answers: dict[str, Callable[[AsyncConnection, Fields], Awaitable[Answer]]] = {
            "list": _list,
            "experiments": _experiments,
            "show": _show,
            "resolve": _resolve,
            "summary": _summary,
            "grid": _grid,
            "best": _best,
            "recovery": _recovery,
        }

    def __enter__(self) -> Self:
        """Nothing is open between requests."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open between requests."""

    def request(self, op: str, fields: Fields | None = None) -> Answer:
        """Answer one operation; fields that are None are left out.

        NotFound, Ambiguous, BadRequest as the daemon would say; CatalogFault when the file is damaged.
        """
        if op not in self._answers:
            raise self._gone
        given = {name: value for name, value in (fields or {}).items() if value is not None}
        return anyio.run(self._read, self._answers[op], given)

    async def _read(self, answer: Callable[[AsyncConnection, Fields], Awaitable[Answer]], fields: Fields) -> Answer:
        async with open_reader(self._path, config.Catalog()) as catalog:
            return await catalog.read(lambda conn: answer(conn, fields))


async def _list(conn: AsyncConnection, fields: Fields) -> Answer:
    state = fields.get("state")
    wanted = listing.Filter(
        **{key: fields[key] for key in ("project", "name", "tag", "sort", "limit", "after") if key in fields},
        state=None if state in {None, "all"} else State(state),
        ended=state == "all",
        level=Level(fields["level"]) if "level" in fields else None,
    )
    page = await listing.find(conn, wanted)
    return {"checkpoints": [await _checkpoint(conn, row) for row in page.checkpoints], "next": page.next}


async def _checkpoint(conn: AsyncConnection, row: Checkpoint, *, meta: bool = False) -> Answer:
    newest = await listing.latest(conn, row.experiment_id)
    winners = await bests.of_checkpoints(conn, [row.id])
    kept = await holds.of_checkpoint(conn, row.id, SystemClock().now())
    words = describe.hold_words(row, None if newest is None else newest.id, winners, kept)
    return describe.checkpoint(row, words, hot=False, meta=meta)


async def _best(conn: AsyncConnection, fields: Fields) -> Answer:
    return await boards(conn, AskedOfBoards(**fields))


async def _summary(conn: AsyncConnection, fields: Fields) -> Answer:
    return await totals(conn, project=fields.get("project"), name=fields.get("name"))


async def _grid(conn: AsyncConnection, fields: Fields) -> Answer:
    wanted = {key: fields[key] for key in ("project", "tag", "parent", "metric", "limit") if key in fields}
    return await grid(conn, Asked(**wanted, silent_s=config.Intake().lost_after_s), SystemClock().now())


async def _recovery(conn: AsyncConnection, fields: Fields) -> Answer:
    return await recover(conn, Recovery(id=0, **fields), None)


async def _experiments(conn: AsyncConnection, fields: Fields) -> Answer:
    after = fields.get("after")
    rows, cursor = await experiments.page(conn, limit=fields["limit"], after=None if after is None else int(after))
    wanted = fields.get("project")
    shown = [await _experiment(conn, row) for row in rows if wanted is None or row.project == wanted]
    return {"experiments": shown, "next": None if cursor is None else str(cursor)}


async def _experiment(conn: AsyncConnection, row: experiments.Experiment) -> Answer:
    winners = (await bests.firsts(conn, [row.id])).get(row.id, [])
    won = await checkpoints.get_many(conn, [winner.checkpoint_id for winner in winners])
    best = [
        {
            "rule": winner.rule,
            "metric": winner.metric,
            "mode": winner.mode,
            "checkpoint": winner.checkpoint_id,
            "step": won[winner.checkpoint_id].step,
            "value": number(winner.value),
        }
        for winner in winners
        if winner.checkpoint_id in won
    ]
    counts = await figures.on_disk(conn, experiment_id=row.id)
    return describe.experiment(row, await listing.latest(conn, row.id), best, counts)


async def _select(conn: AsyncConnection, fields: Fields) -> Checkpoint:
    scope = selectors.Scope(project=fields.get("project"), name=fields.get("name"))
    return await selectors.resolve(conn, fields["selector"], scope)


async def _resolve(conn: AsyncConnection, fields: Fields) -> Answer:
    row = await _select(conn, fields)
    wanted = Level(fields["level"])
    if row.level.rank < wanted.rank or row.state is not State.LIVE:
        raise NotFound(f"checkpoint {row.id} (step {row.step}) is {row.state}, {row.level}; {wanted} was asked for")
    whole = describe.checkpoint(row, [], hot=False)
    keys = "checkpoint experiment project name step path level state size_bytes format metrics".split()  # noqa: SIM905  reads as the reply does
    return {key: whole[key] for key in keys}


async def _show(conn: AsyncConnection, fields: Fields) -> Answer:
    row = await _select(conn, fields)
    files = await checkpoints.files(conn, row.id)
    kept = await holds.of_checkpoint(conn, row.id, SystemClock().now())
    logged = await eventlog.page(conn, checkpoint_id=row.id, limit=100)
    experiment = await experiments.get(conn, row.experiment_id)
    return {
        "checkpoint": await _checkpoint(conn, row, meta=True),
        "experiment": await _experiment(conn, experiment),
        "findings": [describe.finding(one) for one in await hookruns.findings(conn, row.id)],
        "recovery": await after_bad_end(conn, experiment),
        "files": [{"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in files[:FILES_SHOWN_MAX]],
        "files_total": len(files),
        "holds": [
            {"kind": hold.kind, "by": hold.by, "note": hold.note, "at": None, "expires_at": describe.at(hold.until)}
            for hold in kept
        ],
        "copies": [],
        "history": [
            {"at": describe.at(entry.at), "what": entry.event.name.removeprefix("checkpoint."), "by": "", "detail": ""}
            for entry in logged
        ],
    }
