"""Counts and percentiles in bounded memory, compared with sorting everything (M088)."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.query.distribution import BUCKETS, ERROR, LOWEST_S, STEPS_PER_DOUBLING, Distribution
from ckptd.query.statistics import EXPERIMENTS_MAX, HOUR_S, HOURS, SLOT_S, SLOTS, Statistics

TOP_S = LOWEST_S * 2 ** (BUCKETS / STEPS_PER_DOUBLING)
DURATIONS = st.lists(st.floats(LOWEST_S, TOP_S * 0.99), min_size=1, max_size=200)


def filled(durations) -> Distribution:
    found = Distribution()
    for took_s in durations:
        found.add(took_s)
    return found


@settings(max_examples=120)
@given(DURATIONS, st.sampled_from((0.0, 0.5, 0.95, 0.99, 1.0)))
def test_a_percentile_is_that_of_all_durations_within_the_error_that_is_said(durations, share):
    exact = sorted(durations)[max(math.ceil(share * len(durations)), 1) - 1]
    found = filled(durations).percentile(share)
    assert found is not None
    assert exact / ERROR / 1.0001 <= found <= exact * ERROR * 1.0001


@given(DURATIONS, DURATIONS)
def test_two_merged_are_one_that_saw_both(first, second):
    merged, both = filled(first), filled(first + second)
    merged.merge(filled(second))
    assert merged.counts == both.counts
    assert math.isclose(merged.sum_s, both.sum_s)
    assert (merged.min_s, merged.max_s, merged.count) == (both.min_s, both.max_s, len(first) + len(second))


def test_what_is_too_short_or_too_long_is_counted_all_the_same():
    found = filled([-1.0, 0.0, 1e-9, 1e9])
    assert (found.count, found.min_s, found.max_s) == (4, 0.0, 1e9)
    assert found.percentile(1.0) is not None
    assert Distribution().percentile(0.5) is None


@given(DURATIONS, st.integers(0, BUCKETS // STEPS_PER_DOUBLING))
def test_how_many_took_at_most_a_limit_is_exact_at_powers_of_two(durations, power):
    limit_s = LOWEST_S * 2**power
    (found,) = filled(durations).at_most([limit_s])
    at_edge = sum(math.isclose(took_s, limit_s, rel_tol=1e-9) for took_s in durations)
    assert abs(found - sum(took_s < limit_s for took_s in durations)) <= at_edge


def test_a_window_adds_up_the_minutes_that_it_reaches_into():
    figures = Statistics()
    for minute in range(5):
        figures.count("saves", minute * SLOT_S, by=minute + 1)
        figures.time("stall", minute + 1.0, minute * SLOT_S)
    assert figures.since(3 * SLOT_S).counts["saves"] == 4 + 5
    assert figures.since(3 * SLOT_S + 1).counts["saves"] == 4 + 5, "a minute that has begun counts whole"
    assert figures.since(3 * SLOT_S).took["stall"].max_s == 5.0
    assert figures.total.counts["saves"] == 15


def test_a_window_beyond_the_last_minutes_adds_up_the_hours_that_it_reaches_into_and_loses_nothing():
    figures = Statistics()
    hours = 20
    for minute in range(hours * 60):
        figures.count("saves", minute * SLOT_S)
    assert figures.since(0.0).counts["saves"] == hours * 60
    assert figures.since(5.5 * HOUR_S).counts["saves"] == 15 * 60, "an hour that has begun counts whole"
    assert figures.since((hours - 1) * HOUR_S).counts["saves"] == 60


def test_memory_is_bounded_whatever_happens():
    figures = Statistics()
    for minute in range(3 * HOURS * 60):
        figures.count("saves", minute * SLOT_S)
    assert len(figures._slots) <= SLOTS
    assert len(figures._hours) <= HOURS + 1
    for number in range(3 * EXPERIMENTS_MAX):
        figures.stalled(f"e{number}", 0.1, 0.0)
        figures.client(f"e{number}", 1)
    assert len(figures._experiments) == len(figures.clients_rss_bytes) == EXPERIMENTS_MAX
    assert figures.of_experiment("e0") is None
    assert figures.of_experiment(f"e{3 * EXPERIMENTS_MAX - 1}") is not None


def test_what_saving_costs_is_the_share_of_the_time_between_the_first_and_the_last_step():
    figures = Statistics()
    figures.stalled("e", 100.0, 0.0)  # before any step: of the start, not of a step
    figures.stepped("e", 10, 1000.0)
    figures.stalled("e", 3.0, 1010.0)
    figures.stepped("e", 30, 1060.0)
    figures.stepped("e", 20, 1070.0)  # an evaluation that logs late
    training = figures.of_experiment("e")
    assert training is not None
    assert (training.step_s, training.cost) == (3.0, 0.05)
    figures.restarted("e")
    figures.stepped("e", 10, 2000.0)
    assert (training.step_s, training.cost) == (None, None)
