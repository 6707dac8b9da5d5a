"""The model finds the mistake: each fsync left out or called at the wrong moment, one at a time (F5)."""

import ast
import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from ckptd.worker import fsync, publish
from tests.model import mutants
from tests.model.disk import Profile
from tests.model.explore import How, explore
from tests.model.log import Log, Sync
from tests.model.mutants import Mutant
from tests.model.protocols import LIFE, NOT_NEEDED, SCENARIOS
from tests.model.publishing import FIRST, SMALL, check, publish_at, published
from tests.model.recorder import Recorder
from tests.model.scenario import Scenario, failed_logs, logs, place, plain_log
from tests.support import tally, tree

pytestmark = pytest.mark.teeth

# fsyncs whose absence loses no checkpoint and no promise: why each is called.
NO_PROMISE = {
    "ckptd/catalog/ballast.py": "frees the blocks of the reserve at once; the reserve's bytes are nobody's",
    "ckptd/worker/fetched.py": "a copy of what an archive has; its crash states are explored (protocols.CACHES)",
}
CALLS = {"fsync", "fsync_file", "fsync_directory"}


@cache
def logs_of(scenario: Scenario) -> tuple[Log, ...]:
    return tuple(logs(scenario))


@cache
def undisturbed(scenario: Scenario) -> Log:
    return plain_log(scenario)


def is_caught(mutant: Mutant, scenario: Scenario) -> bool:
    return mutant.is_caught(scenario.check, Profile.WEAKEST)


def is_not_needed(site: str) -> str | None:
    """The entry of NOT_NEEDED that a site falls under."""
    for pattern in NOT_NEEDED:
        first, _, second = pattern.partition(":{} < ")
        frames = site.split(" < ")
        if any(a.startswith(f"{first}:") and b.startswith(second) for a, b in itertools.pairwise(frames)):
            return pattern
    return None


def test_every_fsync_that_is_left_out_is_found() -> None:
    """A site is one call with the calls that led to it: what one caller needs, another may not."""
    caught: dict[str, bool] = {}
    for scenario in SCENARIOS:
        for site in mutants.sites(logs_of(scenario)):
            caught[site] = caught.get(site, False) or is_caught(mutants.without(logs_of(scenario), site), scenario)
    needed = {site: found for site, found in caught.items() if is_not_needed(site) is None}
    tally.add("mutants", len(needed))
    tally.add("mutants caught", sum(needed.values()))
    assert [site for site, found in needed.items() if not found] == []
    idle = {site: found for site, found in caught.items() if site not in needed}
    assert [site for site, found in idle.items() if found] == [], "these are needed after all: take them off the list"
    assert {is_not_needed(site) for site in idle} == set(NOT_NEEDED)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_fsync_that_comes_too_early_is_found(scenario: Scenario) -> None:
    """Before the last change of what it should make durable."""
    made = [mutant for mutant in mutants.early(logs_of(scenario)[0]) if is_not_needed(mutant.name) is None]
    caught = [mutant for mutant in made if is_caught(mutant, scenario)]
    tally.add("mutants", len(made))
    tally.add("mutants caught", len(caught))
    assert [mutant.name for mutant in made if mutant not in caught] == []


@pytest.mark.parametrize(
    ("scenario", "edge"),
    [(scenario, edge) for scenario in (*SCENARIOS, LIFE) for edge in scenario.edges],
    ids=lambda value: value.name if isinstance(value, Scenario) else f"{value.first} before {value.then}",
)
def test_every_order_that_a_proof_needs_is_found_when_it_is_turned(scenario: Scenario, edge: object) -> None:
    tally.add("mutants")
    assert is_caught(mutants.late(undisturbed(scenario), edge), scenario)
    tally.add("mutants caught")


def test_every_scenario_that_promises_something_names_the_orders_it_needs() -> None:
    assert [s.name for s in SCENARIOS if not s.edges] == ["retire and purge", "sweep"]


def calls_of_fsync() -> Iterator[tuple[str, int]]:
    """Every call in the code that ends in an fsync, as (file, line); fsync.py's own are reached through these."""
    for path in tree.files():
        if not path.endswith(".py") or not path.startswith(("ckptd/", "client/ckptd_client/")):
            continue
        if path in {"ckptd/worker/fsync.py", *NO_PROMISE}:
            continue
        for node in ast.walk(ast.parse(tree.text(path))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in CALLS:
                    yield path, node.lineno


def test_every_call_of_fsync_in_the_code_is_one_of_those_that_were_left_out() -> None:
    """A new protocol, or a new fsync, has to come with its scenario."""
    reached = {
        tuple(frame.rsplit(":", 1))
        for scenario in SCENARIOS
        for site in mutants.sites(logs_of(scenario))
        for frame in (part.replace(" #", ":#").split(":#")[0] for part in site.split(" < "))
    }
    lines = {(name.split(".")[0], int(line)) for name, line in reached}
    assert [call for call in calls_of_fsync() if (Path(call[0]).stem, call[1]) not in lines] == []


def test_a_log_without_an_fsync_is_what_the_code_does_without_the_call() -> None:
    """The mutants are made from logs; here one is made from the code."""
    scenario = published(SMALL, "publish")
    log = plain_log(scenario)
    site = next(op.site for op in log.ops if isinstance(op, Sync) and "publish._write_manifest" in op.site)
    with mock.patch.object(publish, "fsync_file"):
        changed = plain_log(scenario)
    assert changed.ops == mutants.without([log], site).logs[0].ops
    assert explore(changed, How(Profile.EXT4), check).violations


def test_a_failed_fsync_that_is_simply_called_again_is_found() -> None:
    """I10: the second call succeeds, and proves nothing."""

    def twice(fd: int, point: str = "") -> None:
        try:
            fsync.fsync_file(fd, point)
        except fsync.FsyncFailed:
            fsync._failed.clear()
            fsync.fsync_file(fd, point)

    scenario = published(SMALL, "publish")
    with mock.patch.object(publish, "fsync_file", twice):
        found = [log for log in failed_logs(scenario) if explore(log, How(Profile.EXT4), check).violations]
    tally.add("mutants")
    assert found
    tally.add("mutants caught")


def test_a_publish_that_is_named_before_it_is_written_is_found() -> None:
    """The order of the whole, turned in the code itself: the name first, the bytes afterwards."""
    with place() as root:
        recorder = Recorder(root)
        with recorder.recording():
            publish_at(root, FIRST, SMALL)
            os_write_again(root / FIRST / "state.json")
            recorder.say("durable", FIRST)
        assert explore(recorder.log(), How(Profile.WEAKEST), check).violations


def os_write_again(path: Path) -> None:
    import os

    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    os.write(fd, b"{}")
    os.close(fd)
