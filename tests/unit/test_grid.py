"""How a sweep is doing: progress, time left, silence, from real rows and from facts alone. M061"""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.catalog import Catalog, experiments, metrics
from ckptd.catalog.experiments import Experiment
from ckptd.catalog.metrics import Point
from ckptd.errors import NotFound
from ckptd.hooks.builtin.notices import Silence
from ckptd.hooks.context import Context
from ckptd.hooks.result import Level
from ckptd.model import ExperimentStatus
from ckptd.query.grid import Asked, Facts, grid, row_of, summary, total_of
from tests.support.catalog import StillClock, experiment, opened, saved

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def facts(*, seen_s: float = 1.0, ran_s: float = 1000.0, **more: Any) -> Facts:
    about = {"config": {"max_steps": 4000}, "last_step": 1000, "segment": 1, "status": ExperimentStatus.RUNNING, **more}
    extra = {key: about.pop(key) for key in ("epoch", "stalled", "start_step") if key in about}
    began = NOW - timedelta(seconds=ran_s)
    seen = NOW - timedelta(seconds=seen_s)
    one = Experiment(
        id="e" * 32, uid=1, project="p", name="n", root="/r", created_at=began, heartbeat_at=seen, **about
    )  # fmt: skip
    return Facts(one, began, extra.pop("start_step", None), extra.get("epoch"), extra.get("stalled"))


def test_progress_rate_and_time_left_follow_from_steps():
    row = row_of(facts(seen_s=0.0), NOW, 60)
    assert (row["condition"], row["progress"], row["steps_per_s"], row["eta_s"]) == ("running", 0.25, 1.0, 3000.0)


def test_a_resumed_run_is_measured_from_where_it_went_on():
    row = row_of(facts(segment=2, start_step=900, seen_s=0.0), NOW, 60)
    assert (row["steps_per_s"], row["eta_s"]) == (0.1, 30000.0)
    assert row_of(facts(segment=2), NOW, 60)["eta_s"] is None  # where it began is not known


def test_epochs_count_where_no_number_of_steps_is_configured():
    row = row_of(facts(config={"train": {"epochs": 10}}, epoch=4.0, seen_s=0.0), NOW, 60)
    assert (row["progress"], row["unit"]) == (0.4, "epochs")
    assert row["eta_s"] == 1500.0  # six epochs of 250 steps


def test_a_run_that_says_nothing_is_silent_and_has_no_time_left():
    row = row_of(facts(seen_s=61.0), NOW, 60)
    assert (row["condition"], row["eta_s"], row["silent_s"]) == ("silent", None, 61.0)


def test_a_run_that_lives_and_makes_no_step_is_stalled_until_the_next_one():
    stalled = (NOW - timedelta(seconds=100), 1000)
    assert row_of(facts(stalled=stalled), NOW, 60)["condition"] == "stalled"
    assert row_of(facts(stalled=stalled, last_step=1001), NOW, 60)["condition"] == "running"
    earlier = (NOW - timedelta(seconds=2000), 1000)  # in the segment before
    assert row_of(facts(stalled=earlier), NOW, 60)["condition"] == "running"


@pytest.mark.parametrize("status", [ExperimentStatus.LOST, ExperimentStatus.FAILED, ExperimentStatus.COMPLETED])
def test_what_has_ended_is_neither_silent_nor_running(status):
    row = row_of(facts(status=status, seen_s=1e6), NOW, 60)
    assert (row["condition"], row["silent_s"], row["eta_s"]) == (str(status), None, None)


@pytest.mark.parametrize(
    ("config", "total"),
    [
        ({"max_steps": 10}, (10.0, "steps")),
        ({"trainer.max-steps": 10}, (10.0, "steps")),
        ({"epochs": 3, "a": {"b": {"total_steps": 7}}}, (7.0, "steps")),
        ({"max_steps": -1, "num_train_epochs": 3}, (3.0, "epochs")),
        ({"steps": True, "epochs": float("inf")}, (None, "steps")),
        ({}, (None, "steps")),
    ],
)
def test_how_far_it_is_meant_to_go_is_read_from_its_config(config, total):
    assert total_of(config) == total


DRAWN = st.tuples(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.none() | st.integers(0, 10**6),
    st.floats(-100, 10**7),
    st.floats(-100, 10**7),
    st.none() | st.floats(0, 1e3),
    st.sampled_from(list(ExperimentStatus)),
    st.dictionaries(
        st.sampled_from(["max_steps", "epochs", "x"]), st.integers(-5, 10**6) | st.sampled_from(["", "ten"])
    ),
)


@given(DRAWN)
def test_no_facts_give_a_progress_beyond_its_end_or_a_negative_time(drawn):
    """Also with clocks that were set, steps that went back, and configs that say anything."""
    last_step, segment, start, seen_s, ran_s, epoch, status, config = drawn
    given_facts = facts(
        last_step=last_step, segment=segment, start_step=start, seen_s=seen_s, ran_s=ran_s, epoch=epoch,
        status=status, config=config,
    )  # fmt: skip
    row = row_of(given_facts, NOW, 60)
    assert row["progress"] is None or 0 <= row["progress"] <= 1
    assert row["eta_s"] is None or row["eta_s"] >= 0
    assert row["steps_per_s"] is None or row["steps_per_s"] > 0
    assert summary([row])["by_condition"] == {row["condition"]: 1}


@pytest.fixture
def clock() -> StillClock:
    return StillClock()


@pytest.fixture
async def catalog(tmp_path, clock):
    async with opened(tmp_path / "catalog.sqlite", None, clock) as found:
        yield found


async def asked(catalog: Catalog, clock: StillClock, **wanted: Any) -> dict[str, Any]:
    return await catalog.read(lambda conn: grid(conn, Asked(**wanted), clock.now()))


async def test_a_sweep_is_found_by_tag_parent_and_project(catalog: Catalog, clock: StillClock):
    root = await experiment(catalog, "root", project="a")
    branch = await saved(catalog, root, 10)
    await experiment(catalog, "by-id", project="a", parent_id=root, tags=("sweep",))
    await experiment(catalog, "by-checkpoint", project="a", parent_id=branch.id, tags=("sweep",))
    await experiment(catalog, "other", project="b", tags=("sweep",))

    async def names(**wanted: Any) -> set[str]:
        return {row["name"] for row in (await asked(catalog, clock, **wanted))["rows"]}

    assert await names(tag="sweep") == {"by-id", "by-checkpoint", "other"}
    assert await names(parent=root) == await names(parent="a/root") == {"by-id", "by-checkpoint"}
    assert await names(project="b") == {"other"}
    assert await names(uid=1) == set()
    with pytest.raises(NotFound):
        await names(parent="a/nothing")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"project": "demmo"}, "of project 'demmo'"),
        ({"tag": "sweep8"}, "with tag 'sweep8'"),
        ({"parent": "f" * 32}, f"grown from {'f' * 32!r}"),
        ({"project": "b", "tag": "sweep"}, "of project 'b' with tag 'sweep'"),
    ],
)
async def test_a_sweep_that_is_not_there_is_an_error_that_names_what_is(
    catalog: Catalog, clock: StillClock, wanted: dict[str, str], says: str
):
    for n in range(10):
        await experiment(catalog, f"lr{n}", project="demo", tags=("sweep", f"seed{n}"))
    await experiment(catalog, "alone", project="b")
    with pytest.raises(NotFound) as caught:
        await asked(catalog, clock, **wanted)
    assert caught.value.message == f"there is no experiment {says}"
    hint = "there are projects: b, demo; tags: "
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(hint)
    assert caught.value.hint.endswith("and 3 more. `ckpt experiments` lists them")
    with pytest.raises(NotFound) as caught:
        await asked(catalog, clock, uid=1, **wanted)
    assert caught.value.hint == "there is no experiment yet. `ckpt experiments` lists them", (
        "another user's are not named"
    )


async def test_the_grid_counts_its_dead_and_shows_a_metric(catalog: Catalog, clock: StillClock):
    runs = [await experiment(catalog, f"lr{n}", tags=("sweep",), config={"max_steps": 1000}) for n in range(4)]
    clock.pass_s(100)
    for run in runs[:3]:
        await catalog.write(lambda tx, run=run: experiments.heartbeat(tx, run, 500))
    await catalog.write(lambda tx: experiments.set_status(tx, runs[1], ExperimentStatus.LOST))
    data = {"project": "demo", "name": "lr2", "step": 500, "quiet_s": 3600.0}
    await catalog.write(lambda tx: _tell(tx, runs[2], data))
    points = [Point(name="loss", step=5, value=value, at=clock.now()) for value in (3.0, float("nan"))]
    await catalog.write(lambda tx: metrics.append(tx, runs[0], 1, points))
    found = await asked(catalog, clock, tag="sweep", metric="loss")
    assert {row["name"]: row["condition"] for row in found["rows"]} == {
        "lr0": "running",
        "lr1": "lost",
        "lr2": "stalled",
        "lr3": "silent",
    }
    assert found["summary"]["by_condition"] == {"running": 1, "stalled": 1, "silent": 1, "lost": 1}
    assert found["rows"][0]["eta_s"] == found["summary"]["eta_s"] == 100.0
    assert found["rows"][0]["metric"] == {"name": "loss", "last": "NaN", "min": 3.0, "max": 3.0, "nonfinite": 1}


async def _tell(tx, run, data):
    tx.tell("experiment.stalled", data, experiment=run)


async def test_more_than_fit_are_said_to_be_there(catalog: Catalog, clock: StillClock):
    for n in range(3):
        await experiment(catalog, f"run{n}")
    found = await asked(catalog, clock, limit=2)
    assert (len(found["rows"]), found["more"]) == (2, True)
    assert (await asked(catalog, clock, limit=3))["more"] is False


def test_the_hook_marks_the_dead_of_a_sweep():
    data = {"project": "p", "name": "n", "step": 7, "quiet_s": 99.0}
    for event, level in (("experiment.lost", Level.ERROR), ("experiment.stalled", Level.WARNING)):
        found = Silence().execute(Context(event, "k", NOW, "e" * 32, "", data))
        assert (found.level, found.text) == (level, f"{event} p/n at step 7")
        assert found.facts == data
