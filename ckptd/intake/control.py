"""What people ask through `ckpt` and only want to know: lists, one checkpoint, the log, who did what."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import audits, bests, checkpoints, eventlog, experiments, figures, holds, hookruns, listing, metrics
from ckptd.catalog.listing import Filter
from ckptd.errors import BadRequest, NotFound
from ckptd.intake import describe, sweeps
from ckptd.intake import requests as ask
from ckptd.intake.follow import visible_to, wire_event
from ckptd.intake.listener import Peer
from ckptd.intake.recall import UNSEEN_WITH_CHECKPOINTS, Expiry, Recall
from ckptd.intake.training import Answer, Front, Handler, select
from ckptd.model import Checkpoint, Level, State, is_id
from ckptd.query.totals import totals
from ckptd_client.wire import number

T = TypeVar("T", State, Level)
FILES_SHOWN_MAX = 1000
REPLY_BYTES_MAX = 900_000  # below a frame's limit, so that the envelope fits
CURSOR_DIGITS_MAX = 18
EVERY = "all"  # in the place of a state


class Control:
    """One method per reading op; commands.py has the acting ones."""

    def __init__(self, front: Front) -> None:
        """Keep what the methods look at."""
        self._front = front
        self.recall = Recall(front.catalog, front.clock, front.settings().catalog)
        self.handlers: dict[type[ask.Request], Handler] = {
            ask.List: self.page,
            ask.Experiments: self.page_experiments,
            ask.Summary: self.summary,
            ask.Show: self.show,
            ask.Events: self.events,
            ask.Audit: self.audit,
            ask.Tail: self.tail,
            **sweeps.Sweeps(front).handlers,
        }

    async def page(self, peer: Peer, request: ask.List) -> Answer:
        """Page through checkpoints."""
        wanted = Filter(
            uid=visible_to(peer.uid),
            project=request.project,
            name=request.name,
            state=None if request.state in {None, EVERY} else _one_of(State, request.state),
            ended=request.state == EVERY,
            level=None if request.level is None else _one_of(Level, request.level),
            tag=request.tag,
            sort=request.sort,
            limit=request.limit,
            after=request.after,
        )

        edition = self.recall.edition(UNSEEN_WITH_CHECKPOINTS)

        async def read(conn: AsyncConnection, expiry: Expiry) -> Answer:
            page = await listing.find(conn, wanted)
            described = await self._described(conn, page.checkpoints, expiry)
            fitting = fit(described)
            if len(fitting) == len(described):
                return {"checkpoints": described, "next": page.next}
            # The rows left out are found again, with the cursor that a page of just these rows has.
            shorter = await listing.find(conn, replace(wanted, limit=len(fitting)))
            return {"checkpoints": fitting, "next": shorter.next}

        found = await self.recall.read(_key(peer, request), edition, read)
        for row in found["checkpoints"]:
            row["hot"] = self._is_hot(row["checkpoint"])  # of this moment, wherever the rest comes from
        return found

    def _is_hot(self, checkpoint_id: str) -> bool:
        return self._front.pool.of_checkpoint(checkpoint_id) is not None

    async def _described(self, conn: AsyncConnection, rows: list[Checkpoint], expiry: Expiry) -> list[dict[str, Any]]:
        """Describe rows; what holds them is looked up for the whole page at once, however many experiments it shows."""
        ids = [row.id for row in rows]
        newest = await listing.latest_of(conn, list({row.experiment_id for row in rows}))
        winners = await bests.of_checkpoints(conn, ids)
        held = await holds.of_checkpoints(conn, ids, self._front.clock.now())
        expiry.add(hold.until for hold in held)
        return [
            describe.checkpoint(
                row, describe.hold_words(row, row.id if row.id in newest else None, winners, held), hot=False
            )
            for row in rows
        ]

    async def page_experiments(self, peer: Peer, request: ask.Experiments) -> Answer:
        """Page through experiments."""
        uid = visible_to(peer.uid)
        after = None if request.after is None else page_number(request.after)

        async def read(conn: AsyncConnection, _expiry: Expiry) -> Answer:
            which = experiments.Which(uid=uid, project=request.project)
            rows, cursor = await experiments.page(conn, which, limit=request.limit, after=after)
            shown = fit(await self._experiments(conn, rows))
            if len(shown) < len(rows):
                cursor = rows[len(shown) - 1].sequence
            return {"experiments": shown, "next": None if cursor is None else str(cursor)}

        return await self.recall.read(_key(peer, request), self.recall.edition(), read)

    async def _experiments(self, conn: AsyncConnection, rows: Sequence[experiments.Experiment]) -> list[dict[str, Any]]:
        """Describe experiments; the newest, the best and the sums of all of them are looked up at once."""
        ids = [row.id for row in rows]
        firsts = await bests.firsts(conn, ids)
        newest = await listing.latest_of(conn, ids)
        winners = {winner.checkpoint_id for found in firsts.values() for winner in found}
        known = await checkpoints.get_many(conn, sorted(newest | winners))
        newest_of = {known[checkpoint].experiment_id: known[checkpoint] for checkpoint in newest if checkpoint in known}
        counts = await figures.on_disk_each(conn, [row.sequence for row in rows])
        return [
            describe.experiment(row, newest_of.get(row.id), _best(firsts.get(row.id, []), known), counts[row.sequence])
            for row in rows
        ]

    async def summary(self, peer: Peer, request: ask.Summary) -> Answer:
        """Counts, sizes, the newest, the oldest and the best."""
        uid = visible_to(peer.uid)
        return await self.recall.read(
            _key(peer, request),
            self.recall.edition(UNSEEN_WITH_CHECKPOINTS),
            lambda conn, _expiry: totals(conn, uid, request.project, request.name),
        )

    async def show(self, peer: Peer, request: ask.Show) -> Answer:
        """Everything about one checkpoint."""
        edition = self.recall.edition()
        row = await select(self._front, peer, request)

        async def read(conn: AsyncConnection, expiry: Expiry) -> Answer:
            now = self._front.clock.now()
            files = await checkpoints.files(conn, row.id)
            experiment = await experiments.get(conn, row.experiment_id)
            winners = await bests.of_checkpoints(conn, [row.id])
            newest = await listing.latest(conn, row.experiment_id)
            kept = await holds.of_checkpoint(conn, row.id, now)
            expiry.add(hold.until for hold in kept)
            words = describe.hold_words(row, None if newest is None else newest.id, winners, kept)
            logged = await eventlog.page(conn, checkpoint_id=row.id, limit=100)
            spelled = [
                {"kind": h.kind, "by": h.by, "note": h.note, "at": None, "expires_at": describe.at(h.until)}
                for h in kept
            ]
            spelled += [
                {"kind": word, "by": "", "note": "", "at": None, "expires_at": None}
                for word in words
                if word == "latest" or word.startswith("best:")
            ]
            return {
                "checkpoint": describe.checkpoint(row, words, hot=False, meta=True),
                "experiment": (await self._experiments(conn, [experiment]))[0],
                "files": [
                    {"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in files[:FILES_SHOWN_MAX]
                ],
                "files_total": len(files),
                "holds": spelled,
                "copies": [
                    {
                        "tier": "local",
                        "location": row.path,
                        "checked_at": describe.at(row.verified_at),
                        "ok": None if row.verified_at is None else row.state is State.LIVE,
                    }
                ],
                "history": [
                    {
                        "at": describe.at(entry.at),
                        "what": entry.event.name.removeprefix("checkpoint."),
                        "by": "",
                        "detail": str(entry.event.data.get("why", "")),
                    }
                    for entry in logged
                ],
                "findings": [describe.finding(one) for one in await hookruns.findings(conn, row.id)],
                "recovery": await sweeps.after_bad_end(conn, experiment),
            }

        found = await self.recall.read(f"show {row.id}".encode(), edition, read)
        found["checkpoint"]["hot"] = self._is_hot(row.id)
        return found

    async def events(self, peer: Peer, request: ask.Events) -> Answer:
        """Recent events; those to come follow as pushes after the answer, when asked for, none twice."""
        uid = visible_to(peer.uid)

        async def read(conn: AsyncConnection) -> list[eventlog.Logged]:
            since = request.since if request.since_seq is None else request.since_seq
            if since is None:
                return await eventlog.newest(conn, request.limit, uid)
            return await eventlog.page(conn, since=since, limit=request.limit, uid=uid)

        if request.follow:
            self._front.followers.listen(peer)
        logged = await self._front.catalog.read(read)
        shown = [{**wire_event(entry.event), "seq": entry.sequence, "at": describe.at(entry.at)} for entry in logged]
        fitting = fit(shown)
        forwards = request.since_seq is not None or request.since is not None
        if not forwards and len(fitting) < len(shown):
            shown.reverse()
            fitting = fit(shown)[::-1]
        full = forwards and (len(logged) == request.limit or len(fitting) < len(logged))
        last = fitting[-1]["seq"] if fitting else request.since_seq or 0
        if request.follow and peer.group is not None:
            # A task begins after this one has sent the answer: pushes never overtake it.
            peer.group.start_soon(self._front.followers.begin, peer, last)
        return {"events": fitting, "next": last if full else None}

    async def audit(self, peer: Peer, request: ask.Audit) -> Answer:
        """Who did what, newest first; of others' deeds only the operator hears."""
        after = None if request.after is None else page_number(request.after)
        entries, cursor = await self._front.catalog.read(
            lambda conn: audits.page(conn, limit=request.limit, after=after, uid=visible_to(peer.uid))
        )
        shown = fit([_deed(entry) for entry in entries])
        if len(shown) < len(entries):
            cursor = entries[len(shown) - 1].id
        return {"entries": shown, "next": None if cursor is None else str(cursor)}

    async def tail(self, peer: Peer, request: ask.Tail) -> Answer:
        """Metric points that arrived after a cursor, oldest first."""
        row = await self._front.catalog.read(lambda conn: _experiment_of(conn, visible_to(peer.uid), request))
        points = await self._front.catalog.read(
            lambda conn: metrics.tail(conn, row.id, request.after or 0, request.limit)
        )
        shown = [
            {"id": p.id, "name": p.name, "step": p.step, "value": number(p.value), "at": describe.at(p.at)}
            for p in points
        ]
        return {"points": shown, "next": points[-1].id if points else request.after}


def _key(peer: Peer, request: ask.Request) -> bytes:
    """Return what two askers must have in common to be given the same answer."""
    return f"{visible_to(peer.uid)} ".encode() + msgspec.json.encode(msgspec.structs.replace(request, id=0))


async def _experiment_of(conn: AsyncConnection, uid: int | None, request: ask.Tail) -> experiments.Experiment:
    if request.experiment is not None:
        row: experiments.Experiment | None = await experiments.get(conn, request.experiment)
    elif request.project is not None and request.name is not None:
        row = await experiments.find(conn, uid, request.project, request.name)
    else:
        raise BadRequest("project and name, or experiment, say whose metrics")
    if row is None or uid not in {None, row.uid}:
        raise NotFound(f"there is no experiment {request.experiment or f'{request.project}/{request.name}'}")
    return row


def _best(winners: Sequence[bests.Best], known: Mapping[str, Checkpoint]) -> list[dict[str, Any]]:
    return [
        {
            "rule": winner.rule,
            "metric": winner.metric,
            "mode": winner.mode,
            "checkpoint": winner.checkpoint_id,
            "step": known[winner.checkpoint_id].step,
            "value": number(winner.value),
        }
        for winner in winners
        if winner.checkpoint_id in known
    ]


def _deed(entry: audits.Entry) -> dict[str, Any]:
    """Return an entry of the trail. What is no checkpoint (a root, a project) is named by `subject` alone."""
    deed = entry.deed
    return {
        "entry": entry.id,
        "at": describe.at(entry.at),
        "uid": deed.uid,
        "pid": deed.pid,
        "action": deed.verb,
        "subject": deed.subject,
        "checkpoint": deed.subject if is_id(deed.subject) else None,
        "experiment": None,
        "before": deed.before,
        "after": deed.after,
        "note": deed.note,
    }


def fit(shown: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return as many of the objects, from the first, as fit into one reply; always at least one."""
    size_bytes = 0
    fitting: list[dict[str, Any]] = []
    for one in shown:
        size_bytes += len(json.dumps(one, separators=(",", ":")))
        if fitting and size_bytes > REPLY_BYTES_MAX:
            break
        fitting.append(one)
    return fitting


def _one_of(kind: type[T], text: str) -> T:
    try:
        return kind(text)
    except ValueError as error:
        raise BadRequest(f"{text!r} is none of {', '.join(kind)}") from error


def page_number(cursor: str) -> int:
    """Return the row number that a cursor names. BadRequest when it is none."""
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= CURSOR_DIGITS_MAX):
        raise BadRequest(f"{cursor!r} is no cursor")
    return int(cursor)
