"""Whatever a power cut leaves at any instant of any protocol, every promise holds (F4)."""

import itertools
from collections.abc import Iterator
from functools import cache

import pytest

from tests.model.disk import Disk, Profile
from tests.model.explore import Found, How, Says, Tree, explore
from tests.model.invariants import MANIFEST, damage
from tests.model.log import Log
from tests.model.protocols import CACHES, LARGE, LIFE, SCENARIOS
from tests.model.recover import rebuilt, recovers, shape
from tests.model.scenario import Scenario, killed_logs, logs, plain_log
from tests.support import tally

STATES_MIN = 100_000  # of the long form
SHARES = 8  # of the kills in a whole life; each is one test
RECOVERIES_MAX = 40  # states that are laid out and recovered from for each scenario of the short form


@cache
def logs_of(scenario: Scenario) -> tuple[Log, ...]:
    return tuple(logs(scenario))


def explored(scenario: Scenario, how: How) -> Found:
    found = Found()
    for log in logs_of(scenario):
        explore(log, how, scenario.check, found)
    tally.add("model states", found.states)
    tally.add("violations", len(found.violations))
    return found


@pytest.mark.parametrize("profile", Profile, ids=lambda profile: profile.value)
@pytest.mark.parametrize("scenario", [*SCENARIOS, *CACHES], ids=lambda scenario: scenario.name)
def test_no_power_cut_breaks_a_promise(scenario: Scenario, profile: Profile) -> None:
    """I1, I2, I3, I10, I11: undisturbed, killed before each of its changes, and with each of its fsyncs failing."""
    found = explored(scenario, How(profile))
    assert not found.violations, found.violations[0]
    assert not found.sampled
    assert found.states >= 4


@pytest.mark.parametrize("scenario", [*SCENARIOS, *CACHES], ids=lambda scenario: scenario.name)
def test_the_real_code_recovers_from_what_a_power_cut_left(scenario: Scenario) -> None:
    """I2, I11: asked again in such a state, it ends where it would have ended, and leaves nothing else behind."""
    for tree, says in itertools.islice(shapes(scenario), RECOVERIES_MAX):
        recovers(scenario, tree, says)


@pytest.mark.parametrize("scenario", SCENARIOS[:4], ids=lambda scenario: scenario.name)
def test_a_rebuild_after_a_power_cut_finds_what_is_whole_and_nothing_else(scenario: Scenario) -> None:
    """I5: the catalog is lost as well; what is promised is found, and no half of a checkpoint is believed."""
    for tree, says in itertools.islice(shapes(scenario), RECOVERIES_MAX):
        found = rebuilt(tree)
        assert [path for path in found if damage(tree, path)] == []
        assert {say.fact for say in says if say.what == "durable"} <= set(found)


def shapes(scenario: Scenario) -> Iterator[tuple[Tree, Says]]:
    """One tree for each shape that cuts of the undisturbed run leave, with the promises that bind then."""
    log = logs_of(scenario)[0]
    whole = frozenset(extent.data for extent in Disk.after(log, Profile.WEAKEST).extents.values())
    seen: set[object] = set()
    kept: list[tuple[Tree, Says]] = []

    def keep(tree: Tree, says: Says) -> str:
        manifests = [found for path, found in tree.items() if path.endswith(f"/{MANIFEST}")]
        if len(set(manifests)) < len(manifests):
            return ""  # one directory under two names: no file system mounts so, fsck takes one name away
        if (found := (shape(tree, whole), len(says))) not in seen:
            seen.add(found)
            kept.append((tree, says))
        return ""

    explore(log, How(Profile.WEAKEST), keep)
    return iter(kept)


@pytest.mark.parametrize("profile", Profile, ids=lambda profile: profile.value)
def test_no_power_cut_in_a_whole_life_breaks_a_promise(profile: Profile) -> None:
    """I1 to I4, I11: from the spool to the trash, with the rows that the catalog has committed by then."""
    lived_through([plain_log(LIFE)], profile)


@pytest.mark.faults
@pytest.mark.parametrize("first", range(1, SHARES + 1))
def test_no_power_cut_breaks_a_promise_after_a_daemon_was_killed_anywhere_in_its_life(first: int) -> None:
    """The next daemon recovers from what is there, and the power fails while it does."""
    for log in killed_logs(LIFE, first, SHARES):
        for profile in Profile:
            lived_through([log], profile)


def lived_through(lives: list[Log], profile: Profile) -> None:
    found = Found()
    for log in lives:
        explore(log, How(profile), LIFE.check, found)
    tally.add("model states", found.states)
    tally.add("violations", len(found.violations))
    assert not found.violations, found.violations[0]
    assert found.states


@pytest.mark.faults
def test_no_power_cut_breaks_a_promise_with_every_sector_on_its_own() -> None:
    """F4: at least 100,000 distinct states."""
    states = 0
    for scenario, profile in itertools.product((*SCENARIOS, LARGE), Profile):
        found = explored(scenario, How(profile, fine=True))
        assert not found.violations, found.violations[0]
        states += found.states
    assert states >= STATES_MIN


@pytest.mark.faults
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_real_code_recovers_from_every_shape_that_a_power_cut_leaves(scenario: Scenario) -> None:
    for tree, says in shapes(scenario):
        recovers(scenario, tree, says)
