"""What people ask about the best: the places on the boards, and a decision from scratch."""

from ckptd.catalog import audits, figures
from ckptd.catalog.audits import Deed
from ckptd.catalog.tx import Tx
from ckptd.errors import NotFound
from ckptd.intake import bestrequests as ask
from ckptd.intake.fields import Request
from ckptd.intake.follow import visible_to
from ckptd.intake.listener import Peer
from ckptd.intake.training import Answer, Front, Handler
from ckptd.pipeline import winners
from ckptd.pipeline.tools import Tools
from ckptd.query.boards import Asked, boards


class Besting:
    """One method per op."""

    def __init__(self, front: Front, tools: Tools) -> None:
        """Keep what the methods work with."""
        self._front = front
        self._tools = tools
        self.handlers: dict[type[Request], Handler] = {ask.Best: self.best, ask.Recompute: self.recompute}

    async def best(self, peer: Peer, request: ask.Best) -> Answer:
        """Page through experiments, newest first, with the boards of each."""
        wanted = Asked(
            uid=visible_to(peer.uid),
            project=request.project,
            name=request.name,
            rule=request.rule,
            places=request.places,
            after=request.after,
        )
        return await self._front.catalog.read(lambda conn: boards(conn, wanted))

    async def recompute(self, peer: Peer, request: ask.Recompute) -> Answer:
        """Decide every board again from everything that takes part; say which were other than that."""
        catalog = self._front.catalog
        rows = await catalog.read(
            lambda conn: figures.matching(conn, request.project, request.name, visible_to(peer.uid))
        )
        if request.name is not None and not rows:
            raise NotFound(f"there is no experiment {request.project or '*'}/{request.name}")
        found = []
        for experiment_id, project, name in rows:
            changed = await self._recomputed(peer, (experiment_id, project, name), dry_run=request.dry_run)
            if changed:
                found.append({"experiment": experiment_id, "project": project, "name": name, "changed": changed})
        return {"looked_at": len(rows), "experiments": found, "dry_run": request.dry_run}

    async def _recomputed(self, peer: Peer, row: tuple[str, str, str], *, dry_run: bool) -> list[str]:
        experiment_id, project, name = row
        rules = self._front.settings().rules_for(project, name)
        # Read first: nearly always all is as it should be, and that costs no transaction.
        changed = await self._front.catalog.read(lambda conn: winners.differing(conn, experiment_id, rules))
        if dry_run or not changed:
            return changed

        async def decide(tx: Tx) -> list[str]:
            done = await winners.recompute(tx, experiment_id, rules)
            if done:
                await winners.link_again(self._tools, tx, experiment_id)
                deed = Deed(uid=peer.uid, pid=peer.pid, verb="best.recompute", subject=experiment_id)
                await audits.record(tx, deed)
            return done

        return await self._front.catalog.write(decide)
