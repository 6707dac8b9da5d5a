"""flush() says True for what is safe, and for nothing else."""

from pathlib import Path

import pytest

import ckptd_client as ckptd
from ckptd_client import metrics
from tests.support.fake_daemon import FakeDaemon
from tests.support.node import eventually
from tests.support.saving import state

FULL_BYTES = 1000  # a spool that takes no image


def test_a_save_that_neither_a_daemon_nor_the_spool_has_is_not_safe(home: Path, daemon: FakeDaemon):
    run = ckptd.Experiment("net", dir=home / "r", spool_bytes_max=FULL_BYTES)
    assert run.prepare(state(1), wait_s=30)
    daemon.silent_on.add("commit")
    handle = run.save(state(2), step=2)
    daemon.wait_for("commit")
    daemon.stop()
    assert not run.flush(30)
    assert not handle.spooled
    assert not handle.acknowledged
    assert not run.flush(30), "it is as unsafe as before"
    daemon.silent_on.clear()
    daemon.start()
    handle.wait("staged", timeout=30)
    assert run.flush(30)
    run.close(timeout_s=5)


def test_a_save_that_the_daemon_refused_is_not_safe_and_is_told_once(daemon: FakeDaemon, run: ckptd.Experiment):
    daemon.refuse["commit"] = "quota"
    run.save(state(1), step=1)
    assert not run.flush(30)
    daemon.refuse.clear()
    run.save(state(2), step=2)
    assert run.flush(30)


def test_an_image_that_the_spool_did_not_take_is_not_safe(home: Path):
    run = ckptd.Experiment("net", dir=home / "r", spool_bytes_max=FULL_BYTES)
    run.save(state(1), step=1)
    assert not run.flush(30)
    assert run.flush(30), "nothing was lost since"
    run.close(timeout_s=5)


def test_an_offer_that_the_spool_did_not_take_is_not_safe(home: Path, lone: ckptd.Experiment):
    (home / "state").mkdir(mode=0o700, exist_ok=True)
    (home / "state" / "spool").write_text("a file where the directory should be")
    handle = lone.submit(home / "file.pt", step=1)
    assert not lone.flush(30)
    assert handle.state == "failed"


def test_an_offer_that_the_daemon_refused_is_not_safe(home: Path, daemon: FakeDaemon, run: ckptd.Experiment):
    daemon.refuse["submit"] = "bad_path"
    run.submit(home / "file.pt", step=1)
    assert not run.flush(30)
    daemon.refuse.clear()
    run.submit(home / "file.pt", step=2)
    assert run.flush(30)


def test_metrics_that_wait_for_a_daemon_are_not_safe_until_one_has_them(daemon: FakeDaemon, run: ckptd.Experiment):
    assert run.flush(30)
    daemon.stop()
    run.log({"loss": 1.0}, step=1)
    assert not run.flush(0.5)
    daemon.start()
    eventually(lambda: run.stats()["connected"], "the connection to stand again")
    assert run.flush(30)
    assert run.stats()["metrics_waiting"] == 0


def test_metrics_that_were_refused_or_dropped_are_not_safe_and_are_told_once(
    daemon: FakeDaemon, run: ckptd.Experiment, caplog: pytest.LogCaptureFixture
):
    """They are nowhere; flush() said True of them."""
    assert run.flush(30)
    daemon.refuse["metrics"] = "bad_request"
    run.log({"loss": 1.0}, step=1)
    assert not run.flush(30)
    daemon.refuse.clear()
    run.log({"loss": 2.0}, step=2)
    assert run.flush(30)
    run.log(dict.fromkeys((f"m{number}" for number in range(metrics.BUFFER_POINTS_MAX + 1)), 1.0), step=3)
    assert run.stats()["metrics_dropped"] == 2
    run.close(timeout_s=60)
    (said,) = [record.getMessage() for record in caplog.records if "brought to safety" in record.getMessage()]
    assert said.endswith("2 were dropped")
