"""When to save: every so many epochs, steps or minutes, decided without I/O, what is let pass counted. M008"""

import builtins
import math
import os
import socket
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptd_client.cadence import Cadence
from ckptd_client.experiment import Experiment


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@given(st.integers(1, 50), st.lists(st.integers(1, 40), max_size=80))
def test_a_multiple_that_was_passed_over_is_due_once(every: int, strides: list[int]):
    """Trainers that ask at every tenth step, or after gradient accumulation, miss no save."""
    cadence = Cadence(steps=every)
    step = due = 0
    multiples: set[int] = set()
    for stride in strides:
        before, step = step, step + stride
        was_due = cadence.due(step)
        passed = {multiple for multiple in range(every, step + 1, every) if multiple > before}
        if before:  # the first question knows of nothing that was passed over
            assert was_due == bool(passed)
        multiples |= passed
        due += was_due
    assert cadence.due_count == due
    assert cadence.due_count + cadence.skipped_count == len(strides)


@given(st.floats(0.1, 100), st.lists(st.floats(0, 60), max_size=80))
def test_no_two_saves_lie_closer_than_the_time_between_them(seconds: float, gaps: list[float]):
    clock = Clock()
    cadence = Cadence(seconds=seconds, clock=clock)
    last_s = 0.0
    for gap in gaps:
        clock.now_s += gap
        due = cadence.due()
        assert due == (clock.now_s - last_s >= seconds)
        last_s = clock.now_s if due else last_s


def test_whichever_limit_comes_first_makes_it_due_and_the_time_begins_anew():
    clock = Clock()
    cadence = Cadence(epochs=5, steps=100, seconds=600, clock=clock)
    assert not cadence.due(step=99, epoch=0.9)
    assert cadence.due(step=100, epoch=1.0)
    clock.now_s = 599.0
    assert not cadence.due(step=150, epoch=1.5)
    clock.now_s = 600.0
    assert cadence.due(step=160, epoch=1.6)
    assert cadence.due(step=170, epoch=5.0)
    clock.now_s = 1199.0
    assert not cadence.due(step=171, epoch=5.1)
    assert (cadence.due_count, cadence.skipped_count) == (3, 3)


def test_a_training_that_went_back_is_asked_anew():
    cadence = Cadence(steps=10)
    assert cadence.due(100)
    assert not cadence.due(53)
    assert cadence.due(60)


@pytest.mark.parametrize("said", [None, math.nan, math.inf, "many", [], {}, object(), torch.ones(3), 1e300, -5, True])
def test_whatever_the_loop_says_it_never_raises(said: Any):
    cadence = Cadence(steps=10, epochs=2, seconds=1e9)
    assert cadence.due(step=said, epoch=said) in {True, False}
    assert cadence.due(step=10, epoch=2)


def test_numbers_of_tensors_count():
    assert Cadence(steps=10).due(torch.tensor(20))
    assert Cadence(epochs=2).due(epoch=torch.tensor(2.5))


def test_a_decision_touches_no_file_no_socket_and_no_process(monkeypatch: pytest.MonkeyPatch):
    cadence = Cadence(steps=10, seconds=1, epochs=1)

    def forbidden(*_args: Any, **_more: Any) -> None:
        raise AssertionError("a decision did I/O")

    with monkeypatch.context() as patch:
        for owner, name in ((builtins, "open"), (os, "open"), (os, "write"), (os, "stat"), (socket, "socket")):
            patch.setattr(owner, name, forbidden)
        assert cadence.due(step=10, epoch=1)


def test_what_an_experiment_lets_pass_is_in_its_figures(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("CKPTD_MODE", "disabled")
    run = Experiment("n", dir=tmp_path)
    often, rarely = run.every(steps=2), run.every(steps=100)
    for step in range(1, 11):
        often.due(step)
        rarely.due(step)
    assert run.stats()["not_due"] == 5 + 10
