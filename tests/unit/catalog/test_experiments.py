"""Rows of experiments."""

from datetime import timedelta

import pytest

from ckptd.catalog import Catalog, experiments
from ckptd.errors import Ambiguous, BadRequest, NotFound
from ckptd.model import ExperimentStatus, new_id
from tests.support.catalog import UID, StillClock, Told, an_experiment, experiment, saved


async def test_an_experiment_opened_again_is_the_same_one_in_a_new_segment(catalog: Catalog, told: Told) -> None:
    """M113: resuming continues the run a person knows, whatever id the new process proposed."""
    first = await catalog.write(lambda tx: experiments.open_experiment(tx, an_experiment(tags=("a",))))
    again = await catalog.write(
        lambda tx: experiments.open_experiment(tx, an_experiment(tags=("b",), config={"lr": 1}))
    )
    assert (first.existed, first.segment) == (False, 1)
    assert (again.existed, again.segment) == (True, 2)
    assert again.experiment.id == first.experiment.id
    assert again.experiment.tags == ("a", "b")
    assert again.experiment.config == {"lr": 1}
    assert told.names == ["experiment.opened", "experiment.resumed"]


async def test_a_second_process_of_the_same_run_joins_its_segment(catalog: Catalog) -> None:
    """M119: two ranks, one run."""
    first = await catalog.write(lambda tx: experiments.open_experiment(tx, an_experiment()))
    second = await catalog.write(lambda tx: experiments.open_experiment(tx, an_experiment(), join=True))
    assert second.experiment.id == first.experiment.id
    assert second.segment == 1


async def test_the_same_name_of_another_user_is_another_experiment(catalog: Catalog) -> None:
    mine = await experiment(catalog)
    theirs = await experiment(catalog, uid=UID + 1)
    assert mine != theirs
    assert (await catalog.read(lambda conn: experiments.find(conn, UID, "demo", "run"))).id == mine
    with pytest.raises(Ambiguous):
        await catalog.read(lambda conn: experiments.find(conn, None, "demo", "run"))


async def test_resume_never_and_must_are_kept(catalog: Catalog) -> None:
    with pytest.raises(NotFound):
        await experiment(catalog, resume="must")
    await experiment(catalog)
    with pytest.raises(BadRequest):
        await experiment(catalog, resume="never")
    await experiment(catalog, resume="must")


async def test_an_id_that_belongs_to_another_experiment_is_refused(catalog: Catalog) -> None:
    known = await experiment(catalog)
    with pytest.raises(BadRequest):
        await experiment(catalog, name="other", id=known)


async def test_ensure_makes_rows_for_a_descriptor_without_opening_a_segment(catalog: Catalog) -> None:
    new = an_experiment(config={"lr": 0.1}, facts={"pid": 9})
    made = await catalog.write(lambda tx: experiments.ensure(tx, new))
    again = await catalog.write(lambda tx: experiments.ensure(tx, an_experiment()))
    assert made.id == again.id == new.id
    assert (again.segment, again.config, again.facts) == (1, {"lr": 0.1}, {"pid": 9})
    assert made.status is ExperimentStatus.COMPLETED


async def test_silence_is_found_and_a_sign_of_life_brings_a_lost_one_back(
    catalog: Catalog, clock: StillClock, told: Told
) -> None:
    """M119: a lost client is noticed by its heartbeat, and may return."""
    known = await experiment(catalog, facts={"pid": 42})
    clock.pass_s(61)
    horizon = clock.now() - timedelta(seconds=60)
    silent = await catalog.read(lambda conn: experiments.silent_since(conn, horizon))
    assert [one.id for one in silent] == [known]
    await catalog.write(lambda tx: experiments.set_status(tx, known, ExperimentStatus.LOST))
    assert told.events[-1].data["pid"] == 42
    await catalog.write(lambda tx: experiments.heartbeat(tx, known, step=7))
    found = await catalog.read(lambda conn: experiments.get(conn, known))
    assert (found.status, found.last_step, found.closed_at) == (ExperimentStatus.RUNNING, 7, None)


async def test_a_heartbeat_does_not_reopen_what_was_completed(catalog: Catalog) -> None:
    known = await experiment(catalog)
    await catalog.write(lambda tx: experiments.set_status(tx, known, ExperimentStatus.COMPLETED))
    await catalog.write(lambda tx: experiments.heartbeat(tx, known))
    assert (await catalog.read(lambda conn: experiments.get(conn, known))).status is ExperimentStatus.COMPLETED


async def test_a_status_said_twice_is_told_once(catalog: Catalog, told: Told) -> None:
    known = await experiment(catalog)
    for _ in range(2):
        await catalog.write(
            lambda tx: experiments.set_status(tx, known, ExperimentStatus.FAILED, {"code": "oom", "message": "m"})
        )
    assert told.names.count("experiment.failed") == 1


async def test_tags_are_added_and_removed(catalog: Catalog) -> None:
    """M114."""
    known = await experiment(catalog, tags=("x",))
    left = await catalog.write(lambda tx: experiments.change_tags(tx, known, ["b", "a", "b"], ["x", "nothing"]))
    assert left == ("a", "b")
    assert (await catalog.read(lambda conn: experiments.get(conn, known))).tags == ("a", "b")


async def test_pages_hold_every_experiment_once_newest_first(catalog: Catalog) -> None:
    made = [await experiment(catalog, name=f"run{number}") for number in range(7)]
    seen: list[str] = []
    cursor = None
    while True:
        rows, cursor = await catalog.read(lambda conn, at=cursor: experiments.page(conn, limit=3, after=at))
        seen += [row.id for row in rows]
        if cursor is None:
            break
    assert seen == made[::-1]


async def test_the_summary_counts_states_bytes_and_branches(catalog: Catalog) -> None:
    """M118."""
    known = await experiment(catalog)
    await saved(catalog, known, 5)
    await saved(catalog, known, 6)
    child = await experiment(catalog, name="branch", parent_id=known)
    found = await catalog.read(lambda conn: experiments.summary(conn, known))
    assert found.by_state == {"live": 2}
    assert found.size_bytes == 2 * (3 << 20)
    assert (found.newest_step, found.segments, found.children) == (6, 1, (child,))


async def test_an_unknown_experiment_is_not_found(catalog: Catalog) -> None:
    with pytest.raises(NotFound):
        await catalog.read(lambda conn: experiments.get(conn, new_id()))
