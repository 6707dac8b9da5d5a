"""The soak's short forms, and that its judges see what they are there for. M091."""

import dataclasses
from collections import Counter

import pytest

from tests.soak import report
from tests.soak.audit import audit
from tests.soak.faults import faults, schedule
from tests.soak.ledger import Ledger
from tests.soak.meter import Sample
from tests.soak.slope import interval, percent_per_hour, theil_sen
from tests.soak.soak import Outcome, Plan, Soak

FAST = {"phase_s": 5.0, "pause_s": 0.3, "fault_s": 0.8, "warm_s": 1.0, "sample_s": 0.5, "restore_s": 0.5, "pace": 0.1}
SHORT = Plan(seconds=5.0, seed=1, old_events=False, **FAST)
HOUR = Plan(seconds=3600.0, seed=1)
MIB = 1 << 20


def at(minutes: float, anon_mib: float, descriptors: int = 50, *, passing_mib: int = 0) -> Sample:
    size_bytes = int(anon_mib * MIB)
    return Sample(
        at_s=minutes * 60,
        processes=3,
        rss_bytes=size_bytes,
        anon_bytes=size_bytes,
        arenas_bytes=0,
        descriptors=descriptors,
        threads=20,
        anon_by_role={"daemon": size_bytes, "parser": passing_mib * MIB},
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("soak")
def test_a_node_under_load_and_faults_keeps_every_promise() -> None:
    """F1, F2, F6, F12, F17, F18, F22, F27 at once; afterwards a lost save and a flipped bit are both seen."""
    with Soak(SHORT) as soak:
        outcome = soak.run()
        print(report.render(outcome))
        if report.verdict(outcome):
            print(soak.ground.tail())
        assert report.verdict(outcome) == []
        assert outcome.saves > 3
        assert outcome.restores > 0
        assert outcome.files > 0
        assert sum(outcome.faults.values()) > 0
        check_that_the_audit_sees(soak)


def check_that_the_audit_sees(soak: Soak) -> None:
    """Take one save's bytes, promise another that was never made: the audit names both, and nothing else."""
    soak.ledger.intend("kept-torch", 10_000, 1).level = "durable"
    row = next(row for row in soak.ground.rows("soak", "kept-torch") if row["state"] == "live")
    with open(f"{row['path']}/model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    found = audit(soak.ground, soak.ledger, soak.parts)
    assert any("kept-torch step 10000" in each and "is lost" in each for each in found)
    assert any(row["path"] in each and "digest" in each for each in found)
    assert all("step 10000" in each or row["path"] in each for each in found), found


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_three_minutes_of_load_and_every_fault() -> None:
    with Soak(Plan(seconds=180.0, seed=2)) as soak:
        outcome = soak.run()
        print(report.render(outcome))
        assert report.verdict(outcome) == []
        assert outcome.saves > 150
        assert outcome.restores > 10


def test_the_slope_is_that_of_the_line_whatever_a_few_samples_say() -> None:
    line = [(float(x), 100.0 + 2.0 * x) for x in range(50)]
    wild = [(x, y if x % 7 else 100_000.0) for x, y in line]
    assert theil_sen(line) == 2.0
    assert theil_sen(wild) == pytest.approx(2.0, rel=0.1)
    low, high = interval(wild)
    assert low <= theil_sen(wild) <= high
    assert theil_sen([(float(x), 5.0) for x in range(2000)]) == 0.0


def test_a_slope_is_told_in_percent_per_hour() -> None:
    points = [(60.0 * minute, 100.0 * MIB * (1 + 0.02 * minute / 60)) for minute in range(60)]
    assert percent_per_hour(points)[0] == pytest.approx(2.0, rel=0.02)
    with pytest.raises(ValueError, match="two points"):
        theil_sen([(1.0, 1.0)])


@pytest.mark.parametrize(
    ("samples", "plan", "why"),
    [
        ([at(m, 100) for m in range(60)], HOUR, ""),
        ([at(m, 100 + m / 10) for m in range(60)], HOUR, "memory grows"),
        ([at(m, 100 + m / 10) for m in range(60)], dataclasses.replace(HOUR, seconds=600.0), ""),
        ([at(m, 50 if m < 30 else 100) for m in range(60)], HOUR, ""),  # the first half is not judged
        ([at(m, 100, passing_mib=m) for m in range(60)], HOUR, ""),  # nor is what comes and goes
    ],
)
def test_memory_that_grows_fails_a_long_run_and_only_a_long_one(samples: list[Sample], plan: Plan, why: str) -> None:
    outcome = Outcome(plan, at_rest=samples, steady_from_s=30 * 60.0)
    assert " ".join(report.verdict(outcome)).startswith(why)
    assert bool(report.verdict(outcome)) == bool(why)


def test_the_course_of_what_is_judged_is_told() -> None:
    """A cache that fills and then is full, and a leak, may have the same slope."""
    outcome = Outcome(HOUR, at_rest=[at(m, 100 + min(m, 40)) for m in range(60)], steady_from_s=30 * 60.0)
    assert "132.0, 137.0, 140.0, 140.0, 140.0, 140.0 MiB" in report.render(outcome)


def test_what_is_in_use_is_told_beside_what_is_held() -> None:
    """Memory that only its gaps keep is no leak."""
    held = [dataclasses.replace(at(m, 100 + m), in_use_bytes=50 * MIB) for m in range(60)]
    assert "+0.00 %/h of 50.0 MiB" in report.render(Outcome(HOUR, at_rest=held, steady_from_s=30 * 60.0))
    filling = [dataclasses.replace(one, sqlite_bytes=(6 + n) * MIB) for n, one in enumerate(held)]
    said = report.render(Outcome(HOUR, at_rest=filling, steady_from_s=30 * 60.0)).splitlines()
    assert "of 50.5 MiB" in next(line for line in said if "SQLite" in line)
    unsaid = report.render(Outcome(HOUR, at_rest=[*held[:-1], at(59, 159)], steady_from_s=30 * 60.0))
    assert "in use by the daemon" in unsaid
    assert "not measured" in unsaid.partition("in use by the daemon")[2].splitlines()[0]


def test_descriptors_that_stay_open_and_violations_fail_any_run() -> None:
    plan = dataclasses.replace(HOUR, seconds=1.0)
    assert report.verdict(Outcome(plan, base=at(0, 1, 50), end=at(9, 1, 52))) == []
    assert report.verdict(Outcome(plan, base=at(0, 1, 50), end=at(9, 1, 53))) == ["3 descriptors more than at the base"]
    assert report.verdict(Outcome(plan, violations=["a", "b"])) == ["2 violations"]


def test_a_rung_that_is_taken_back_is_a_violation() -> None:
    ledger = Ledger()
    entry = ledger.intend("run", 1, 10)
    ledger.told(entry, {"id": "a", "level": "durable", "state": "live", "spooled": False})
    ledger.told(entry, {"id": "a", "level": "staged", "state": "live", "spooled": False})
    assert ledger.wrong == ["run step 1 was durable and is told to be staged"]


def test_the_same_seed_is_the_same_schedule_and_every_fault_has_its_turn() -> None:
    import random

    class Bare:
        small_is_mounted = True

    known = faults(Bare())  # type: ignore[arg-type]
    orders = [
        [fault.name for fault, _ in zip(schedule(known, random.Random(s)), range(3 * len(known)), strict=False)]
        for s in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert set(Counter(orders[0]).values()) == {3}
