"""The log: structured, masked, escaped, rate-limited, and never in the way of the event loop. M023"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
import structlog

from ckptd import config, errors, log


@dataclass
class Clock:
    """Time as the test says."""

    seconds: float = 0.0

    def now(self) -> datetime:
        return datetime(2030, 1, 1, 12, 30, tzinfo=UTC)

    def monotonic_s(self) -> float:
        return self.seconds


class Scene:
    def __init__(self, **settings) -> None:
        self.clock = Clock()
        self._read, self.write = os.pipe()
        self.log = log.start(config.Log(**settings), self.clock, self.write)

    def text(self) -> str:
        self.log._sink.close(60.0)
        os.close(self.write)
        with open(self._read) as pipe:
            return pipe.read()

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.text().splitlines()]


@pytest.fixture
def scene() -> Iterator[type[Scene]]:
    before, sinks = (logging.getLogger().handlers, logging.getLogger().level), log._sinks[:]
    yield Scene
    log._sinks[:] = sinks  # what they lost is no trouble of a daemon of the next tests
    structlog.reset_defaults()
    logging.getLogger().handlers, logging.getLogger().level = before


def test_a_record_is_one_json_line_with_its_facts_as_fields(scene):
    here = scene()
    log.get("pipeline", experiment="e" * 32).info("checkpoint.published", step=7, job="j", uid=1000, ms=1.5)
    assert here.lines() == [
        {
            "timestamp": "2030-01-01T12:30:00.000+00:00",
            "level": "info",
            "event": "checkpoint.published",
            "source": "pipeline",
            "experiment": "e" * 32,
            "step": 7,
            "job": "j",
            "uid": 1000,
            "ms": 1.5,
        }
    ]


def test_what_is_below_the_level_is_not_said(scene):
    here = scene(level="warning")
    log.get().info("a.b")
    log.get().warning("c.d")
    assert [line["event"] for line in here.lines()] == ["c.d"]


@pytest.mark.parametrize(
    ("facts", "canary"),
    [
        ({"token": "canary"}, "canary"),
        ({"headers": {"Authorization": "Bearer canary-canary"}}, "canary"),
        ({"text": "sent Authorization: Bearer canary.canary-1"}, "canary"),
        ({"url": "postgresql://me:canary@host/db"}, "canary"),
        ({"text": "GET /x?X-Amz-Signature=canary&a=1"}, "canary"),
        ({"text": "password=canary next"}, "canary"),
        ({"db_password": ["canary"]}, "canary"),
        ({"nested": [{"api_key": "canary"}]}, "canary"),
    ],
)
@pytest.mark.parametrize("style", ["json", "console"])
def test_secrets_never_reach_a_line(scene, style, facts, canary):
    """S28."""
    here = scene(format=style)
    log.get().info("a.b", **facts)
    text = here.text()
    assert canary not in text
    assert "***" in text


def test_counts_of_tokens_are_no_secrets(scene):
    here = scene()
    log.get().info("a.b", tokens=5, token=True)
    assert here.lines()[0]["tokens"] == 5


@pytest.mark.parametrize("style", ["json", "console"])
def test_names_from_users_can_not_forge_lines_or_move_the_cursor(scene, style):
    here = scene(format=style)
    log.get().info("a.b", name="x\n{}\x1b[31m\u202ey\x9b2J", **{"k\ny": 1})
    text = here.text()
    assert text.count("\n") == 1
    assert not set("\x1b\u202e\x9b") & set(text)


def test_a_file_name_that_is_no_utf8_is_logged_all_the_same(scene):
    here = scene()
    log.get().info("a.b", path=os.fsdecode(b"/r\xff"))
    assert here.lines()[0]["path"].startswith("/r\\u")


def test_numbers_that_json_does_not_know_are_named(scene):
    here = scene()
    log.get().info("a.b", loss=float("nan"), best=float("-inf"))
    assert (here.lines()[0]["loss"]) == "NaN"


def test_one_cause_is_said_once_in_thirty_seconds_with_the_count(scene):
    here = scene()
    for second in (0, 1, 2, 29, 30, 31):
        here.clock.seconds = second
        log.get().warning("intake.refused", cause="quota")
        log.get().warning("intake.refused", cause=f"other {second}")
    said = [(line["cause"], line.get("repeated")) for line in here.lines() if line["cause"] == "quota"]
    assert said == [("quota", None), ("quota", 3)]


def test_what_has_no_cause_is_never_held_back(scene):
    """Two damaged checkpoints are two facts."""
    here = scene()
    for _ in range(5):
        log.get().error("checkpoint.corrupt")
    assert len(here.lines()) == 5


def test_an_error_is_logged_with_its_code_and_where_it_came_from(scene):
    here = scene()

    def deep() -> None:
        raise errors.DiskFault("EIO", file="a")

    try:
        deep()
    except errors.DiskFault as error:
        log.get().error("publish.failed", exc_info=error)
    found = here.lines()[0]["error"]
    assert (found["type"], found["code"]) == ("DiskFault", "disk_fault")
    assert "deep" in found["trace"][-1]


def test_libraries_speak_through_the_same_sink(scene):
    here = scene()
    logging.getLogger("somebody").warning("slow %s", "query")
    assert here.lines()[0]["message"] == "slow query"


def test_a_terminal_gets_readable_lines(scene):
    here = scene(format="console")
    log.get().info("checkpoint.published", step=7, path="/a b")
    assert here.text() == '12:30:00.000 info     checkpoint.published  step=7 path="/a b"\n'


def test_a_line_has_a_bound(scene):
    here = scene()
    log.get().info("a.b", text="x" * 100_000, step=1)
    line = here.lines()[0]
    assert len(line["text"]) < 1000
    assert line["step"] == 1


def test_a_blocked_sink_blocks_nobody_and_the_losses_are_counted(scene):
    """F29: nobody reads the pipe; ten thousand lines later the caller has not waited."""
    here = scene()
    worst_s = 0.0
    for _ in range(log.QUEUED_MAX + 2000):
        began = time.perf_counter()
        log.get().info("a.b", text="x" * 300)
        worst_s = max(worst_s, time.perf_counter() - began)
    assert worst_s < 20.0, "a line that waits for a reader waits for ever"
    assert here.log.dropped > 1000
    # Once somebody reads, lines flow again and say what is missing.
    chunks = []
    reader = threading.Thread(target=lambda: chunks.extend(iter(lambda: os.read(here._read, 1 << 16), b"")))
    reader.start()
    here.log._sink.close(60.0)
    os.close(here.write)
    reader.join()
    lines = [json.loads(line) for line in b"".join(chunks).splitlines()]
    assert sum(line["count"] for line in lines if line["event"] == "log.dropped") == here.log.dropped


def test_closing_a_blocked_sink_waits_only_so_long(scene, monkeypatch):
    here = scene()
    for _ in range(2000):
        log.get().info("a.b", text="x" * 300)
    began = time.monotonic()
    here.log._sink.close(0.1)
    assert time.monotonic() - began < 20  # nobody reads it, ever
    reader = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(here._read, 1 << 16), b"")])
    reader.start()
    here.log._sink.close(60.0)
    os.close(here.write)
    reader.join()
