"""The end of a lease, in every order: closed while waited for, failed while mapped, given back and lent again."""

import os
import threading
import time
from pathlib import Path

import pytest

import ckptd_client as ckptd
from ckptd_client import control, saver
from ckptd_client.arena import TAKEN_BACK, MappedArena, commit_image, copy_state
from ckptd_client.errors import Refused
from ckptd_client.leases import Lease
from ckptd_client.plan import build_plan
from tests.support.fake_daemon import FakeDaemon
from tests.support.saving import BOUND_S, LONG_S, spooled_image, state, value_in


def lend_again(lease: Lease) -> None:
    """What a daemon does that took the arena back."""
    control.write_lease(lease.arena.buffer, lease.arena.arena_id, lease.generation + 1, os.getpid())


def test_who_waits_for_memory_of_a_run_that_ends_is_told_so_and_does_not_spin(
    daemon: FakeDaemon, run: ckptd.Experiment
):
    daemon.arenas_max = 0
    daemon.wait_for("experiment.open")
    leases, found, cpu_s = run._session.leases, [], []

    def wait() -> None:
        begun_s = time.thread_time()
        found.append(leases.take(4096, LONG_S))
        cpu_s.append(time.thread_time() - begun_s)

    thread = threading.Thread(target=wait)
    thread.start()
    daemon.wait_for("experiment.open")
    began_s = time.monotonic()
    leases.close()
    thread.join(LONG_S)
    assert time.monotonic() - began_s < BOUND_S
    assert found == [(None, "closed")]
    assert leases.take(4096, LONG_S) == (None, "closed")
    assert cpu_s[0] < 1.0


def test_a_lease_that_can_not_be_mapped_is_held_by_nobody(
    daemon: FakeDaemon, run: ckptd.Experiment, monkeypatch: pytest.MonkeyPatch
):
    """A run that ended hangs up when nothing is held: what never was must not count."""
    daemon.wait_for("experiment.open")

    def fail(_arena: MappedArena) -> None:
        raise MemoryError

    leases = run._session.leases
    with monkeypatch.context() as without:
        without.setattr(MappedArena, "populate", fail)
        lease, why = leases.take(4096, LONG_S)
        assert lease is None
        assert "can't map" in why
    assert not leases.are_held()
    daemon.wait_for("abandon")
    lease, _ = leases.take(4096, LONG_S)
    assert lease is not None
    leases.give_back(lease)


def test_memory_that_is_lent_again_while_it_is_given_back_is_in_use(daemon: FakeDaemon, run: ckptd.Experiment):
    """The daemon is quick: its next lease of the same arena is here before give_back() has returned."""
    daemon.arenas_max = 1
    daemon.wait_for("experiment.open")
    leases = run._session.leases
    first, _ = leases.take(4096, LONG_S)
    assert first is not None
    abandon = leases._abandon

    def quick(arena: str, generation: int) -> None:
        abandon(arena, generation)
        leases.want(4096, 1)
        assert leases.wait_ready(LONG_S)

    leases._abandon = quick  # type: ignore[method-assign]
    leases.give_back(first)
    leases._abandon = abandon  # type: ignore[method-assign]
    second, _ = leases.take(4096, LONG_S)
    assert second is not None
    assert second.name == first.name
    assert leases.are_held()
    leases.reclaim(second.name)  # unmaps what is idle, and only that
    assert second.is_writable()


def test_the_end_of_an_old_lease_leaves_the_new_one_of_the_same_memory_alone(daemon: FakeDaemon, run: ckptd.Experiment):
    """A save that went to the spool is at rest late: its arena was published, and lent to us again, long ago."""
    daemon.arenas_max = 1
    daemon.wait_for("experiment.open")
    leases = run._session.leases
    lease, _ = leases.take(4096, LONG_S)
    assert lease is not None
    leases.rest(Lease(lease.arena, lease.generation - 1))
    leases.reclaim(lease.name)
    assert leases.are_held()
    assert lease.is_writable()


def test_a_commit_under_a_lease_that_is_over_changes_nothing_of_the_next_one():
    plan = build_plan({"step": 3})
    lease = Lease(MappedArena.anonymous(plan.arena_bytes, b"a" * 16), 7)
    control.write_lease(lease.arena.buffer, b"a" * 16, 7, os.getpid())
    image = copy_state(plan, {"step": 3}, lease.arena, 7)
    lend_again(lease)
    before = bytes(lease.arena.buffer)
    with pytest.raises(Refused) as caught:
        commit_image(lease.arena, {"v": 1}, image, 7)
    assert caught.value.code == TAKEN_BACK
    assert bytes(lease.arena.buffer) == before
    assert not control.commit(lease.arena.buffer, image.end_offset, b"{}", 7)
    assert bytes(lease.arena.buffer) == before


@pytest.mark.parametrize("word", [control.FREE, control.COMMITTED, control.RELEASED])
def test_a_commit_into_memory_that_was_taken_back_and_not_lent_again_is_refused(word: int):
    plan = build_plan({"step": 3})
    arena = MappedArena.anonymous(plan.arena_bytes, b"a" * 16)
    control.write_lease(arena.buffer, b"a" * 16, 7, os.getpid())
    image = copy_state(plan, {"step": 3}, arena, 7)
    control.set_state(arena.buffer, word)
    with pytest.raises(Refused):
        commit_image(arena, {"v": 1}, image, 7)
    assert control.read(arena.buffer).state == word


def test_writing_under_a_lease_that_is_over_does_not_begin():
    plan = build_plan({"step": 3})
    lease = Lease(MappedArena.anonymous(plan.arena_bytes, b"a" * 16), 7)
    control.write_lease(lease.arena.buffer, b"a" * 16, 7, os.getpid())
    lend_again(lease)
    before = bytes(lease.arena.buffer)
    with pytest.raises(Refused) as caught:
        copy_state(plan, {"step": 3}, lease.arena, 7)
    assert caught.value.code == TAKEN_BACK
    assert bytes(lease.arena.buffer) == before


def test_a_descriptor_of_an_earlier_lease_is_never_whole_under_the_next():
    """The daemon lends the arena on between the writer's look and its stores: nobody takes it for a save."""
    page = bytearray(control.PAGE)
    control.write_lease(page, b"a" * 16, 7, os.getpid())
    control.commit(page, control.PAGE, b"{}", 7)
    stores = bytes(page[56:112])
    control.write_lease(page, b"a" * 16, 8, os.getpid())
    page[56:112] = stores
    control.set_state(page, control.COMMITTED)
    assert not control.is_whole(control.read(page), b"{}")


def test_a_save_whose_memory_is_taken_back_while_it_is_written_lies_in_the_spool(
    home: Path, daemon: FakeDaemon, run: ckptd.Experiment, monkeypatch: pytest.MonkeyPatch
):
    assert run.prepare(state(1), wait_s=30)
    taken: list[Lease] = []
    copy = saver.copy_state

    def interrupted(plan, flat, arena, generation):  # type: ignore[no-untyped-def]
        image = copy(plan, flat, arena, generation)
        if not taken:
            taken.append(Lease(arena, generation))
            lend_again(taken[0])
        return image

    monkeypatch.setattr(saver, "copy_state", interrupted)
    handle = run.save(state(6), step=6)
    assert handle.error is None
    assert value_in(spooled_image(home, handle)) == 6.0
    page = control.read(taken[0].arena.buffer)
    assert (page.state, page.generation) == (control.LEASED, taken[0].generation + 1)
    assert not daemon.of("commit")


def test_memory_of_the_overflow_has_a_generation_for_each_use(home: Path, lone: ckptd.Experiment):
    """What was begun for one use must not be taken for the next one's."""
    overflow = lone._session.overflow
    first = overflow.take(8192, 0)
    assert first is not None
    overflow.drop(first.arena)
    second = overflow.take(8192, 0)
    assert second is not None
    assert second.arena is first.arena
    assert not first.is_ours()
    assert second.is_ours()
    overflow.drop(second.arena)
