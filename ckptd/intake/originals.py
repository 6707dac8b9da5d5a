"""Several directories, one checkpoint: which of those whose manifests name it is the one that the catalog means.

`cp -a step_1 keep_1` makes a second directory whose manifest has the same id. Nothing in it tells a copy from
the original, so the place decides: what lies where the catalog has the checkpoint (for one that it does not know:
where a publish would have put it) is the checkpoint, and the others are somebody's copies, never taken for it and
never touched. A directory elsewhere is the checkpoint only when it was moved there, so when nothing of it lies at
its place any more. That is looked up on the disk: a batch of a scan, or a scan of one directory, may have met the
copy alone, and a row that followed it would let the rules delete what somebody keeps, and forget the original.
"""

import os
from collections.abc import Callable, Sequence

import msgspec
import structlog

from ckptd.catalog import Catalog, checkpoints
from ckptd.catalog.arrivals import Recorded
from ckptd.catalog.roots import Root
from ckptd.config import Settings
from ckptd.errors import CkptdError, RootDegraded
from ckptd.intake.manifest import Manifest
from ckptd.model import step_name
from ckptd.worker import Workers
from ckptd.worker.protocol import Candidate, Scan, Settle, Settlement

log = structlog.get_logger()


def claims(found: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Return which directories each id is claimed by, in the order of their paths. What claims none is left out."""
    by_id: dict[str, list[Candidate]] = {}
    for candidate in sorted(found, key=lambda one: one.path):
        claimed = claimed_id(candidate)
        if claimed:
            by_id.setdefault(claimed, []).append(candidate)
    return by_id


def claimed_id(candidate: Candidate) -> str:
    """Return the id that a manifest claims, "" when there is none."""
    claimed = (candidate.manifest or {}).get("checkpoint")
    return claimed if isinstance(claimed, str) else ""


class Originals:
    """Tells an original from its copies, and a move from a copy."""

    def __init__(self, catalog: Catalog, workers: Workers, settings: Callable[[], Settings]) -> None:
        """Keep what it asks."""
        self._catalog = catalog
        self._workers = workers
        self._settings = settings

    async def choose(self, root: Root, claiming: Sequence[Candidate], recorded: Recorded | None) -> Candidate | None:
        """Return the directory that is the checkpoint; None when that can't be said now, or is another root's to say.

        claiming  the directories of one id, in the order of their paths: of several copies without an original the
                  first is taken, and then is the original
        Raises what the worker raises for `root`.
        """
        home = recorded.path if recorded is not None and recorded.path else _published_at(root, claiming[0])
        at_home = next((one for one in claiming if one.path == home), None)
        if at_home is not None or not home:
            return at_home or claiming[0]
        home_root = root.path
        if recorded is not None:
            row = await self._catalog.read(lambda conn: checkpoints.get(conn, recorded.id))
            home_root = row.root or root.path
        try:
            found = await self._at(home_root, home)
        except CkptdError as error:
            if home_root == root.path:
                raise
            if error.code in {"not_found", "missing"}:
                return claiming[0]  # the whole tree that it lay in is gone
            log.warning("original.unseen", path=home, seen=claiming[0].path, **error.to_wire())
            return None  # one hung disk hangs one disk
        if found is None:
            return claiming[0]
        claimed = claimed_id(found)
        if claimed == claimed_id(claiming[0]):
            return found if home_root == root.path else None
        return claiming[0] if claimed else None  # with no id to read, it may be this one, damaged

    async def _at(self, root: str, path: str) -> Candidate | None:
        """Return what lies at a path: None when no checkpoint of ours does; without a manifest when it can't be read."""
        settled: Settlement = await self._workers.call(Settle(root=root, path=path, quiet_s=0.0, told=True))
        # Asked first, since it lists no directory: a scan lists each on its way, for each of a thousand moved ones.
        if settled.reason == "gone" or settled.reason.startswith("refused"):
            return None
        found: list[Candidate] = []
        scan = Scan(root=root, managed=True, under=path, entries_max=self._settings().watching.entries_max)
        async with self._workers.parts(scan) as parts:
            async for part in parts:
                found += [one for one in part.found if one.path == path]
            complete = parts.reply.complete
        if not found and not complete:
            raise RootDegraded(f"{path} can't be looked at: is it still the checkpoint that is elsewhere, too?")
        return found[0] if found else None


def _published_at(root: Root, candidate: Candidate) -> str:
    """Where the checkpoint was published under this root, as its manifest says; "" when it does not."""
    try:
        said = msgspec.convert(candidate.manifest, Manifest)
    except msgspec.ValidationError:
        return ""
    return os.path.join(root.path, said.project, said.experiment, step_name(said.step, said.revision, said.checkpoint))
