"""The pool: who gets which memory, who gives it back, and what outlives whom."""

import os
import subprocess
import sys

import anyio
import pytest

from ckptd.config import Arenas
from ckptd.errors import BadRequest, NoArena, OverQuota
from ckptd.intake import arena as one_arena
from ckptd.intake import arenas, waiting
from ckptd.intake.arenas import ArenaPool, Use
from ckptd_client import control
from tests.support.catalog import StillClock
from tests.support.in_process import Keeper, eventually, open_fds

MIB = 1 << 20
BIG = 80 * MIB  # two of these differ by more than the 64 MiB that may be wasted


class Client:
    """A connection of this process; gives back what it is asked for when `obliging`."""

    def __init__(
        self, pool: ArenaPool, *, obliging: bool = True, uid: int | None = None, pid: int | None = None
    ) -> None:
        self.pool, self.obliging = pool, obliging
        self.uid, self.pid = os.getuid() if uid is None else uid, pid or os.getpid()
        self.asked: list[str] = []

    def push(self, message: dict[str, object]) -> None:
        assert message["push"] == "reclaim"
        self.asked.append(str(message["arena"]))
        arena = self.pool.get(bytes.fromhex(str(message["arena"])))
        if self.obliging and arena is not None:
            self.pool.free(arena)


@pytest.fixture
def keeper():
    kept = Keeper()
    yield kept
    kept.close()


def a_pool(keeper: Keeper, clock: StillClock | None = None, **settings) -> ArenaPool:
    return ArenaPool(Arenas(**{"bytes_max": 2 * MIB, **settings}), keeper, clock or StillClock())


def publish(pool: ArenaPool, arena, experiment: str, checkpoint: str) -> None:
    """What the commit and the pipeline do to an arena."""
    control.commit(arena.page, control.PAGE, b"")
    pool.commit(arena, experiment, checkpoint)
    pool.published(checkpoint)


async def test_an_arena_is_stored_before_it_is_lent_and_forgotten_when_it_is_destroyed(keeper):
    pool = a_pool(keeper)
    lent = await pool.lease("a", MIB, Client(pool), 0)
    assert list(keeper.kept) == [lent.name]
    assert os.fstat(lent.fd).st_size == MIB
    pool.free(lent)
    pool.destroy(lent)
    assert keeper.kept == {}


async def test_no_arena_is_lent_that_the_service_manager_would_not_keep(keeper, monkeypatch):
    """Also not two at once: the second is still being made when the first takes the last place."""
    pool = a_pool(keeper, bytes_max=8 * MIB)
    monkeypatch.setattr(keeper, "has_room", lambda more=1: len(keeper.kept) + more <= 1)
    lent = []

    async def lease(name: str) -> None:
        try:
            lent.append(await pool.lease(name, MIB, Client(pool, obliging=False), 0.05))
        except NoArena:
            lent.append(None)

    async with anyio.create_task_group() as group:
        for name in "ab":
            group.start_soon(lease, name)
    assert len(keeper.kept) == 1
    assert [one is None for one in lent].count(True) == 1
    pool.close()


async def test_three_experiments_share_a_budget_of_two_arenas(keeper):
    """Memory that nobody has written in goes round; a save that is under way is never taken away."""
    pool = a_pool(keeper)
    clients = {name: Client(pool) for name in "abc"}
    for turn in range(3):
        for name, client in clients.items():
            lent = await pool.lease(name, MIB, client, 5)
            publish(pool, lent, name, f"{name}{turn}")
    assert pool.bytes_used <= 2 * MIB
    assert {arena.use for arena in pool.all()} == {Use.HOT}


async def test_a_leased_unwritten_arena_is_asked_back_from_one_holder_at_a_time(keeper):
    pool = a_pool(keeper)
    first, second, third = (Client(pool) for _ in range(3))
    await pool.lease("a", MIB, first, 0)
    await pool.lease("b", MIB, second, 0)
    lent = await pool.lease("c", MIB, third, 5)
    assert lent.holder is third
    assert len(first.asked + second.asked) == 1


async def test_a_holder_that_does_not_answer_costs_the_next_one_a_moment_not_the_lease(keeper):
    pool = a_pool(keeper)
    deaf, polite = Client(pool, obliging=False), Client(pool)
    await pool.lease("a", MIB, deaf, 0)
    await pool.lease("b", MIB, polite, 0)
    with anyio.fail_after(20):
        await pool.lease("c", MIB, Client(pool), 60)
    assert (len(deaf.asked), len(polite.asked)) == (1, 1)


async def test_an_arena_that_is_being_written_is_never_asked_back(keeper):
    pool = a_pool(keeper)
    writer = Client(pool)
    for name in "ab":
        control.set_state((await pool.lease(name, MIB, writer, 0)).page, control.WRITING)
    with pytest.raises(NoArena):
        await pool.lease("c", MIB, Client(pool), 0.4)
    assert writer.asked == []


async def test_hot_copies_go_before_anybody_waits_and_the_oldest_first(keeper):
    clock = StillClock()
    pool = a_pool(keeper, clock)
    for name in "ab":
        clock.pass_s(1)
        publish(pool, await pool.lease(name, MIB, Client(pool), 0), name, name * 32)
    lent = await pool.lease("c", MIB, Client(pool), 0.2)
    assert lent.use is Use.LEASED
    assert pool.of_checkpoint("a" * 32) is None
    assert pool.of_checkpoint("b" * 32) is not None


async def test_the_last_hot_copy_of_an_experiment_stays_while_there_is_room(keeper):
    pool = a_pool(keeper, bytes_max=8 * MIB)
    client = Client(pool)
    publish(pool, await pool.lease("a", MIB, client, 0), "a", "1" * 32)
    second = await pool.lease("a", MIB, client, 0)
    assert pool.of_checkpoint("1" * 32) is not None
    publish(pool, second, "a", "2" * 32)
    third = await pool.lease("a", MIB, client, 0)
    assert third is not second, "the newer copy stays, the older one is written over"
    assert pool.of_checkpoint("2" * 32) is second


async def test_free_arenas_are_given_up_before_hot_copies(keeper):
    pool = a_pool(keeper, bytes_max=2 * MIB)
    publish(pool, await pool.lease("a", MIB, Client(pool), 0), "a", "a" * 32)
    pool.free(await pool.lease("b", MIB, Client(pool), 0))
    await pool.lease("c", MIB, Client(pool), 0.2)
    assert pool.of_checkpoint("a" * 32) is not None


async def test_nothing_is_given_up_for_a_save_that_would_not_fit_anyway(keeper):
    pool = a_pool(keeper)
    control.set_state((await pool.lease("a", MIB, Client(pool), 0)).page, control.WRITING)
    publish(pool, await pool.lease("b", MIB, Client(pool), 0), "b", "b" * 32)
    with pytest.raises(NoArena):
        await pool.lease("c", 2 * MIB, Client(pool), 0.3)
    assert pool.of_checkpoint("b" * 32) is not None


async def test_an_experiment_whose_model_grew_is_not_locked_out_and_loses_one_copy_at_a_time(keeper):
    pool = a_pool(keeper, bytes_max=4 * BIG)
    client = Client(pool)
    for number in "12":
        publish(pool, await pool.lease("a", MIB, client, 0), "a", number * 32)
    grown = await pool.lease("a", BIG, client, 1)
    assert grown.size_bytes == BIG
    assert sum(arena.use is Use.HOT for arena in pool.all()) == 1


async def test_a_reader_keeps_its_arena_from_being_lent_again(keeper):
    """M010: a process that maps the hot copy must never see another save's bytes in it."""
    pool = a_pool(keeper, bytes_max=MIB)
    arena = await pool.lease("a", MIB, Client(pool), 0)
    publish(pool, arena, "a", "a" * 32)
    reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    try:
        assert control.add_reader(arena.page, reader.pid)
        with pytest.raises(NoArena):
            await pool.lease("b", MIB, Client(pool), 0.3)
        async with anyio.create_task_group() as group:
            lent = []

            async def want() -> None:
                lent.append(await pool.lease("b", MIB, Client(pool), 60))

            group.start_soon(want)
            await anyio.wait_all_tasks_blocked()
            reader.communicate()  # dies without a word: nobody tells the pool
        assert lent == [arena]
    finally:
        reader.kill()
        reader.wait()


async def test_two_users_never_get_each_others_memory(keeper, monkeypatch):
    """S25, I9: who once mapped an arena may keep the mapping, and would read the next user's model in it."""
    if os.getuid() != 0:
        pytest.skip("only root can serve several users")
    pool = a_pool(keeper)
    mine = await pool.lease("a", MIB, Client(pool, uid=1001), 0)
    pool.free(mine)
    theirs = await pool.lease("b", MIB, Client(pool, uid=1002), 1)
    assert theirs is not mine
    assert (os.fstat(theirs.fd).st_uid, os.fstat(theirs.fd).st_mode & 0o777) == (1002, 0o600)
    with pytest.raises(NoArena):
        pool.leased(theirs.id, theirs.generation, Client(pool, uid=1001))


async def test_the_owner_of_an_arena_is_known_to_the_next_daemon(keeper):
    if os.getuid() != 0:
        pytest.skip("only root can serve several users")
    pool = a_pool(keeper)
    await pool.lease("a", MIB, Client(pool, uid=1001), 0)
    after = a_pool(keeper)
    [(name, fd)] = keeper.passed()
    adopted = after.adopt(name, fd)
    assert adopted is not None
    assert adopted.owner_uid == 1001
    after.close()


async def test_leases_of_a_dead_process_come_back_and_those_of_a_living_one_do_not(keeper):
    pool = a_pool(keeper)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dying, living = Client(pool, pid=process.pid), Client(pool)
    lost, kept = await pool.lease("a", MIB, dying, 0), await pool.lease("b", MIB, living, 0)
    for client in (dying, living):
        pool.orphaned(client)
    assert pool.reap() == []
    assert lost.use is Use.LEASED
    process.communicate()
    assert pool.reap() == []
    assert (lost.use, kept.use) == (Use.FREE, Use.LEASED)


async def test_leases_of_an_experiment_that_has_ended_come_back_with_its_connection(keeper):
    """An answer that crosses the end is read by nobody, and the process may live on, with one experiment after another."""
    pool = a_pool(keeper, bytes_max=3 * MIB)
    living = Client(pool)
    crossed, other = await pool.lease("a", MIB, living, 0), await pool.lease("b", MIB, living, 0)
    begun = await pool.lease("a", MIB, living, 0)
    control.set_state(begun.page, control.WRITING)
    pool.orphaned(living, {"a"})
    assert (crossed.use, other.use) == (Use.FREE, Use.LEASED)
    assert begun.use is Use.LEASED, "somebody writes there"


async def test_a_lease_that_never_reached_its_trainer_is_none(keeper):
    """A trainer that lives on would otherwise block its experiment with memory it knows nothing of."""
    pool = a_pool(keeper)
    lent = await pool.lease("a", MIB, Client(pool), 0)
    pool.undelivered(lent, lent.generation)
    assert lent.use is Use.FREE
    again = await pool.lease("a", MIB, Client(pool), 0)
    pool.undelivered(again, again.generation - 1)
    assert again.use is Use.LEASED, "an old answer says nothing about a new lease"


async def test_a_process_that_comes_back_can_be_asked_for_its_lease(keeper):
    pool = a_pool(keeper, bytes_max=MIB)
    gone = Client(pool)
    await pool.lease("a", MIB, gone, 0)
    pool.orphaned(gone)
    with pytest.raises(NoArena):
        await pool.lease("b", MIB, Client(pool, pid=1), 0.3)
    back = Client(pool)
    pool.rejoin(back)
    await pool.lease("b", MIB, Client(pool, pid=1), 2)
    assert len(back.asked) == 1


async def test_who_came_later_makes_no_arena_before_the_one_that_waits_for_room(keeper):
    pool = a_pool(keeper, bytes_max=3 * MIB)
    holder = Client(pool, obliging=False)
    first, second = await pool.lease("a", MIB, holder, 0), await pool.lease("b", MIB, holder, 0)
    for arena in (first, second):
        control.set_state(arena.page, control.WRITING)
    order: list[str] = []

    async def want(name: str, size_bytes: int) -> None:
        await pool.lease(name, size_bytes, Client(pool), 60)
        order.append(name)

    async with anyio.create_task_group() as group:
        group.start_soon(want, "large", 2 * MIB)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(want, "small", MIB)
        await anyio.wait_all_tasks_blocked()
        assert order == []
        pool.free(first)
        await eventually(lambda: order)
        pool.free(second)
        await eventually(lambda: len(order) == 2)
    assert order == ["large", "small"]


async def test_what_is_freed_while_an_arena_is_being_made_wakes_the_waiter(keeper, monkeypatch):
    """A wake-up between looking and waiting must not be lost."""
    pool = a_pool(keeper, bytes_max=2 * MIB, per_experiment_max=2)
    monkeypatch.setattr(waiting, "LOOK_S", 60.0)
    client = Client(pool, obliging=False)
    held = [await pool.lease("a", MIB, client, 0) for _ in range(2)]
    async with anyio.create_task_group() as group:
        group.start_soon(pool.lease, "a", MIB, client, 60.0)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(20):
            pool.free(held[0])
            await eventually(lambda: held[0].use is Use.LEASED)


async def test_a_cancelled_wait_leaves_nothing_behind(keeper):
    pool = a_pool(keeper, bytes_max=MIB)
    control.set_state((await pool.lease("a", MIB, Client(pool), 0)).page, control.WRITING)
    with anyio.move_on_after(0.05):
        await pool.lease("b", MIB, Client(pool), 60)
    assert pool.waiting == 0
    assert pool.bytes_used == MIB


@pytest.mark.parametrize(
    ("size_bytes", "error"), [(0, BadRequest), (4096, BadRequest), (5000, BadRequest), (4 * MIB, OverQuota)]
)
async def test_sizes_that_can_never_be_lent_are_refused_at_once(keeper, size_bytes, error):
    with pytest.raises(error):
        await a_pool(keeper).lease("a", size_bytes, Client(a_pool(keeper)), 5)


async def test_memory_that_is_not_to_be_had_is_no_arena_and_counts_for_nothing(keeper, monkeypatch):
    pool = a_pool(keeper)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arenas, "make", refuse)
    with pytest.raises(NoArena, match="not to be had"):
        await pool.lease("a", MIB, Client(pool), 1)
    assert pool.bytes_used == 0
    assert not pool.budget._making


async def test_a_restart_finds_every_arena_and_no_descriptor_is_left_open(keeper):
    before = open_fds()
    pool = a_pool(keeper, bytes_max=8 * MIB)
    lent = await pool.lease("a", MIB, Client(pool), 0)
    publish(pool, await pool.lease("b", MIB, Client(pool), 0), "b", "b" * 32)
    pool.close()
    again = a_pool(keeper)
    for name, fd in keeper.passed():
        again.adopt(name, fd)
    assert {arena.id for arena in again.all()} >= {lent.id}
    assert [arena.generation for arena in again.all() if arena.id == lent.id] == [1]
    again.close()
    keeper.close()
    await eventually(lambda: open_fds() <= before)  # an earlier test's threads may have some in hand


async def test_a_descriptor_that_is_none_of_ours_is_closed_and_removed_from_the_store(keeper):
    before = open_fds()
    pool = a_pool(keeper)
    for content in (b"", b"x" * 8192):
        fd = os.memfd_create("foreign")
        os.write(fd, content)
        assert pool.adopt("arena-" + "0" * 32, fd) is None
    await eventually(lambda: open_fds() <= before)  # an earlier test's threads may have some in hand


async def test_a_descriptor_longer_than_its_limit_is_no_save(keeper):
    """Its length is written by the trainer; reading and hashing it happens on the event loop."""
    pool = a_pool(keeper, bytes_max=16 * MIB)
    lent = await pool.lease("a", 8 * MIB, Client(pool), 0)
    control.commit(lent.page, control.PAGE, b" " * (one_arena.DESCRIPTOR_BYTES_MAX + 1))
    assert lent.descriptor() is None


async def test_memory_of_arenas_nobody_uses_goes_back_to_the_machine(keeper):
    clock = StillClock()
    pool = a_pool(keeper, clock, idle_s=60)
    pool.free(await pool.lease("a", MIB, Client(pool), 0))
    pool.trim()
    assert pool.bytes_used == MIB
    clock.pass_s(61)
    pool.trim()
    assert pool.bytes_used == 0
