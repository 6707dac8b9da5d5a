"""Hooks in child hosts, with real processes: whatever they do is an outcome, and nothing of them is left."""

import contextlib
import math
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import anyio
import pytest

from ckptd.hooks import Finding, Level, child, hosts, tree
from ckptd.hooks.result import Outcome
from ckptd.hooks.spec import Kind, Spec
from tests.support.in_process import open_fds
from tests.support.node import eventually
from tests.unit.hooks.conftest import SAVED, context, wild


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:  # reaped, by then
        return False


async def gone(pid):
    """Whether the process ends long before it would by itself: its parent has been told to see to it."""
    with anyio.move_on_after(20):
        while is_alive(pid):
            await anyio.sleep(0.02)
        return True
    return False


BROKEN = {
    "raises": "LookupError: on purpose",
    "exits": r"called sys.exit\(3\)",
    "exits_hard": "exit status 4",
    "segfaults": "ended by SIGSEGV",
    "eats": "MemoryError",
    "crowds": "over 20 processes",
    "returns_nonsense": "TypeError: returned a dict",
    "kills_its_host": "host.* is gone",
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_hook_that_breaks_is_a_failure_and_the_next_hook_runs(running, name):
    """M054, row 16: raise, exit, segfault, eat memory, crowd: the daemon and the other hooks go on, and no veto comes of it."""
    limits = {"memory_bytes_max": 512 << 20} if name == "eats" else {}
    async with running([wild(name, **limits), wild("fine")], processes_max=20) as runner:
        verdict = await runner.ask(context())
        assert [run.outcome for run in verdict.runs] == [Outcome.FAILED, Outcome.OK]
        assert re.search(BROKEN[name], verdict.runs[0].error)
        assert verdict.allowed
        assert (await runner.deliver(context(), wild(name, **limits))).outcome is Outcome.FAILED, "and again, from anew"


@pytest.mark.parametrize("name", ["sleeps", "is_stubborn", "waits_forever"])
async def test_a_fraction_of_a_second_is_a_timeout_that_ends_the_work(running, name):
    """M056, row 16: 0.3 s; neither a signal handler nor an await keeps it alive."""
    async with running([wild(name, timeout_s=0.3), wild("fine")]) as runner:
        await runner.ask(context())  # whatever starting takes is not measured
        began_s = time.monotonic()
        verdict = await runner.ask(context())
        assert [run.outcome for run in verdict.runs] == [Outcome.TIMEOUT, Outcome.OK]
        assert 0.3 <= verdict.runs[0].duration_s < 20
        assert time.monotonic() - began_s < 30  # the work would take a minute


async def test_a_timeout_ends_children_that_left_their_session(running, tmp_path):
    """M056: forked twice, a session of its own, deaf to SIGTERM: it is still found, and killed."""
    path = tmp_path / "pid"
    for timeout_s in (0.5, 3.0, 15.0):
        async with running([wild("forks_twice", timeout_s=timeout_s, options={"path": str(path)})]) as runner:
            (run,) = (await runner.ask(context())).runs
            assert run.outcome is Outcome.TIMEOUT
            if path.exists() and path.read_text():
                assert await gone(int(path.read_text()))
                return
    pytest.fail("it never came to its second fork")


async def test_what_a_good_run_leaves_behind_is_ended_with_it(running, tmp_path):
    async with running([wild("leaves", options={"path": str(tmp_path / "pid")})]) as runner:
        (run,) = (await runner.ask(context())).runs
        assert run.outcome is Outcome.OK
        assert await gone(int((tmp_path / "pid").read_text()))


async def test_dying_again_and_again_leaks_no_descriptor_and_no_process(running):
    hook = wild("exits_hard", events=(SAVED,))
    async with running([hook], failures_max=1000) as runner:
        counts = []
        for _ in range(9):
            assert (await runner.deliver(context(SAVED), hook)).outcome is Outcome.FAILED
            (place,) = runner._hosts._places.values()
            await place.ready.wait()
            counts.append((open_fds("socket:") + open_fds("pipe:"), len(os.listdir(f"/proc/{place.host.pid}/fd"))))
            assert len(tree.below(place.host.pid)) == 1
        # What each death left would be there 7 times; on a busy machine the last one is still being cleared away.
        assert all(last - second < 5 for second, last in zip(counts[1], counts[-1], strict=True)), counts


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
async def test_a_storm_of_broken_hooks_delays_nobody_beyond_their_timeouts(running, seed):
    """M054, row 16: all kinds at once, asked and told in random order; the good ones answer, and nothing is left."""
    random, others = Random(seed), set(tree.below(os.getpid()))
    bad = [
        wild(name, timeout_s=0.3, events=(SAVED,), memory_bytes_max=256 << 20) for name in (*BROKEN, "sleeps", "floods")
    ]
    good = wild("fine", timeout_s=10.0)
    async with running([*bad, good], failures_max=10_000, processes_max=20, hosts_max=6) as runner:
        await runner.ask(context())
        for _ in range(40):
            async with anyio.create_task_group() as group:
                for spec in random.sample(bad, 4):
                    group.start_soon(runner.deliver, context(SAVED), spec)
                began_s = time.monotonic()
                assert (await runner.ask(context())).runs[0].outcome is Outcome.OK
                assert time.monotonic() - began_s < 10
        assert len(runner._hosts._alive) <= 6
    assert set(tree.below(os.getpid())) <= others


async def test_a_forked_copy_of_a_hook_is_not_heard(running):
    async with running([wild("forks_and_returns_twice")]) as runner:
        assert (await runner.ask(context())).runs[0].outcome is Outcome.OK


async def test_a_flood_of_output_is_read_and_only_its_beginning_kept(running):
    """M054: 100 MB printed."""
    async with running([wild("floods")], output_bytes_max=1000) as runner:
        (run,) = (await runner.ask(context())).runs
        assert run.outcome is Outcome.OK
        assert len(run.output) < 1100
        assert f"{100 * (1 << 20) + len('the end') + 1 - 1000} bytes more" in run.output


async def test_a_host_that_was_stopped_is_ended_from_outside(running, monkeypatch):
    monkeypatch.setattr(hosts, "BACKSTOP_S", 0.3)
    async with running([wild("stops_its_host", timeout_s=0.3), wild("fine")]) as runner:
        verdict = await runner.ask(context())
        assert [run.outcome for run in verdict.runs] == [Outcome.TIMEOUT, Outcome.OK]
        states = []
        for pid in tree.below(os.getpid()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended since
                states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        assert "T" not in states


async def test_the_end_of_the_runner_ends_every_process_of_every_hook(running, tmp_path):
    hook = wild("forks_twice", timeout_s=60.0, options={"path": str(tmp_path / "pid")}, events=(SAVED,))
    pids, others = set(), set(tree.below(os.getpid()))
    async with running([hook]) as runner, anyio.create_task_group() as group:
        group.start_soon(runner.deliver, context(SAVED), hook)
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            await anyio.sleep(0.02)
        with anyio.fail_after(40):
            while int((tmp_path / "pid").read_text()) not in pids:  # whose parent ends now is in no list for a moment
                pids |= set(tree.below(os.getpid())) - others
                await anyio.sleep(0.02)
        group.cancel_scope.cancel()
    assert [pid for pid in pids if not await gone(pid)] == []


async def test_a_host_whose_daemon_was_killed_ends_with_everything_below(tmp_path):
    """What the kernel tells it is the end of its socket, which nobody can forget to send."""
    script = f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 60' & sleep 60"
    setup = {
        "kind": "exec", "target": "/bin/sh", "arguments": ["-c", script], "options": {}, "import_path": [],
        "memory_bytes_max": 0, "output_bytes_max": 1000, "processes_max": 9, "nice": 0, "start_s_max": 30.0,
    }  # fmt: skip
    host = await child.start("h", setup, child.clean_environment(os.environ, {}))
    await host.send({"op": "call", "timeout_s": 60.0, "context": context().to_wire(), "stdin": ""})
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        await anyio.sleep(0.01)
    below = tree.below(host.pid)
    assert int((tmp_path / "pid").read_text()) in below
    host._socket.close()
    assert [pid for pid in below if not await gone(pid)] == []
    await host.close()
    assert not is_alive(host.pid)


async def test_everybody_who_waits_for_a_host_gets_one(running):
    """Two that wait for room at the same time: each used to forget the other, which then waited for ever."""
    slow = wild("sleeps", events=(SAVED,), options={"seconds": 1.0})
    first = [slow, replace(slow, name="as slow")]
    others = [wild(name, events=(SAVED,)) for name in ("fine", "finds")]
    others.append(replace(others[0], name="another"))
    async with running([*first, *others], hosts_max=2) as runner:
        outcomes = []

        async def deliver(spec):
            outcomes.append((await runner.deliver(context(SAVED), spec)).outcome)

        async with anyio.create_task_group() as group:
            for spec in (*first, *others):
                group.start_soon(deliver, spec)
        assert outcomes == [Outcome.OK] * 5


async def test_plain_functions_coroutines_classes_and_instances_are_hooks(running):
    """M051, M052, M055: and what a class keeps, it keeps from call to call."""
    specs = [
        wild("fine"),
        wild("waits", events=(SAVED,)),
        wild("Counting", events=(), options={"start": 40}, given=frozenset()),
        wild("picky", events=()),
    ]
    async with running(specs) as runner:
        assert (await runner.ask(context(loss=2.0))).why == "hook 'picky': over one"
        counting = runner.registry.get("Counting")
        assert (counting.events, counting.priority) == ((SAVED,), 10)
        assert [spec.name for spec in runner.registry.of(SAVED)] == ["Counting", "waits"]
        for expected in ("41", "42"):
            run = await runner.deliver(context(SAVED), counting)
            assert run.findings == (Finding(Level.INFO, expected),)


async def test_a_module_alone_brings_every_hook_it_registers(running, runs):
    """M051: `@hook`, `register("name", function, [events])` and `register(instance)`, in order of priority."""
    whole = Spec(name="team", kind=Kind.PYTHON, target="wild", import_path=wild("fine").import_path, timeout_s=30.0)
    async with running([whole]) as runner:
        assert (await runner.ask(context(loss=0.5))).allowed
        assert [(run.hook, run.outcome) for run in runs] == [("team.picky", "skipped"), ("team.logger", "ok")]
        assert runner.registry.get("team.picky").timeout_s == 20.0
        for name, outcome in [("team.seventh", Outcome.OK), ("team.Counting", Outcome.OK)]:
            assert (await runner.deliver(context(SAVED), runner.registry.get(name))).outcome is outcome


async def test_a_condition_in_code_is_evaluated_where_the_hook_runs(running, runs):
    """M053: a callable; false is recorded as skipped, and the hook is not called."""
    async with running([wild("picky", events=())]) as runner:
        assert (await runner.ask(context(loss=0.1))).allowed
        assert (await runner.ask(context(loss=3.0))).why == "hook 'picky': over one"
        assert [run.outcome for run in runs] == [Outcome.SKIPPED, Outcome.VETOED]
        assert runner.figures()["picky"]["calls"] == 1


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("wild:nothing", "has no attribute 'nothing'"),
        ("wild:os", "is a module: a hook is a function"),
        ("wild:@nobody", "registers no hook named 'nobody'"),
    ],
)
async def test_code_that_can_not_be_loaded_is_a_problem_of_its_hook_alone(running, target, problem):
    bad = Spec(name="bad", kind=Kind.PYTHON, target=target, events=(SAVED,), import_path=wild("fine").import_path)
    async with running([bad, wild("fine")]) as runner:
        assert (await runner.ask(context())).allowed
        assert problem in runner.registry.get("bad").problem
        assert runner.registry.of(SAVED) == ()
        assert (await runner.deliver(context(SAVED), runner.registry.get("bad"))).outcome is Outcome.FAILED


async def test_code_that_says_nonsense_of_itself_is_a_problem_of_its_hook_alone(running, tmp_path):
    """Whatever a module declares, the daemon refuses it by name and goes on."""
    (tmp_path / "liar.py").write_text(
        "from ckptd.hooks import hook\n@hook(events=['checkpoint.published'], timeout_s='soon', priority='x')\ndef f(context): pass\n"
    )
    liar = Spec(name="liar", kind=Kind.PYTHON, target="liar:f", import_path=(str(tmp_path),))
    async with running([liar, wild("fine")]) as runner:
        assert (await runner.ask(context())).allowed
        assert runner.registry.get("liar").problem


async def test_a_disabled_hook_is_imported_when_it_is_enabled(running):
    """M064: without a restart."""
    async with running([wild("picky", events=(), enabled=False)]) as runner:
        assert (await runner.ask(context(loss=3.0))).allowed
        assert runner._hosts._places == {}
        runner.registry.enable("picky")
        runner.reset("picky")
        with anyio.fail_after(20):
            while not runner.registry.of(context().event):
                await anyio.sleep(0.02)
        assert not (await runner.ask(context(loss=3.0))).allowed


async def test_a_hook_sees_plain_data_a_fixed_directory_and_a_clean_environment(running, monkeypatch):
    """M057, rows 17 and 19."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    async with running([wild("environment", environment={"MINE": "1"})]) as runner:
        (run,) = (await runner.ask(context(loss=math.nan))).runs
        (found,) = run.findings
        assert (found.text, found.facts["nan"]) == ("/", True)
        assert found.facts["environ"].keys() <= child._KEPT | {"MINE", "CKPTD_HOOK", "LC_ALL", "LC_CTYPE"}
        assert (found.facts["environ"]["MINE"], found.facts["environ"]["CKPTD_HOOK"]) == ("1", "environment")


async def test_hosts_are_kept_warm_and_no_more_than_allowed(running):
    """The longest idle one ends for another; a host that waits for work is used again."""
    specs = [replace(wild("fine", events=(SAVED,)), name=f"h{n}") for n in range(4)]
    async with running(specs, hosts_max=2) as runner:
        for spec in (specs[0], specs[0], specs[1], specs[2], specs[3], specs[3]):
            assert (await runner.deliver(context(SAVED), spec)).outcome is Outcome.OK
            assert len([p for p in runner._hosts._places.values() if p.host is not None]) <= 2
        kept = {p.host.pid for p in runner._hosts._places.values() if p.host is not None}
        await runner.deliver(context(SAVED), specs[3])
        assert kept == {p.host.pid for p in runner._hosts._places.values() if p.host is not None}


def test_everything_below_a_process_is_found_without_the_kernels_list(monkeypatch):
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0:
            time.sleep(30)
        time.sleep(30)
        os._exit(0)
    try:
        while len(tree.below(pid)) < 1:
            time.sleep(0.01)
        known = tree.below(pid)
        monkeypatch.setattr(tree, "_KERNEL_LISTS_CHILDREN", False)
        assert tree.below(pid) == known
        tree.end_from_outside(pid)
        eventually(lambda: not is_alive(known[0]), "the end of what was killed", 20.0)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
