"""Limits of [alerts]: told once when passed, once when no longer, and never for what nobody could look at (M089, M202)."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.catalog import eventlog
from ckptd.config import Alerts as Limits
from ckptd.intake.alerts import RELAXED, Alerts, Readings, judge
from tests.support.in_process import Training, daemon

GIB = 1 << 30
CALM = Readings(rss_bytes=1, backlog_jobs=0, backlog_age_s=0.0, corrupt=0)
LIMITS = Limits(
    rss_bytes_max=100, backlog_jobs_max=10, backlog_age_s=60, disk_free_bytes_min=1000, disk_free_share_min=0.1,
    stalled_s=60,
)  # fmt: skip


def names(seen: Readings, limits: Limits = LIMITS, raised=()) -> set[tuple[str, str]]:
    return {alert.key for alert in judge(limits, seen, raised)}


def test_each_limit_has_its_alert():
    assert names(CALM) == set()
    assert names(replace(CALM, rss_bytes=101)) == {("rss", "")}
    assert names(replace(CALM, backlog_jobs=11)) == {("backlog", "")}
    assert names(replace(CALM, backlog_age_s=61.0)) == {("backlog_age", "")}
    assert names(replace(CALM, corrupt=1)) == {("corrupt", "")}
    assert names(replace(CALM, stalled={"e": (61.0, "p/n"), "f": (59.0, "p/m")})) == {("stalled", "e")}
    disks = {"/a": (999, 5000), "/b": (1001, 5000), "/c": (4999, 50_000)}
    assert names(replace(CALM, disks=disks)) == {("disk", "/a"), ("disk", "/c")}


def test_a_limit_of_nothing_is_switched_off():
    off = Limits(
        rss_bytes_max=0, backlog_jobs_max=0, backlog_age_s=0, disk_free_bytes_min=0, disk_free_share_min=0,
        corrupt=False, stalled_s=0,
    )  # fmt: skip
    worst = Readings(10 * GIB, 10**6, 1e6, {"/a": (0, 1)}, 9, {"e": (1e6, "p/n")})
    assert names(worst, off) == set()
    assert len(names(worst)) == 6


@settings(max_examples=100)
@given(st.lists(st.integers(90, 110), min_size=1, max_size=50))
def test_a_value_that_plays_about_its_limit_is_told_once(values):
    """It ends below RELAXED of the limit, and not before."""
    raised: set[tuple[str, str]] = set()
    told = 0
    for value in values:
        found = names(replace(CALM, rss_bytes=value), raised=raised)
        told += bool(found - raised)
        raised = found
    bound = 1 + sum(value <= 100 * RELAXED for value in values)
    assert told <= bound


def test_a_disk_is_well_again_only_with_some_room_to_spare():
    low = replace(CALM, disks={"/a": (999, 5000)})
    back = replace(CALM, disks={"/a": (1010, 5000)})
    well = replace(CALM, disks={"/a": (1100, 5000)})
    raised = names(low)
    assert names(back, raised=raised) == raised
    assert names(back) == set()
    assert names(well, raised=raised) == set()


async def told(node) -> list[tuple[str, str, str]]:
    logged = await node.read(lambda conn: eventlog.page(conn, since=0, limit=500))
    return [
        (one.event.name, one.event.data["alert"], one.event.experiment)
        for one in logged
        if one.event.name.startswith("alert.")
    ]


async def test_an_alert_is_an_event_and_a_trouble_for_as_long_as_it_lasts(short_dir):
    """M202: in the log once when it begins and once when it ends; in status and doctor in between."""
    limits = {"look_s": 3600, "backlog_jobs_max": 0, "disk_free_share_min": 0, "disk_free_bytes_min": 0}
    async with daemon(short_dir, front=False, alerts={**limits, "rss_bytes_max": 1}) as node, node.connect() as line:
        alerts = node.parts.observers.alerts
        await alerts.look()
        await alerts.look()
        assert await told(node) == [("alert.raised", "rss", "")]
        status = await line.ask("status")
        assert [t["what"] for t in status["daemon"]["degraded"] if t["what"].startswith("alert")] == ["alert rss"]
        checks = {check["name"]: check for check in (await line.ask("doctor"))["checks"]}
        assert checks["alert rss"]["status"] == "warn"
        calm = node.parts.admission.current.model_copy(update={"alerts": Limits(look_s=3600, rss_bytes_max=0)})
        node.parts.admission.current = calm
        await alerts.look()
        assert (await told(node))[1:] == [("alert.cleared", "rss", "")]
        assert not any(trouble.what.startswith("alert") for trouble in node.parts.troubles.now())


async def test_a_running_experiment_without_a_further_step_is_stalled_until_it_makes_one(short_dir):
    limits = {"look_s": 3600, "stalled_s": 0.000001}
    async with daemon(short_dir, front=False, alerts=limits) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        alerts: Alerts = node.parts.observers.alerts
        await line.ask("experiment.beat", experiment=training.experiment, step=7)
        await alerts.look()
        await alerts.look()
        assert [one for one in await told(node) if one[1] == "stalled"] == [
            ("alert.raised", "stalled", training.experiment)
        ]
        await line.ask("experiment.beat", experiment=training.experiment, step=8)
        await alerts.look()
        assert ("alert.cleared", "stalled", training.experiment) in await told(node)


async def test_what_could_not_be_looked_at_is_neither_raised_nor_cleared(short_dir):
    limits = {"look_s": 3600, "disk_free_bytes_min": "1P", "rss_bytes_max": 0}
    async with daemon(short_dir, front=False, alerts=limits) as node, node.connect() as line:
        await Training(line, str(node.runs)).open()
        alerts: Alerts = node.parts.observers.alerts
        await node.parts.observers.status.usage(str(node.runs))
        await alerts.look()
        assert {name for name, _ in alerts.raised} == {"disk"}

        async def nothing() -> list[dict[str, object]]:
            return []

        alerts._status.disks = nothing  # type: ignore[method-assign]
        await alerts.look()
        assert {name for name, _ in alerts.raised} == {"disk"}
        assert [one[0] for one in await told(node)] == ["alert.raised"]
