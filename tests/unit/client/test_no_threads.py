"""A process that can't start a thread: its saves arrive all the same, and none waits for a thread that never ran."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ckptd_client as ckptd
from ckptd_client import background
from ckptd_client.background import Background
from tests.support.fake_daemon import FakeDaemon
from tests.support.saving import BOUND_S, LONG_S, spooled_image, state, value_in


class Refusals:
    """Makes Thread.start fail, as at a limit of processes, for threads whose name begins with one of these."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: tuple[str, ...] = ()
        self.left = 0
        start = threading.Thread.start

        def refusing(thread: threading.Thread) -> None:
            if self.left and thread.name.startswith(self.names):
                self.left -= 1
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refusing)

    def begin(self, *names: str, count: int = 1_000_000) -> None:
        self.names, self.left = names, count


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> Refusals:
    return Refusals(monkeypatch)


def counting(done: list[int], number: int) -> Callable[[], None]:
    return lambda: done.append(number)


def test_a_thread_that_could_not_be_started_once_is_started_with_the_next_job(refusals: Refusals) -> None:
    done: list[int] = []
    work = Background("ckptd-test")
    refusals.begin("ckptd-test", count=1)
    assert work.submit(counting(done, 1))
    assert not done
    assert work.submit(counting(done, 2))
    assert work.drain(30)
    assert done == [1, 2]


def test_a_look_now_and_then_starts_the_thread_that_could_not_be_started(refusals: Refusals) -> None:
    done = threading.Event()
    work = Background("ckptd-test")
    refusals.begin("ckptd-test", count=2)
    work.submit(done.set)
    assert not work.tend()
    assert work.tend()
    assert done.wait(30)


def test_where_no_thread_is_to_be_had_whoever_drains_does_the_work_in_its_order(refusals: Refusals) -> None:
    done: list[int] = []
    work = Background("ckptd-test")
    refusals.begin("ckptd-test")
    for number in range(5):
        assert work.submit(counting(done, number))
    assert work.drain(30)
    assert done == list(range(5))


def test_what_was_interrupted_is_done_again(refusals: Refusals) -> None:
    """Ctrl-C in the thread that stands in must not lose the save that it was about to write."""
    done: list[int] = []
    work = Background("ckptd-test")
    refusals.begin("ckptd-test")

    def interrupted() -> None:
        done.append(1)
        if len(done) == 1:
            raise KeyboardInterrupt

    work.submit(interrupted)
    with pytest.raises(KeyboardInterrupt):
        work.drain(30)
    assert work.drain(30)
    assert done == [1, 1]


def test_a_thread_that_starts_waits_for_who_stands_in(refusals: Refusals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run one after another, whoever runs them."""
    monkeypatch.setattr(background, "IDLE_S", 0.05)
    order: list[str] = []
    work = Background("ckptd-test")
    refusals.begin("ckptd-test", count=2)

    def slow() -> None:
        work.submit(lambda: order.append("second"))  # a thread can be had again
        time.sleep(0.2)
        order.append("first")

    work.submit(slow)
    assert work.drain(30)
    assert order == ["first", "second"]


def test_no_thread_for_the_spool_once_costs_no_save(home: Path, lone: ckptd.Experiment, refusals: Refusals):
    refusals.begin("ckptd-spool", count=1)
    handles = [lone.save(state(value), step=value) for value in range(3)]
    assert [value_in(spooled_image(home, handle)) for handle in handles] == [0.0, 1.0, 2.0]


def test_without_a_thread_for_the_spool_the_next_save_and_the_flush_write_what_waits(
    home: Path, refusals: Refusals
) -> None:
    refusals.begin("ckptd-spool")
    run = ckptd.Experiment("net", dir=home / "r", overlap_wait_s=LONG_S)
    began_s = time.monotonic()
    handles = [run.save(state(value), step=value) for value in range(3)]
    assert run.flush(60)
    assert time.monotonic() - began_s < BOUND_S
    assert [value_in(spooled_image(home, handle)) for handle in handles] == [0.0, 1.0, 2.0]
    run.close(timeout_s=5)


def test_without_a_thread_that_maps_arenas_a_save_maps_its_own(home: Path, daemon: FakeDaemon, refusals: Refusals):
    refusals.begin("ckptd-arenas")
    run = ckptd.Experiment("net", dir=home / "r", overlap_wait_s=LONG_S)
    began_s = time.monotonic()
    for step in (1, 2):
        handle = run.save(state(step), step=step)
        assert value_in(daemon.wait_staged(handle.id)) == step
        daemon.publish(handle.id)
        assert not handle.spooled
    assert time.monotonic() - began_s < BOUND_S
    run.close(timeout_s=5)


def test_at_the_end_of_an_interpreter_that_starts_no_threads_a_save_without_an_answer_is_spooled(
    home: Path, daemon: FakeDaemon, refusals: Refusals
) -> None:
    """Python 3.12 refuses every thread once the script has ended."""
    run = ckptd.Experiment("net", dir=home / "r")
    run.prepare(state(1), wait_s=30)
    daemon.silent_on.add("commit")
    handle = run.save(state(9), step=9)
    daemon.wait_for("commit")
    refusals.begin("")
    daemon.stop()
    run._at_exit()
    assert handle.spooled
    assert value_in(spooled_image(home, handle)) == 9.0


def test_a_run_begins_and_saves_where_not_one_thread_is_to_be_had(home: Path, refusals: Refusals) -> None:
    refusals.begin("ckptd-")
    run = ckptd.Experiment("net", dir=home / "r", overlap_wait_s=LONG_S)
    assert not run.prepare(state(4))
    began_s = time.monotonic()
    handle = run.save(state(4), step=4)
    offered = run.submit(home / "file.pt", step=5)
    assert run.flush(60)
    assert time.monotonic() - began_s < BOUND_S
    assert value_in(spooled_image(home, handle)) == 4.0
    assert offered.spooled
    run.close(timeout_s=5)


def test_what_fails_while_flushing_keeps_nothing_of_the_end_back(
    home: Path, daemon: FakeDaemon, run: ckptd.Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.prepare(state(1), wait_s=30)

    def fails(_timeout_s: float) -> bool:
        raise MemoryError

    monkeypatch.setattr(run._session, "flush", fails)
    run.close(timeout_s=30)
    assert daemon.of("experiment.close"), "the daemon was not told how it ended"
    daemon.wait_for("abandon")
