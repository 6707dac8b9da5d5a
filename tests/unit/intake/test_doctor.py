"""The daemon's own examination, and what a probe is told. M162"""

import os
import time
from functools import partial
from typing import Any

import anyio
import pytest
import structlog

from ckptd.catalog import checkpoints
from ckptd.errors import DiskFault
from ckptd.events import Bus, Event
from ckptd.intake import doctor as examination
from ckptd.intake.alarm import LEVELS, announce
from ckptd.intake.trouble import CHECKS
from ckptd.model import Damage
from ckptd.worker.protocol import Usage, Used
from tests.support.in_process import Training, daemon

pytestmark = pytest.mark.anyio


def named(check: dict[str, Any]) -> str:
    """The name as CHECKS has it."""
    head = check["name"].partition(" /")[0]
    return f"{head} *" if f"{head} *" in CHECKS else check["name"]


async def examined(line: Any) -> dict[str, dict[str, Any]]:
    checks = (await line.ask("doctor"))["checks"]
    assert {named(check) for check in checks} <= set(CHECKS)
    assert len({check["name"] for check in checks}) == len(checks), "two lines of one name"
    assert all(check["hint"] for check in checks if check["status"] != "ok")
    return {check["name"]: check for check in checks}


async def test_a_daemon_that_is_well_has_a_line_for_each_check(short_dir):
    """What is not asked about can't be found wrong."""
    async with daemon(short_dir) as node, node.connect() as line:
        await (await Training(line, str(node.runs)).open()).saved(1)
        found = await examined(line)
        lines = {named(check) for check in found.values()}
        of_the_command = {"configuration", "state directory", "socket", "daemon", "versions"}
        only_when_wrong = {"stop", "mount *", "worker *", "watching *", "alert *", "retention *"}
        assert lines == set(CHECKS) - of_the_command - only_when_wrong
        assert found["checkpoints"]["status"] == "ok"


async def test_a_damaged_checkpoint_is_counted_until_it_is_good_again(short_dir):
    async with daemon(short_dir, front=True) as node, node.connect() as line:
        one = await (await Training(line, str(node.runs)).open()).saved(1)
        await node.write(
            lambda tx: checkpoints.mark_corrupt(tx, one, [Damage("model.safetensors", "digest", "byte 7")])
        )
        found = (await examined(line))["checkpoints"]
        assert (found["status"], found["detail"]) == ("warn", "1 corrupt, 0 missing")
        assert "ckpt cleanup" in found["hint"]


async def test_a_save_that_waits_long_in_the_spool_is_named(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        path = short_dir / "state" / "spool" / f"{'a' * 32}.arena"
        path.write_bytes(b"x")
        assert (await examined(line))["spool"]["detail"] == "1 files wait"
        old_s = time.time() - examination.SPOOLED_S_MAX - 60
        os.utime(path, (old_s, old_s))
        found = (await examined(line))["spool"]
        assert found["status"] == "warn"
        assert "1 files have waited" in found["detail"]


async def test_a_root_that_can_not_be_read_fails_with_a_hint_once(short_dir, monkeypatch):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        await (await Training(line, str(node.runs)).open()).save(1)

        async def refuse(*_: Any, **__: Any) -> None:
            raise DiskFault("Read-only file system")

        monkeypatch.setattr(node.parts.workers, "call", refuse)
        found = (await examined(line))[f"root {node.runs}"]
        assert (found["status"], found["detail"]) == ("fail", "Read-only file system")
        assert "ReadWritePaths" in found["hint"]


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        ({"unwritable": "the file system is mounted read-only"}, "fail", "ReadWritePaths"),
        ({"free_bytes": 1}, "fail", "free space"),
        ({"free_bytes": 5}, "warn", "free space"),
        ({}, "ok", ""),
    ],
)
async def test_a_root_without_room_or_right_to_write_is_named(short_dir, monkeypatch, given, status, words):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        await (await Training(line, str(node.runs)).open()).save(1)
        used = Used(
            **{"total_bytes": 100, "free_bytes": 50, "filesystem": "x", "direct_io": True, "leases": True} | given
        )

        call = node.parts.workers.call

        async def answer(request: Any, **more: Any) -> Any:
            return used if isinstance(request, Usage) else await call(request, **more)

        monkeypatch.setattr(node.parts.workers, "call", answer)
        found = (await examined(line))[f"root {node.runs}"]
        assert found["status"] == status
        assert words in found["hint"]


async def test_a_catalog_that_does_not_answer_fails_its_lines_and_no_others(short_dir, monkeypatch):
    monkeypatch.setattr(examination, "ANSWER_S", 0.1)
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        monkeypatch.setattr(examination.Doctor, "_roots", lambda *_: _none())

        async def hang(*_: Any) -> None:
            await anyio.sleep_forever()

        monkeypatch.setattr(node.parts.catalog, "read", hang)
        for _ in range(5):  # a busy machine may make another check late, too, but not each time
            found = await examined(line)
            failed = {name for name, check in found.items() if check["status"] == "fail"}
            if failed == {"catalog", "jobs", "checkpoints"}:
                break
        assert failed == {"catalog", "jobs", "checkpoints"}


async def _none() -> list[Any]:
    return []


async def test_a_probe_is_answered_while_disks_and_catalog_hang(short_dir, monkeypatch):
    """It must tell a hung disk from a hung daemon."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:

        async def hang(*_: Any, **__: Any) -> None:
            await anyio.sleep_forever()

        for part, verb in ((node.parts.workers, "call"), (node.parts.catalog, "read"), (node.parts.catalog, "write")):
            monkeypatch.setattr(part, verb, hang)
        with anyio.fail_after(30):  # they hang for ever
            answer = await line.ask("health")
        assert answer["well"] is True
        assert [one["what"] for one in answer["degraded"]] == ["fd store"]  # no service manager in this process
        assert answer["line"].startswith("serving, with warnings: fd store")
        node.parts.vitals.draining = True
        answer = await line.ask("health")
        assert (answer["well"], answer["degraded"][0]["what"]) == (False, "stop")


@pytest.mark.parametrize(("name", "level"), LEVELS.items())
def test_lost_data_is_logged_as_critical_and_the_rest_at_its_level(name, level):
    with structlog.testing.capture_logs() as said:
        announce(Bus(), Event(name, None, experiment="e", checkpoint="c"))
    assert [(entry["event"], entry["log_level"]) for entry in said] == [(name, level)]


def test_an_event_that_is_no_alarm_is_published_and_not_logged():
    with structlog.testing.capture_logs() as said:
        announce(Bus(), Event("checkpoint.verified", None))
    assert said == []


async def test_a_corrupt_checkpoint_is_in_the_log_with_its_path(short_dir):
    """From the commit that made it true to the line, through the real catalog."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        one = await (await Training(line, str(node.runs)).open()).save(1)
        node.parts.catalog._writer.publish = partial(announce, node.parts.bus)
        with structlog.testing.capture_logs() as said:
            await node.write(lambda tx: checkpoints.mark_failed(tx, one, {"code": "no_space", "message": "full"}))
        (entry,) = [entry for entry in said if entry["event"] == "checkpoint.failed"]
        assert (entry["log_level"], entry["checkpoint"]) == ("critical", one)
