"""Points of metrics and their summaries."""

import math
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.catalog import Catalog, columns, metrics
from ckptd.catalog.metrics import Point
from ckptd.errors import NotFound
from ckptd.model import new_id
from tests.support.catalog import experiment

AT = datetime(2030, 1, 1, tzinfo=UTC)


async def log(catalog: Catalog, known: str, segment: int, *points: tuple[str, int | None, float]) -> None:
    made = [Point(name, step, value, AT) for name, step, value in points]
    assert await catalog.write(lambda tx: metrics.append(tx, known, segment, made)) == len(points)


async def steps(catalog: Catalog, known: str, name: str, *, hidden: bool = False) -> list[int | None]:
    return [p.step for p in await catalog.read(lambda conn: metrics.series(conn, known, name, hidden=hidden))]


async def test_nan_and_infinities_come_back_as_they_were(catalog: Catalog) -> None:
    """M112 and row 4 of the list: SQLite alone would turn NaN into NULL."""
    known = await experiment(catalog)
    values = [math.nan, math.inf, -math.inf, 0.1, 5e-324, 1.7976931348623157e308]
    await log(catalog, known, 1, *[("loss", step, value) for step, value in enumerate(values)])
    found = await catalog.read(lambda conn: metrics.series(conn, known, "loss"))
    assert [repr(point.value) for point in found] == [repr(value) for value in values]


async def test_last_min_and_max_are_one_row_and_only_finite_values_are_extreme(catalog: Catalog) -> None:
    """M112."""
    known = await experiment(catalog)
    await log(catalog, known, 1, ("loss", 1, 3.0), ("loss", 2, math.inf), ("loss", 3, 1.0))
    await log(catalog, known, 1, ("loss", 4, 2.0), ("loss", 5, math.nan), ("acc", None, 0.5))
    found = await catalog.read(lambda conn: metrics.summaries(conn, known))
    loss = found["loss"]
    assert (loss.count, loss.nonfinite) == (5, 2)
    assert (loss.min, loss.min_step, loss.max, loss.max_step) == (1.0, 3, 3.0, 1)
    assert math.isnan(loss.last)
    assert loss.last_step == 5
    assert (found["acc"].last, found["acc"].last_step) == (0.5, None)


async def test_a_point_that_arrives_late_is_not_the_last_one(catalog: Catalog) -> None:
    known = await experiment(catalog)
    await log(catalog, known, 1, ("loss", 10, 1.0))
    await log(catalog, known, 1, ("loss", 9, 7.0))
    found = (await catalog.read(lambda conn: metrics.summaries(conn, known)))["loss"]
    assert (found.last, found.last_step, found.max) == (1.0, 10, 7.0)


async def test_a_resume_hides_what_it_overtakes_and_destroys_nothing(catalog: Catalog) -> None:
    """Design 7: points after step S of the older segment are hidden, and the summaries follow."""
    known = await experiment(catalog)
    await log(catalog, known, 1, *[("loss", step, 10.0 - step) for step in range(1, 7)])
    await experiment(catalog)
    await catalog.write(lambda tx: metrics.resume_from(tx, known, 2, 3))
    assert await steps(catalog, known, "loss") == [1, 2, 3]
    assert await steps(catalog, known, "loss", hidden=True) == [1, 2, 3, 4, 5, 6]
    found = (await catalog.read(lambda conn: metrics.summaries(conn, known)))["loss"]
    assert (found.count, found.min, found.min_step, found.last_step) == (3, 7.0, 3, 3)
    await log(catalog, known, 2, ("loss", 4, 1.5), ("loss", 5, 1.0))
    assert await steps(catalog, known, "loss") == [1, 2, 3, 4, 5]
    found = (await catalog.read(lambda conn: metrics.summaries(conn, known)))["loss"]
    assert (found.count, found.last, found.min_step, found.max_step) == (5, 1.0, 5, 1)


async def test_an_older_process_that_still_talks_does_not_count(catalog: Catalog) -> None:
    known = await experiment(catalog)
    await log(catalog, known, 1, ("loss", 1, 1.0))
    await experiment(catalog)
    await catalog.write(lambda tx: metrics.resume_from(tx, known, 2, 1))
    await log(catalog, known, 1, ("loss", 50, -9.0))
    found = (await catalog.read(lambda conn: metrics.summaries(conn, known)))["loss"]
    assert (found.count, found.min, found.last_step) == (1, 1.0, 1)
    assert await steps(catalog, known, "loss") == [1]


async def test_a_second_resume_from_an_earlier_step_hides_more(catalog: Catalog) -> None:
    known = await experiment(catalog)
    await log(catalog, known, 1, *[("loss", step, 0.0) for step in range(1, 10)])
    await experiment(catalog)
    await catalog.write(lambda tx: metrics.resume_from(tx, known, 2, 6))
    await log(catalog, known, 2, ("loss", 7, 1.0), ("loss", 8, 1.0))
    await experiment(catalog)
    await catalog.write(lambda tx: metrics.resume_from(tx, known, 3, 2))
    assert await steps(catalog, known, "loss") == [1, 2]
    assert len(await steps(catalog, known, "loss", hidden=True)) == 11


async def test_tail_gives_what_arrived_since(catalog: Catalog) -> None:
    """M111."""
    known = await experiment(catalog)
    await log(catalog, known, 1, ("a", 1, 1.0), ("b", 1, 2.0))
    first = await catalog.read(lambda conn: metrics.tail(conn, known))
    await log(catalog, known, 1, ("a", 2, 3.0))
    second = await catalog.read(lambda conn: metrics.tail(conn, known, after=first[-1].id))
    assert [(p.name, p.value) for p in first] == [("a", 1.0), ("b", 2.0)]
    assert [(p.name, p.value) for p in second] == [("a", 3.0)]


async def test_a_hundred_thousand_points_are_all_there(catalog: Catalog) -> None:
    """M042: in batches, as the daemon commits them. Time is measured elsewhere; this counts."""
    known = await experiment(catalog)
    for batch in range(10):
        points = [Point(f"m{n % 5}", batch * 10_000 + n, float(n), AT) for n in range(10_000)]
        await catalog.write(lambda tx, what=points: metrics.append(tx, known, 1, what))
    found = await catalog.read(lambda conn: metrics.summaries(conn, known))
    assert sum(summary.count for summary in found.values()) == 100_000
    assert {summary.last_step for summary in found.values()} == {99_995, 99_996, 99_997, 99_998, 99_999}
    newest = await catalog.read(lambda conn: metrics.series(conn, known, "m0", limit=3))
    assert [p.step for p in newest] == [99_985, 99_990, 99_995]


async def test_points_of_an_unknown_experiment_or_segment_are_refused(catalog: Catalog) -> None:
    known = await experiment(catalog)
    for experiment_id, segment in ((new_id(), 1), (known, 2)):
        with pytest.raises(NotFound):
            await catalog.write(lambda tx, e=experiment_id, s=segment: metrics.append(tx, e, s, []))


@given(value=st.floats())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_every_float_survives_being_split(value: float) -> None:
    back = columns.join_float(*columns.split_float(value))
    assert back == value or (math.isnan(back) and math.isnan(value))
