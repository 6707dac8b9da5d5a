"""Metrics told after a save: none is lost while a daemon comes and goes, and none holds up the others (M106)."""

import time
from typing import Any

import pytest

from ckptd_client import Experiment, late
from ckptd_client.late import LateMetrics
from tests.support.saving import BOUND_S, LONG_S

ONE, TWO = "1" * 32, "2" * 32


class Line:
    """A connection that keeps what was asked, until the test answers."""

    def __init__(self) -> None:
        self.is_up = True
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._reply: Any = None

    def request_nowait(self, op: str, on_reply: Any, **fields: Any) -> bool:
        assert op == "checkpoint.metrics"
        if self.is_up:
            self.asked.append((fields["checkpoint"], fields["metrics"]))
            self._reply = on_reply
        return self.is_up

    def answer(self, code: str = "") -> None:
        reply, self._reply = self._reply, None
        reply({"ok": False, "error": {"code": code}} if code else {"ok": True}, [])


class Session:
    """As much of a session as is asked for."""

    def __init__(self) -> None:
        self.connection = Line()
        self.said: list[str] = []

    def say(self, topic: str, message: str, *_: Any) -> None:
        self.said.append(message)


@pytest.fixture
def session() -> Session:
    return Session()


def test_the_next_is_told_when_the_one_before_is_confirmed(session: Session) -> None:
    told = LateMetrics(session)  # type: ignore[arg-type]
    told.put(ONE, {"loss": 0.5})
    told.put(TWO, {"loss": float("nan")})
    assert session.connection.asked == [(ONE, {"loss": 0.5})]
    session.connection.answer()
    assert session.connection.asked[1:] == [(TWO, {"loss": "NaN"})]
    session.connection.answer()
    assert told.settle(time.monotonic())


def test_what_is_said_twice_can_not_arrive_in_the_wrong_order(session: Session) -> None:
    told = LateMetrics(session)  # type: ignore[arg-type]
    told.put(ONE, {"loss": 0.5})
    told.put(ONE, {"loss": 0.1, "acc": 0.9})  # while the first is on its way
    session.connection.answer()
    assert session.connection.asked[1:] == [(ONE, {"loss": 0.1, "acc": 0.9})]


@pytest.mark.parametrize("code", ["not_found", "busy", "unreachable"])
def test_what_may_pass_is_told_again_behind_the_others(session: Session, code: str) -> None:
    told = LateMetrics(session)  # type: ignore[arg-type]
    told.put(ONE, {"loss": 0.5})
    told.put(TWO, {"loss": 0.4})
    session.connection.answer(code)
    told.tend()
    session.connection.answer()
    assert [checkpoint for checkpoint, _ in session.connection.asked] == [ONE, TWO, ONE]


def test_what_is_refused_for_good_is_dropped_and_said(session: Session) -> None:
    told = LateMetrics(session)  # type: ignore[arg-type]
    told.put(ONE, {"loss": 0.5})
    session.connection.answer("not_authorized")
    assert told.settle(time.monotonic())
    assert len(session.said) == 1


def test_without_a_daemon_it_waits_and_a_flush_does_not(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late, "LOOK_S", LONG_S)
    told = LateMetrics(session)  # type: ignore[arg-type]
    session.connection.is_up = False
    begun_s = time.monotonic()
    told.put(ONE, {"loss": 0.5})
    assert not told.settle(begun_s + LONG_S)
    assert time.monotonic() - begun_s < BOUND_S
    session.connection.is_up = True
    told.tend()
    assert session.connection.asked == [(ONE, {"loss": 0.5})]


def test_a_daemon_that_never_finds_it_is_asked_a_bounded_number_of_times(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late, "LOOK_S", 0.001)
    told = LateMetrics(session)  # type: ignore[arg-type]
    ask = session.connection.request_nowait

    def answered(op: str, on_reply: Any, **fields: Any) -> bool:
        ask(op, on_reply, **fields)
        session.connection.answer("not_found")
        return True

    monkeypatch.setattr(session.connection, "request_nowait", answered)
    told.put(ONE, {"loss": 0.5})
    assert not told.settle(time.monotonic() + 30)
    assert len(session.connection.asked) <= late.TRIES_MAX + 1


def test_the_queue_has_a_limit_and_says_when_it_drops(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late, "WAITING_MAX", 3)
    session.connection.is_up = False
    told = LateMetrics(session)  # type: ignore[arg-type]
    for number in range(5):
        told.put(f"{number:032x}", {"loss": 1.0})
    assert [len(told._waiting), len(session.said)] == [3, 2]


@pytest.mark.parametrize("wrong", ["latest", 7, None, "F" * 32])
def test_a_checkpoint_is_a_handle_or_an_id(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_MODE", "disabled")
    run = Experiment("x")
    with pytest.raises(ValueError, match="checkpoint"):
        run.measured(wrong, {"loss": 1.0})
    run.measured(ONE, {"loss": 1.0})
