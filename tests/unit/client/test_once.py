"""Warnings: one line for each trouble, and a bounded memory of what was said."""

import logging
import threading

import pytest

from ckptd_client import once
from ckptd_client.once import Once


def test_a_trouble_is_one_line_until_it_is_over(caplog: pytest.LogCaptureFixture):
    said = Once()
    with caplog.at_level(logging.WARNING, "ckptd"):
        for _ in range(3):
            said.say("disk", "the disk is %s", "full")
        assert said.unsay("disk")
        assert not said.unsay("disk")
        said.say("disk", "the disk is %s", "full")
    mine = [record.getMessage() for record in caplog.records if record.thread == threading.get_ident()]
    assert mine == ["ckptd: the disk is full"] * 2


def test_of_thousands_of_failed_saves_no_more_than_some_are_remembered():
    said = Once()
    said.say("down", "the daemon is gone")
    for number in range(10 * once.TOPICS_MAX):
        said.say(f"ended {number}", "step %s was not saved", number)
        said.say("down", "the daemon is gone")
    assert len(said) == once.TOPICS_MAX
    assert said.unsay("down"), "what is said all the time was forgotten"
