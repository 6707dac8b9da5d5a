"""What is too much at once for nobody to have asked for it. S15"""

import pytest
from pydantic import ValidationError

from ckptd.model import Checkpoint, Level, State
from ckptd.retention import Dropped, Kept, Plan, Spare, brake, shed
from ckptd.rules import Rules
from tests.support.saved import a_save

DEFAULTS = Rules(keep_last=3)


def a_plan(drops: int, keeps: int, strips: int = 0, kept_as: State = State.LIVE) -> Plan:
    saves = [a_save(step, size_bytes=10) for step in range(drops)]
    kept = [a_save(1000 + step, state=kept_as) for step in range(keeps)]
    drop = tuple(Dropped(one, "no rule keeps it") for one in saves)
    return Plan(tuple(Kept(one, ("last",)) for one in kept), drop, tuple(kept[:strips]))


def test_a_plan_that_takes_most_of_an_experiment_is_held_and_says_what_and_why() -> None:
    found = brake(a_plan(297, 3), DEFAULTS)
    assert found is not None
    assert (found.drops, found.strips, found.live, found.size_bytes) == (297, 0, 300, 2970)
    assert found.why == ("the rules keep last 3",)
    assert found.words == "it would drop 297 of 300 live checkpoints at once, more than 20 and more than 20 % of them"


@pytest.mark.parametrize(
    ("drops", "live", "is_held"),
    [
        (20, 20, False), (20, 21, False), (21, 22, True),  # the count alone decides about small experiments
        (21, 105, False), (22, 105, True), (60, 300, False), (61, 300, True), (1, 10_000, False),
    ],
)  # fmt: skip
def test_both_limits_must_be_passed_and_the_limit_itself_passes(drops: int, live: int, *, is_held: bool) -> None:
    assert (brake(a_plan(drops, live - drops), DEFAULTS) is not None) == is_held


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_a_share_that_binary_numbers_can_not_say_exactly_is_taken_as_it_is_written(share: float) -> None:
    """0.1 * 30, 0.3 * 70 and 0.7 * 30 are not whole numbers to a computer."""
    rules = Rules(keep_last=3, brake_share=share, brake_count_min=0)
    for live in range(10, 250, 10):
        exact = round(share * 10) * live // 10
        assert brake(a_plan(exact, live - exact), rules) is None
        assert brake(a_plan(exact + 1, live - exact - 1), rules) is not None


def test_a_share_of_one_switches_it_off_and_one_of_none_leaves_the_count() -> None:
    assert brake(a_plan(1000, 1), Rules(keep_last=1, brake_share=1)) is None
    nothing = Rules(keep_last=1, brake_share=0, brake_count_min=5)
    assert [brake(a_plan(drops, 1000), nothing) is not None for drops in (5, 6)] == [False, True]
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValidationError):
            Rules(keep_last=1, brake_share=wrong)


def test_strips_count_like_drops_and_each_for_themselves() -> None:
    rules = Rules(strip_after=3, bytes_max=5, brake_count_min=20)
    assert brake(a_plan(20, 30, strips=20), rules) is None
    found = brake(a_plan(2, 50, strips=47), rules)
    assert found is not None
    assert (found.drops, found.strips, found.live) == (2, 47, 52)
    assert found.why == ("the experiment's budget is 5 bytes", "optimizer states stay in the newest 3")
    assert found.words.startswith("it would drop 2 and strip 47 of 52 live checkpoints at once")


def test_only_live_ones_are_counted_as_live() -> None:
    """A thousand damaged ones must not make a plan for all good ones look like a small share."""
    assert brake(a_plan(21, 1000, kept_as=State.CORRUPT), DEFAULTS) is not None


def test_a_full_disk_takes_what_the_brake_holds_after_everything_else() -> None:
    def spare(step: int, *, running: bool = False, braked: bool = False) -> Spare:
        one: Checkpoint = a_save(step, size_bytes=10, level=Level.VERIFIED)
        return Spare(one, is_running=running, is_braked=braked)

    given = [spare(1, braked=True), spare(2, braked=True), spare(3, running=True), spare(4)]
    assert [one.checkpoint.step for one in shed(given, 25)] == [4, 3, 1]
