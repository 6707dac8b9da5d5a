"""An experiment's arguments, modes, metrics, forks and end."""

import gc
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import ckptd_client as ckptd
from ckptd_client import control, spool
from tests.support.fake_daemon import FakeDaemon, descriptor_of
from tests.support.node import eventually
from tests.support.saving import spooled_image, state, value_in


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "name=''"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"name": ".hidden"}, "name='.hidden'"),
        ({"name": "n", "project": "p\n"}, "project="),
        ({"name": "n", "tags": "abc"}, "tags='abc'"),
        ({"name": "n", "tags": [""]}, "tags=''"),
        ({"name": "n", "dir": ""}, "dir=''"),
        ({"name": "n", "resume": "maybe"}, "resume='maybe' must be one of allow, never, must"),
        ({"name": "n", "on_overlap": "drop"}, "on_overlap='drop'"),
        ({"name": "n", "overlap_wait_s": -1}, "overlap_wait_s=-1"),
        ({"name": "n", "format": "pickle"}, "format='pickle'"),
        ({"name": "n", "config": 5}, "config of type int"),
        ({"name": "n", "config": "/none.json"}, "config='/none.json'"),
        ({"name": "n", "socket": "/" + "x" * 200}, "107 at most"),
        ({"name": "n", "autostart": "yes"}, "autostart='yes'"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_rule(home: Path, arguments: dict[str, object], message: str):
    """M019"""
    with pytest.raises(ValueError) as caught:
        ckptd.Experiment(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step=-1"),
        ({"step": 1.5}, "step=1.5"),
        ({"step": True}, "step=True"),
        ({"step": "7"}, "step='7'"),
        ({"epoch": math.inf}, "epoch=inf"),
        ({"metrics": [1]}, "metrics=[1]"),
        ({"metrics": {"loss": "low"}}, "metrics['loss']='low'"),
        ({"metrics": {1: 1.0}}, "metric name 1"),
        ({"note": 5}, "note=5"),
        ({"meta": []}, "meta=[]"),
        ({"update_best": 1}, "update_best=1"),
        ({"format": "npz"}, "format='npz'"),
        ({"on_overlap": ""}, "on_overlap=''"),
    ],
)
def test_a_bad_argument_of_save_is_named(lone: ckptd.Experiment, arguments: dict[str, object], message: str):
    """M019"""
    with pytest.raises(ValueError) as caught:
        lone.save({}, **arguments)
    assert message in str(caught.value)


def test_numbers_of_torch_and_numpy_are_steps_and_metrics(run: ckptd.Experiment, daemon: FakeDaemon):
    import numpy as np

    handle = run.save(state(1), step=np.int64(5), metrics={"a": torch.tensor(0.5), "b": np.float32(2)})
    found = descriptor_of(daemon.wait_staged(handle.id))
    assert (found["step"], found["metrics"]) == (5, {"a": 0.5, "b": 2.0})


def test_resume_must_raises_what_the_daemon_says(home: Path, daemon: FakeDaemon):
    daemon.refuse["experiment.open"] = "not_found"
    with pytest.raises(ckptd.NotFound):
        ckptd.Experiment("net", dir=home / "r", resume="must")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_saves_over_a_session_of_its_own(run: ckptd.Experiment, daemon: FakeDaemon):
    """The parent's session, its arena and its connection are none of the child's."""
    assert run.prepare(state(1), wait_s=30)
    daemon.arenas_max = 8
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            handle = run.save(state(2), step=2)
            os.write(write_end, handle.id.encode())
            handle.wait("staged", timeout=30)
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    child_save = os.read(read_end, 32).decode()
    os.close(read_end)
    image = daemon.wait_staged(child_save)
    assert value_in(image) == 2.0
    assert control.read(image).pid == pid, "the child wrote into an arena that was lent to its parent"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    handle = run.save(state(1), step=1)
    assert value_in(daemon.wait_staged(handle.id)) == 1.0
    handle.wait("staged", timeout=30)
    assert {r["pid"] for r in daemon.of("hello")} == {os.getpid(), pid}
    assert len(daemon.of("hello")) == 2, "the parent had to reconnect: the child closed its session"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_never_saves_ends_without_a_word_to_the_daemon(run: ckptd.Experiment, daemon: FakeDaemon):
    """Data loader workers are such children: the experiment must not be closed by them."""
    daemon.wait_for("experiment.open")
    pid = os.fork()
    if pid == 0:
        run._at_exit()
        os._exit(0)
    os.waitpid(pid, 0)
    handle = run.save(state(1), step=1)
    daemon.wait_staged(handle.id)
    assert not daemon.of("experiment.close")
    assert len(daemon.of("hello")) == 1


def test_saves_from_several_threads_are_all_whole(run: ckptd.Experiment, daemon: FakeDaemon):
    daemon.auto_publish = True
    handles: dict[int, ckptd.Handle] = {}

    def work(first: int) -> None:
        for step in range(first, first + 5):
            handles[step] = run.save(state(step, size=20_000), step=step)

    threads = [threading.Thread(target=work, args=(n * 10,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handles) == 20
    for step, handle in handles.items():
        assert value_in(daemon.wait_staged(handle.id)) == float(step)


def test_disabled_mode_does_nothing_with_the_same_types(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CKPTD_MODE", "disabled")
    before = threading.active_count()
    with ckptd.Experiment("net", dir=home / "r") as run:
        handle = run.save(state(1), step=1)
        assert isinstance(handle, ckptd.Handle)
        assert handle.wait("verified") is handle
        assert handle.state == "disabled"
        assert run.load() is None
        assert run.path() is None
        assert run.submit("/x").state == "disabled"
        run.log({"a": 1})
        run.tag("x")
        assert isinstance(run.stats(), dict)
        assert run.every(steps=2).due(2)
    assert threading.active_count() <= before
    assert not (home / "state").exists()


def test_offline_mode_never_looks_for_a_daemon(home: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CKPTD_MODE", "offline")
    run = ckptd.Experiment("net", dir=home / "r")
    handle = run.save(state(2), step=2)
    assert value_in(spooled_image(home, handle)) == 2.0
    run.close()
    assert not daemon.requests


def test_metrics_arrive_in_batches_within_a_second(run: ckptd.Experiment, daemon: FakeDaemon):
    """M110, M111"""
    for step in range(2500):
        run.log({"loss": float(step)}, step=step)
    run.log({"loss": math.nan, "grad": math.inf}, step=2500)
    assert run.flush(30)
    batches = [request["points"] for request in daemon.of("metrics")]
    points = [point for batch in batches for point in batch]
    assert max(len(batch) for batch in batches) <= 1000
    assert [p[1] for p in points if p[0] == "loss"] == list(range(2501))
    assert [p[2] for p in points[-2:]] == ["NaN", "Infinity"]


def test_metrics_without_an_answer_are_sent_again(run: ckptd.Experiment, daemon: FakeDaemon):
    daemon.hang_up_on.add("metrics")
    run.log({"loss": 1.0}, step=1)
    daemon.wait_for("metrics")
    daemon.hang_up_on.clear()
    daemon.wait_for("metrics", 2)
    # The second may have met the same end: a flush while there is no connection does not wait for metrics.
    eventually(lambda: run.flush(30) and run.stats()["metrics_waiting"] == 0, "them to be confirmed")


def test_an_exception_marks_the_experiment_failed(home: Path, daemon: FakeDaemon):
    """M119"""
    with pytest.raises(ZeroDivisionError), ckptd.Experiment("net", dir=home / "r"):
        raise ZeroDivisionError("x")
    (closed,) = daemon.of("experiment.close")
    assert (closed["status"], closed["error"]) == ("failed", "ZeroDivisionError: x")


def test_handles_climb_after_close(home: Path, daemon: FakeDaemon):
    with ckptd.Experiment("net", dir=home / "r") as run:
        handle = run.save(state(1), step=1)
    assert daemon.of("experiment.close")[0]["status"] == "completed"
    daemon.publish(handle.id)
    handle.wait("durable", timeout=30)
    late = run.save(state(2), step=2)
    assert late.state == "failed"


def test_a_script_that_just_ends_brings_its_save_to_the_spool(home: Path):
    """atexit: the image is written although nobody called close()."""
    script = (
        "import numpy, ckptd_client as c\n"
        f"run = c.Experiment('net', dir={str(home / 'r')!r})\n"
        "print(run.save({'model': {'w': numpy.full(50000, 7.0, 'float32')}}, step=7).id)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    image = Path(spool.arena_path(str(home / "state" / "spool"), found.stdout.strip())).read_bytes()
    assert value_in(image) == 7.0


def test_every_decides_without_asking_anyone(lone: ckptd.Experiment):
    """M008"""
    every = lone.every(steps=100, epochs=5)
    due = [step for step in range(0, 501, 10) if every.due(step)]
    assert due == [100, 200, 300, 400, 500]
    assert every.due(505, epoch=5.2)
    assert lone.stats()["not_due"] == 46
    with pytest.raises(ValueError, match="at least one"):
        lone.every()
    with pytest.raises(ValueError, match="steps=0"):
        lone.every(steps=0)


def test_every_sees_a_multiple_that_was_passed_over_and_the_clock():
    from ckptd_client.cadence import Cadence

    now_s = 0.0
    every = Cadence(steps=100, seconds=60, clock=lambda: now_s)
    assert [every.due(step) for step in (90, 130, 160)] == [False, True, False]
    now_s = 61.0
    assert every.due(170)
    assert not every.due(171)


def test_submit_offers_a_path_and_follows_it(run: ckptd.Experiment, daemon: FakeDaemon, home: Path):
    handle = run.submit(home / "ckpt.pt", step=3, metrics={"loss": 0.5})
    (request,) = daemon.wait_for("submit")
    assert request["path"] == str(home / "ckpt.pt")
    assert (request["project"], request["experiment"], request["step"]) == ("vision", "net", 3)
    daemon.publish(handle.id)
    handle.wait(timeout=30)


def test_submit_without_a_daemon_leaves_an_offer(lone: ckptd.Experiment, home: Path):
    handle = lone.submit(home / "ckpt.pt", step=3)
    assert handle.wait_settled(30)
    offer = spool.read_offer(spool.offer_path(str(home / "state" / "spool"), handle.id))
    assert offer is not None
    assert (offer["path"], offer["checkpoint"]) == (str(home / "ckpt.pt"), handle.id)


def test_a_spooled_offer_of_a_known_path_is_followed_under_the_id_it_is_known_by(
    run: ckptd.Experiment, daemon: FakeDaemon, home: Path
):
    """A scan had found the file before: nothing is ever said again of the id under which it was offered."""
    daemon.wait_for("experiment.open")
    daemon.stop()
    handle = run.submit(home / "ckpt.pt", step=3)
    assert handle.wait_settled(30)
    assert handle.spooled
    offered, known = handle.id, "ab" * 16
    daemon._submit = lambda _: {"checkpoint": known, "level": "durable", "state": "live"}
    daemon.start()
    handle.wait(timeout=30)
    assert (handle.id, handle.level) == (known, "durable")
    daemon.publish(known, "verified")
    handle.wait("verified", timeout=30)
    assert [request["checkpoint"] for request in daemon.of("submit")] == [offered], "asked once, and not ever again"


def test_a_script_submits_without_an_experiment(home: Path):
    script = (
        "import ckptd_client as c; from ckptd_client import offers; offers.ANSWER_S = 30.0\n"
        f"h = c.submit({str(home / 'x.pt')!r}, step=1); print(h.id, h.spooled)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    checkpoint, spooled = found.stdout.split()
    assert spooled == "True"
    assert Path(spool.offer_path(str(home / "state" / "spool"), checkpoint)).exists()


def test_importing_the_package_brings_in_only_the_standard_library_and_is_quick():
    """M031. Quick: a script that imports asyncio waits longer, on any machine."""

    def imported(package: str, then: str = "") -> tuple[float, set[str]]:
        """Return the ms of processor time, and what came along that is not Python's own."""
        script = (
            f"import sys, time; before = set(sys.modules); t = time.process_time(); import {package}\n"
            f"ms = (time.process_time() - t) * 1000\n{then}\n"
            "tops = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
            f"print(ms, *(tops - set(sys.stdlib_module_names) - {{'{package}'}}))"
        )
        command = [sys.executable, "-c", script]
        ms, *names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return float(ms), set(names)

    # In turns: a while in which the machine is slow must not hit one of the two alone.
    pairs = [
        (imported("ckptd_client", "ckptd_client.Experiment, ckptd_client.submit"), imported("asyncio"))
        for _ in range(4)
    ]
    assert min(ours[0] for ours, _ in pairs) < min(theirs[0] for _, theirs in pairs)
    assert {name for ours, _ in pairs for name in ours[1]} == set()


def test_a_run_leaves_no_arena_mapped_behind(home: Path, daemon: FakeDaemon):
    """A mapping keeps an arena's memory alive that the daemon believes to have given back."""

    def once() -> None:
        with ckptd.Experiment("net", dir=home / "r") as run:
            handle = run.save(state(1), step=1)
            daemon.wait_staged(handle.id)
            daemon.publish(handle.id, "verified")
            handle.wait("verified", timeout=30)

    def mapped() -> int:
        """Mappings of arenas by the client: all but the fake daemon's own look at each control page."""
        gc.collect()
        return Path("/proc/self/maps").read_text().count("memfd:fake-arena") - len(daemon.arenas)

    for _ in range(3):
        once()
    deadline_s = time.monotonic() + 30
    while mapped() > 0 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert mapped() <= 0


def test_a_run_that_ends_does_not_hang_up_while_another_thread_is_about_to_write(home: Path, daemon: FakeDaemon):
    """Once it has, the daemon may lend that memory to somebody else."""
    run = ckptd.Experiment("net", dir=home / "r")
    assert run.prepare(state(1), wait_s=30)
    session = run._session
    taken, _ = session.leases.take(1, 30)
    assert taken is not None
    run.close()
    assert session.connection.is_up
    assert [arena.use for arena in daemon.arenas.values()].count("leased") >= 1
    session.leases.give_back(taken)
    session.connection.tick_within(0.0)
    eventually(lambda: not session.connection.is_up, "the end of the connection", 30)
    eventually(lambda: "leased" not in [arena.use for arena in daemon.arenas.values()], "all memory to be back", 30)
