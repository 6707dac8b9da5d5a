"""A burst of files that are handed over: all arrive, at a pace that the daemon and the spool keep up with."""

import os
import threading
import time
from pathlib import Path

import pytest

import ckptd_client as ckptd
from ckptd_client import offers, paced, spool
from tests.support.fake_daemon import FakeDaemon
from tests.support.node import eventually
from tests.support.saving import BOUND_S, LONG_S, spooled_image, state, value_in

BURST = 300  # more than the background takes jobs, and far more than may be in flight


def offer_all(run: ckptd.Experiment, home: Path, count: int = BURST) -> list[ckptd.Handle]:
    return [run.submit(home / f"{number}.pt", step=number) for number in range(count)]


def test_no_more_than_some_offers_are_without_an_answer_at_a_time(
    home: Path, daemon: FakeDaemon, run: ckptd.Experiment
):
    """A daemon lets 64 requests of a connection wait; beyond that it is busy."""
    daemon.wait_for("experiment.open")
    daemon.silent_on.add("submit")
    offer_all(run, home)
    sent = daemon.wait_for("submit", paced.IN_FLIGHT_MAX)
    assert run._session.connection.request("status", 30)["ok"] is True  # what was sent before has arrived
    assert len(daemon.of("submit")) == paced.IN_FLIGHT_MAX
    daemon.silent_on.clear()
    with daemon._changed:
        (peer,) = daemon._peers
        for request in sent:
            daemon._reply(peer, request, **daemon._submit(request))
    daemon.wait_for("submit", BURST)
    assert run.flush(60)


def test_a_burst_on_a_healthy_daemon_fails_for_no_file_and_uses_no_spool(
    home: Path, daemon: FakeDaemon, run: ckptd.Experiment
):
    daemon.wait_for("experiment.open")
    began_s = time.monotonic()
    handles = offer_all(run, home)
    assert time.monotonic() - began_s < BOUND_S
    assert run.flush(60)
    assert all(handle.acknowledged and not handle.spooled for handle in handles)
    # Sorted: two threads send, and what one of them took first may leave second.
    assert sorted(request["step"] for request in daemon.of("submit")) == list(range(BURST))
    assert run.stats()["failed"] == 0


def test_busy_is_asked_again_after_a_pause_and_not_spooled(
    home: Path, daemon: FakeDaemon, run: ckptd.Experiment, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(paced, "RETRY_S", 0.05)
    daemon.wait_for("experiment.open")
    daemon.refuse["submit"] = "busy"
    handle = run.submit(home / "file.pt", step=1)
    daemon.wait_for("submit", 3)
    assert not handle.spooled
    assert not handle.done
    daemon.refuse.clear()
    assert handle.wait_acknowledged(30)
    assert not handle.spooled


@pytest.mark.parametrize(
    ("told", "wait_s"),
    [(0.5, 0.5), (1e9, 30.0), (None, 1.0), (0, 1.0), ("soon", 1.0), (True, 1.0), (float("nan"), 1.0)],
)
def test_a_busy_daemon_says_when_to_come_back_within_reason(told: object, wait_s: float):
    assert paced._retry_s(told) == wait_s


def test_a_daemon_that_stays_busy_does_not_keep_offers_from_the_spool_at_the_end(
    home: Path, daemon: FakeDaemon, run: ckptd.Experiment, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(offers, "ANSWER_S", 0.2)
    daemon.wait_for("experiment.open")
    daemon.refuse["submit"] = "busy"
    handles = offer_all(run, home, 5)
    assert run.flush(60)
    assert all(handle.spooled for handle in handles)


def test_a_burst_without_a_daemon_lies_in_the_spool_whole(
    home: Path, lone: ckptd.Experiment, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # six hundred: how fast a disk is decides nothing here
    handles = offer_all(lone, home)
    assert lone.flush(60)
    assert all(handle.spooled for handle in handles)
    directory = str(home / "state" / "spool")
    assert {entry.checkpoint for entry in spool.entries(directory)} == {handle.id for handle in handles}


def test_a_burst_in_whose_midst_the_daemon_dies_arrives_whole(
    home: Path, daemon: FakeDaemon, run: ckptd.Experiment, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    daemon.wait_for("experiment.open")
    daemon.silent_on.add("submit")
    handles = offer_all(run, home)
    daemon.wait_for("submit", paced.IN_FLIGHT_MAX)
    daemon.stop()
    eventually(lambda: all(handle.spooled for handle in handles), "spooled")
    assert run.stats()["failed"] == 0


def test_an_image_goes_to_the_spool_between_the_offers_of_a_burst(
    home: Path, lone: ckptd.Experiment, monkeypatch: pytest.MonkeyPatch
):
    """Thousands of notes must not hold up the one save that holds the memory."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    order: list[str] = []
    gate = threading.Event()
    write_offer, write_arena = spool.write_offer, spool.write_arena

    def offer(*arguments: object) -> str:
        order.append("offer")
        return write_offer(*arguments)

    def arena(*arguments: object, **more: object) -> str:
        order.append("image")
        return write_arena(*arguments, **more)

    monkeypatch.setattr(spool, "write_offer", offer)
    monkeypatch.setattr(spool, "write_arena", arena)
    lone._session._spooler.submit(lambda: gate.wait(LONG_S) and None)  # until all of them wait
    offer_all(lone, home)
    handle = lone.save(state(7), step=7)
    gate.set()
    assert value_in(spooled_image(home, handle)) == 7.0
    assert lone.flush(60)
    assert order.index("image") <= 2 * offers.PIECE
    assert len(order) == BURST + 1


def test_beyond_its_bound_a_submit_waits_for_room_and_then_says_so(
    home: Path, daemon: FakeDaemon, run: ckptd.Experiment, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(offers, "OPEN_MAX", 3)
    monkeypatch.setattr(offers, "ROOM_S", 0.1)
    daemon.wait_for("experiment.open")
    daemon.silent_on.add("submit")
    first = offer_all(run, home, 3)
    one_more = run.submit(home / "more.pt", step=4)
    assert one_more.state == "failed"
    assert isinstance(one_more.error, ckptd.Refused)
    assert one_more.error.code == "busy"
    monkeypatch.setattr(offers, "ROOM_S", LONG_S)
    sent = daemon.wait_for("submit", 3)
    daemon.silent_on.clear()

    def answer() -> None:
        with daemon._changed:
            (peer,) = daemon._peers
            for request in sent:
                daemon._reply(peer, request, **daemon._submit(request))

    timer = threading.Timer(0.2, answer)
    timer.start()
    last = run.submit(home / "last.pt", step=5)
    timer.join()
    assert all(handle.wait_acknowledged(30) for handle in [*first, last])
    assert last.error is None
    assert not run.flush(30), "one was not taken"


def test_an_offer_that_fits_into_no_frame_is_refused_and_the_next_is_taken(
    home: Path, daemon: FakeDaemon, run: ckptd.Experiment
):
    daemon.wait_for("experiment.open")
    large = run.submit(home / "large.pt", step=1, metrics={f"{number:0250}": 0.0 for number in range(5000)})
    small = run.submit(home / "small.pt", step=2)
    assert small.wait_acknowledged(30)
    assert large.state == "failed"


def test_a_daemon_that_comes_the_moment_an_offer_was_written_is_asked_about_it(home: Path, daemon: FakeDaemon):
    """It was greeted before the offer was known to lie in the spool."""
    daemon.stop()
    run = ckptd.Experiment("net", dir=home / "r")
    count = run._session.count

    def count_slowly(name: str) -> None:
        count(name)
        daemon.start()
        daemon.wait_for("experiment.open")
        assert run._session.connection.request("status", 30)["ok"]

    run._session.count = count_slowly
    handle = run.submit(home / "x.pt", step=1)
    assert daemon.wait_for("submit")[0]["checkpoint"] == handle.id
    eventually(lambda: handle.acknowledged, "known")
    run.close(timeout_s=5)


def test_what_lies_in_the_spool_is_asked_about_at_the_same_pace(
    home: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    daemon.stop()
    run = ckptd.Experiment("net", dir=home / "r")
    handles = offer_all(run, home, 2 * paced.IN_FLIGHT_MAX)
    assert run.flush(60)
    daemon.silent_on.add("submit")
    daemon.start()
    sent = daemon.wait_for("submit", paced.IN_FLIGHT_MAX)
    assert run._session.connection.request("status", 30)["ok"] is True
    assert len(daemon.of("submit")) == paced.IN_FLIGHT_MAX
    daemon.silent_on.clear()
    with daemon._changed:
        (peer,) = daemon._peers
        for request in sent:
            daemon._reply(peer, request, **daemon._submit(request))
    eventually(lambda: all(handle.acknowledged for handle in handles), "known")
    run.close(timeout_s=5)
