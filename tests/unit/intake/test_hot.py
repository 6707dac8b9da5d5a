"""Copies in memory: within the budget, in the order that the configuration names, and never one that is read."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.config import Arenas
from ckptd.errors import CatalogFault
from ckptd.intake import hotcopies
from ckptd.intake.arenas import Use
from ckptd.intake.hot import HotCopy, given_up, outlived
from ckptd.intake.hotcopies import HotCopies
from ckptd_client import control
from tests.support.catalog import StillClock
from tests.unit.intake.test_arenas import MIB, Client, Keeper, a_pool, publish

KINDS = ("newest", "best", "pinned")
COPIES = st.lists(
    st.builds(
        HotCopy,
        key=st.integers(0, 1 << 30).map(lambda n: n.to_bytes(8)),
        size_bytes=st.integers(1, 1000),
        used_s=st.integers(0, 50).map(float),
        kinds=st.sets(st.sampled_from(KINDS)).map(frozenset),
        is_read=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda copy: copy.key,
)
POLICIES = st.permutations(KINDS).flatmap(lambda kinds: st.integers(0, 3).map(lambda n: tuple(kinds[:n])))


def rank(copy: HotCopy, policy) -> tuple[int, float]:
    """How dear it is, said in another way than the code says it: smaller is dearer."""
    ranks = [policy.index(kind) for kind in copy.kinds if kind in policy]
    return (min(ranks) if ranks else len(policy), -copy.used_s)


@settings(max_examples=120)
@given(COPIES, POLICIES, st.integers(0, 3000))
def test_what_stays_fits_and_what_is_read_stays(copies, policy, bytes_max):
    gone = given_up(copies, policy, bytes_max)
    stay = [copy for copy in copies if copy.key not in gone]
    assert len(gone) == len(set(gone))
    assert not [copy for copy in copies if copy.key in gone and copy.is_read]
    unread = sum(copy.size_bytes for copy in stay if not copy.is_read)
    read = sum(copy.size_bytes for copy in stay if copy.is_read)
    assert unread == 0 or unread + read <= bytes_max


@settings(max_examples=120)
@given(COPIES, POLICIES, st.integers(0, 3000))
def test_nothing_dearer_is_given_up_for_something_less_dear_that_is_no_smaller(copies, policy, bytes_max):
    gone = set(given_up(copies, policy, bytes_max))
    for lost in (copy for copy in copies if copy.key in gone):
        for kept in (copy for copy in copies if copy.key not in gone and not copy.is_read):
            assert rank(kept, policy) <= rank(lost, policy) or kept.size_bytes < lost.size_bytes


@given(COPIES, POLICIES)
def test_with_room_for_all_nothing_goes_and_with_none_all_that_nobody_reads(copies, policy):
    assert given_up(copies, policy, sum(copy.size_bytes for copy in copies)) == []
    assert set(given_up(copies, policy, 0)) == {copy.key for copy in copies if not copy.is_read}


def test_the_policy_is_an_order():
    copies = [
        HotCopy(b"newest", 10, 1.0, frozenset({"newest"})),
        HotCopy(b"pinned", 10, 2.0, frozenset({"pinned"})),
        HotCopy(b"best", 10, 3.0, frozenset({"best"})),
        HotCopy(b"none", 10, 9.0),
    ]
    assert given_up(copies, ("newest", "best", "pinned"), 20) == [b"none", b"pinned"]
    assert given_up(copies, ("pinned",), 20) == [b"newest", b"best"]
    assert given_up(copies, (), 0) == [b"newest", b"pinned", b"best", b"none"]


def test_time_ends_what_nobody_reads():
    old, read, young = HotCopy(b"o", 1, 1.0), HotCopy(b"r", 1, 1.0, is_read=True), HotCopy(b"y", 1, 9.0)
    assert outlived([old, read, young], 5.0) == [b"o"]


# -- with real arenas -------------------------------------------------------------------------------


@pytest.fixture
def keeper():
    kept = Keeper()
    yield kept
    kept.close()


class Knowing:
    """A catalog that knows which checkpoints are pinned."""

    def __init__(self, *pinned: str) -> None:
        self.pinned = pinned
        self.error: Exception | None = None

    async def read(self, fn):
        del fn
        if self.error:
            raise self.error
        return {one: frozenset({"pinned"}) for one in self.pinned}


async def saved(pool, experiment: str, checkpoint: str):
    lent = await pool.lease(experiment, MIB, Client(pool), 5)
    publish(pool, lent, experiment, checkpoint)
    return lent


def kept_hot(pool) -> set[str]:
    return {arena.checkpoint_id for arena in pool.all() if arena.use is Use.HOT}


async def test_a_new_copy_never_makes_the_copies_exceed_their_budget(keeper):
    clock = StillClock()
    limits = Arenas(bytes_max=8 * MIB, hot_bytes_max=2 * MIB)
    pool = a_pool(keeper, clock, bytes_max=8 * MIB, hot_bytes_max=2 * MIB)
    copies = HotCopies(pool, Knowing(), clock, lambda: limits)
    for number in range(6):
        clock.pass_s(1)
        await saved(pool, f"e{number}", f"c{number}")
        assert copies.bytes_used <= 2 * MIB
    assert kept_hot(pool) == {"c4", "c5"}
    assert copies.given_up == 4
    pool.close()


async def test_a_copy_that_is_read_stays_and_a_pinned_one_beats_a_newer_one(keeper):
    clock = StillClock()
    limits = Arenas(bytes_max=8 * MIB, hot_bytes_max=2 * MIB, hot_policy=("pinned",))
    pool = a_pool(keeper, clock, bytes_max=8 * MIB)
    copies = HotCopies(pool, Knowing("c0"), clock, lambda: limits)
    first = await saved(pool, "e0", "c0")
    clock.pass_s(1)
    read = await saved(pool, "e1", "c1")
    await copies.look()
    assert control.add_reader(read.page, 1)
    clock.pass_s(1)
    await saved(pool, "e2", "c2")
    assert kept_hot(pool) == {"c0", "c1"}
    control.remove_reader(read.page, 1)
    assert first.use is Use.HOT
    pool.close()


async def test_memory_that_the_machine_wants_is_given_back_least_dear_first_and_no_more_of_it(keeper):
    clock = StillClock()
    limits = Arenas(bytes_max=8 * MIB, memory_free_bytes_min=10 * MIB)
    pool = a_pool(keeper, clock, bytes_max=8 * MIB)
    copies = HotCopies(pool, Knowing(), clock, lambda: limits)
    for number in range(3):
        clock.pass_s(1)
        await saved(pool, f"e{number}", f"c{number}")
    pool.free(await pool.lease("unused", MIB, Client(pool), 0))
    clock.pass_s(1)
    copies.available_bytes = lambda: int(8.5 * MIB)
    copies.ease()
    assert kept_hot(pool) == {"c1", "c2"}, "the unused arena and the oldest copy make the room"
    assert pool.bytes_used == 2 * MIB
    copies.available_bytes = lambda: 10 * MIB
    copies.ease()
    assert pool.bytes_used == 2 * MIB
    pool.close()


async def test_a_copy_that_nobody_wants_any_more_gives_its_memory_back(keeper):
    clock = StillClock()
    limits = Arenas(bytes_max=8 * MIB, hot_s=60)
    pool = a_pool(keeper, clock, bytes_max=8 * MIB)
    copies = HotCopies(pool, Knowing(), clock, lambda: limits)
    old = await saved(pool, "e0", "c0")
    clock.pass_s(59)
    old.read_s = clock.monotonic_s()
    clock.pass_s(2)
    await copies.look()
    assert kept_hot(pool) == {"c0"}, "somebody read it a moment ago"
    clock.pass_s(60)
    await copies.look()
    assert pool.bytes_used == 0
    pool.close()


async def test_a_catalog_that_fails_keeps_no_memory_from_the_machine(keeper):
    clock = StillClock()
    limits = Arenas(bytes_max=8 * MIB, memory_free_bytes_min=10 * MIB)
    pool, catalog = a_pool(keeper, clock, bytes_max=8 * MIB), Knowing()
    copies = HotCopies(pool, catalog, clock, lambda: limits)
    read = await saved(pool, "e0", "c0")
    await saved(pool, "e1", "c1")
    assert control.add_reader(read.page, 1)
    catalog.error = CatalogFault("torn")
    copies.available_bytes = lambda: 0
    with pytest.raises(CatalogFault):
        await copies.look()
    assert kept_hot(pool) == {"c0"}, "what is read stays, the rest went before anybody was asked"
    pool.close()


def test_the_kernel_says_how_much_memory_is_left():
    found = hotcopies.available_bytes()
    assert found is not None
    assert 0 < found < math.inf
