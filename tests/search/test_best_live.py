"""The best, kept up save by save in the catalog, against a recomputation and against the pure rule, over random histories.

A history saves, tells metrics late and again, damages, loses, restores, relabels and moves checkpoints,
retires what has no place as retention does, and changes rules. After every act all boards must hold
what a recomputation from all rows says.
"""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from sqlalchemy import select

from ckptd.best import contender, decide
from ckptd.bestrule import BestRule, Term
from ckptd.catalog import Catalog, bests, checkpoints, contenders, experiments, schema
from ckptd.catalog.checkpoint_rows import SELECT, from_row
from ckptd.catalog.relabel import Said, relabel
from ckptd.catalog.tx import Tx
from ckptd.model import Checkpoint, Damage, State
from ckptd.pipeline import winners
from ckptd.rules import Rules
from tests.support.catalog import a_checkpoint, an_experiment, an_identity, climb, opened

ACTS, ACTS_SHORT = 45, 26
SEEDS_SHORT, SEEDS_LONG = 2, 120
LOOKS_SHORT, LOOKS_LONG = 12, 3  # acts from one look to the next, which costs ten times what an act does


def the_rules() -> list[BestRule]:
    """Every kind of rule, every scope."""
    both = (Term(metric="loss", mode="min", scale=0.5), Term(metric="acc", mode="max", scale=0.25))
    plain = (Term(metric="loss", mode="min", tolerance=0.5), Term(metric="acc", mode="max"))
    return [
        BestRule(metric="loss", mode="min", k=2),
        BestRule(metric="acc", mode="max", name="steady", min_delta=0.5, k=2),
        BestRule(metric="loss", mode="min", name="overall", scope="project"),
        BestRule(metric="loss", mode="min", name="bar", scope="project", min_delta=0.5),
        BestRule(metric="acc", mode="max", name="line", scope="tree", k=2),
        BestRule(name="sum", by="weighted", terms=both, min_delta=0.25),
        BestRule(name="words", by="lexicographic", terms=plain, k=2, scope="project"),
        BestRule(name="front", by="pareto", terms=both, scope="tree"),
        BestRule(name="few", by="pareto", terms=both, k=2),
    ]


class History:
    """One project while things happen to it."""

    def __init__(self, catalog: Catalog, seed: int) -> None:
        self.catalog = catalog
        self.chance = Random(seed)
        self.project = f"p{seed}"
        self.experiments: list[str] = []
        self.rules: dict[str, Rules] = {}
        self.known: list[str] = []

    async def begin(self) -> None:
        """A trunk, a child of it, a grandchild that branched from a checkpoint, and a stranger."""
        await self._open("trunk", None)
        await self._open("child", self.experiments[0])
        await self._save(self.experiments[1])
        await self._open("twig", self.known[0])
        await self._open("other", None)

    async def _open(self, name: str, parent: str | None) -> None:
        new = an_experiment(name, self.project, parent_id=parent)
        row = await self.catalog.write(lambda tx: experiments.open_experiment(tx, new))
        self.experiments.append(row.experiment.id)
        self.rules[row.experiment.id] = rules = Rules(keep_best=tuple(the_rules()))
        await self.catalog.write(lambda tx: winners.opened(tx, row.experiment.id, rules))

    async def act(self) -> str:
        """Do one thing; return what it was."""
        acts = [self._save] * 5 + [self._late] * 3
        acts += [self._damage, self._lose, self._restore, self._relabel, self._retire, self._retire, self._change_rules]
        chosen = self.chance.choice(acts)
        await chosen()
        return chosen.__name__

    def _value(self) -> float:
        return self.chance.choice([self.chance.randrange(9) / 4, float("nan"), float("inf"), self.chance.random() * 2])

    def _metrics(self) -> dict[str, float]:
        return {name: self._value() for name in ("loss", "acc") if self.chance.random() < 0.8}

    async def _refresh(self, tx: Tx, row: Checkpoint) -> None:
        await winners.refresh_best(tx, row, self.rules[row.experiment_id])

    async def _save(self, experiment: str | None = None) -> None:
        of = experiment or self.chance.choice(self.experiments)
        new = a_checkpoint(
            of,
            self.chance.choice([None, self.chance.randrange(40)]),
            segment=self.chance.randint(1, 2),
            metrics=self._metrics(),
            update_best=self.chance.random() < 0.9,
        )

        async def save(tx: Tx) -> None:
            await self._refresh(tx, await climb(tx, new))

        await self.catalog.write(save)
        self.known.append(new.id)

    async def _one_in(self, *states: State) -> Checkpoint | None:
        rows = await self.catalog.read(lambda conn: checkpoints.get_many(conn, self.known))
        fit = [rows[one] for one in self.known if rows[one].state in states]
        return self.chance.choice(fit) if fit else None

    async def _late(self) -> None:
        row = await self._one_in(State.LIVE, State.TRASHED)
        if row is None:
            return

        async def tell(tx: Tx) -> None:
            await self._refresh(tx, await checkpoints.add_metrics(tx, row.id, self._metrics()))

        await self.catalog.write(tell)

    async def _damage(self) -> None:
        row = await self._one_in(State.LIVE, State.CORRUPT)
        if row is None:
            return

        async def read_back(tx: Tx) -> None:
            if row.state is State.CORRUPT:
                await self._refresh(tx, await checkpoints.mark_verified(tx, row.id))
            else:
                await self._refresh(tx, await checkpoints.mark_corrupt(tx, row.id, [Damage("f", "bytes", "", (), ())]))

        await self.catalog.write(read_back)

    async def _lose(self) -> None:
        row = await self._one_in(State.LIVE)
        if row is None:
            return

        async def lose(tx: Tx) -> None:
            await checkpoints.mark_missing(tx, row.id, "gone")
            await winners.lost(tx, [row.id])

        await self.catalog.write(lose)

    async def _restore(self) -> None:
        row = await self._one_in(State.MISSING, State.TRASHED)
        if row is None:
            return

        async def restore(tx: Tx) -> None:
            found = an_identity(ino=self.chance.choice([row.sequence, 99999]))
            after = await checkpoints.mark_restored(tx, row.id, row.path, found)
            await self._refresh(tx, after)

        await self.catalog.write(restore)

    async def _relabel(self) -> None:
        row = await self._one_in(State.LIVE)
        if row is None:
            return
        to = self.chance.choice(self.experiments)

        async def say(tx: Tx) -> None:
            target = await experiments.get(tx.conn, to)
            step = self.chance.choice([None, self.chance.randrange(40)])
            said = Said(experiment=target, step=step, metrics=self._metrics(), update_best=self.chance.random() < 0.8)
            after = await relabel(tx, row.id, said)
            if after.experiment_id != row.experiment_id:
                await winners.moved(tx, row, after)
            await self._refresh(tx, after)

        await self.catalog.write(say)

    async def _retire(self) -> None:
        """As retention does it: nothing that has a place, and the boards are not asked."""
        row = await self._one_in(State.LIVE)
        if row is None or not row.is_good:
            return

        async def retire(tx: Tx) -> None:
            if await bests.of_checkpoints(tx.conn, [row.id]):
                return
            await checkpoints.mark_trashed(tx, row.id, row.id, "no rule")
            if self.chance.random() < 0.5:
                await checkpoints.mark_dropped(tx, row.id)

        await self.catalog.write(retire)

    async def _change_rules(self) -> None:
        of = self.chance.choice(self.experiments)
        chosen = [rule for rule in the_rules() if self.chance.random() < 0.8]
        if chosen and self.chance.random() < 0.5:
            chosen[0] = chosen[0].model_copy(update={"k": self.chance.randint(1, 3)})
        self.rules[of] = Rules(keep_best=tuple(chosen))
        await self.catalog.write(lambda tx: winners.recompute(tx, of, self.rules[of]))

    # -- what must be so ------------------------------------------------------------------------------

    async def check(self, after: str) -> None:
        """All boards of the project hold what the pure rule says, and a recomputation changes no row."""
        await self.catalog.write(lambda tx: self._check(tx, after))

    async def _check(self, tx: Tx, after: str) -> None:
        live = await self._rows(tx)
        everything = [from_row(row) for row in await tx.conn.execute(SELECT)]
        mine = [one for one in everything if one.project == self.project]
        for board in await self._boards(tx):
            rule = BestRule.model_validate(board.rule)
            which = await contenders.among(tx.conn, board)
            found = [contender(rule, one) for one in mine if await self._is_in(tx, one, which)]
            expected = [one.id for one in decide([one for one in found if one is not None], rule).places]
            places = (await bests.places(tx.conn, [board.no]))[board.no]
            held = [place.checkpoint_id for place in sorted(places, key=lambda place: place.rank) if place.rank]
            assert held == expected, (after, str(rule), rule.scope)
        for experiment in self.experiments:
            assert await winners.recompute(tx, experiment, self.rules[experiment]) == [], after
        assert await self._rows(tx) == live, after

    async def _boards(self, tx: Tx) -> list[bests.Board]:
        found: dict[int, bests.Board] = {}
        for experiment in self.experiments:
            where = await bests.whereabouts(tx.conn, experiment)
            assert where is not None
            found |= {board.no: board for board in await bests.boards_at(tx.conn, where)}
        return list(found.values())

    async def _is_in(self, tx: Tx, one: Checkpoint, which: contenders.Among) -> bool:
        where = await bests.whereabouts(tx.conn, one.experiment_id)
        assert where is not None
        return where.project_no == which.project_no or where.experiment_no in which.experiment_nos

    async def _rows(self, tx: Tx) -> dict[tuple[int, int], tuple[Any, ...]]:
        rows = await tx.conn.execute(select(schema.best))
        return {
            (row.board_no, row.checkpoint_no): (row.rank, row.experiment_no, row.value, row.standing) for row in rows
        }


async def _live_through(path: Path, seeds: range, looks: int = 1, acts: int = ACTS) -> None:
    async with opened(path) as catalog:
        for seed in seeds:
            history = History(catalog, seed)
            await history.begin()
            for number in range(acts):
                act = await history.act()
                if number % looks == 0 or number == acts - 1:
                    await history.check(f"seed {seed}, act {number}: {act}")


@pytest.mark.anyio
async def test_the_live_answer_is_what_a_recomputation_says(tmp_path: Path) -> None:
    """M102, M103, M105, M106."""
    await _live_through(tmp_path / "catalog.sqlite", range(SEEDS_SHORT), LOOKS_SHORT, ACTS_SHORT)


@pytest.mark.anyio
async def test_an_earlier_bar_that_stands_in_for_the_retired_last_one_is_passed_by_value_alone(tmp_path: Path) -> None:
    """The first place is then no bar that the next one has to pass."""
    async with opened(tmp_path / "catalog.sqlite") as catalog:
        history = History(catalog, 0)
        await history.begin()
        of = history.experiments[3]
        history.rules[of] = rules = Rules(keep_best=(BestRule(metric="loss", mode="min", min_delta=0.5),))
        await catalog.write(lambda tx: winners.recompute(tx, of, rules))

        async def save(tx: Tx, step: int, loss: float) -> Checkpoint:
            row = await climb(tx, a_checkpoint(of, step, metrics={"loss": loss}))
            await winners.refresh_best(tx, row, rules)
            return row

        await catalog.write(lambda tx: save(tx, 1, 1.6))
        last = await catalog.write(lambda tx: save(tx, 2, 0.75))
        await catalog.write(lambda tx: checkpoints.mark_trashed(tx, last.id, last.id, "a person said so"))
        await catalog.write(lambda tx: winners.lost(tx, [last.id]))
        better = await catalog.write(lambda tx: save(tx, 3, 1.5))
        (place,) = [one for one in await catalog.read(lambda conn: bests.current(conn, of)) if one.rule == "loss"]
        assert place.checkpoint_id == better.id
        await history.check("the save of 1.5")


@pytest.mark.anyio
@pytest.mark.faults
@pytest.mark.timeout(900)
async def test_the_live_answer_is_what_a_recomputation_says_over_many_histories(tmp_path: Path) -> None:
    """M102, M103, M105, M106."""
    for start in range(0, SEEDS_LONG, 20):
        await _live_through(tmp_path / f"catalog-{start}.sqlite", range(1000 + start, 1000 + start + 20), LOOKS_LONG)
