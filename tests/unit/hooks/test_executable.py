"""Programs as hooks: JSON on stdin, the exit status is the verdict, everything around them fixed."""

import json
from pathlib import Path

import anyio
import pytest

from ckptd.hooks import hosts
from ckptd.hooks.result import Outcome
from ckptd.hooks.spec import Kind, Spec
from tests.unit.hooks.conftest import SAVE, SAVED, context


@pytest.fixture
def program(tmp_path):
    """Write a shell script; return the hook that runs it."""

    def write(text, *, name="p", timeout_s=30.0, event=SAVE, **more):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return Spec(name=name, kind=Kind.EXEC, target=str(path), events=(event,), timeout_s=timeout_s, **more)

    return write


@pytest.fixture
def patient_hosts(monkeypatch):
    """What a host takes beyond its program's time has the start of its own interpreter in it."""
    monkeypatch.setattr(hosts, "BACKSTOP_S", 60.0)


@pytest.mark.usefixtures("patient_hosts")
@pytest.mark.parametrize(
    ("text", "outcome", "error"),
    [
        ("exit 0", Outcome.OK, ""),
        ("echo too big; echo more; exit 10", Outcome.VETOED, "too big"),
        ("exit 10", Outcome.VETOED, "exit status 10"),
        ("exit 1", Outcome.FAILED, "exit status 1"),
        ("exit 255", Outcome.FAILED, "exit status 255"),
        ("kill -SEGV $$", Outcome.FAILED, "ended by SIGSEGV"),
        ("trap '' TERM INT; sleep 60 & sleep 60", Outcome.TIMEOUT, "killed after 0.4 s"),
    ],
)
async def test_the_exit_status_is_the_verdict(running, program, text, outcome, error):
    """M065: 0 is fine, 10 is a veto with the first line as its reason, everything else is a failure and no veto."""
    async with running([program(text, timeout_s=0.4 if outcome is Outcome.TIMEOUT else 30.0)]) as runner:
        with anyio.fail_after(60):
            while not any(place.ready.is_set() for place in runner._hosts._places.values()):
                await anyio.sleep(0.01)
        (run,) = (await runner.ask(context())).runs
        assert (run.outcome, run.error) == (outcome, error)


async def test_the_context_comes_as_json_and_the_surroundings_are_fixed(running, program, tmp_path, monkeypatch):
    """M065: stdin, argv, working directory, environment and descriptors."""
    monkeypatch.setenv("CKPTD_TOKEN", "hush")
    text = f'cat > {tmp_path}/in; env > {tmp_path}/env; pwd > {tmp_path}/cwd; echo "$@" > {tmp_path}/argv; ls /proc/self/fd > {tmp_path}/fds'
    hook = program(text, arguments=("a b", "$(id)"), environment={"MINE": "x; y"})
    async with running([hook]) as runner:
        assert (await runner.ask(context(note="'; rm -rf /", loss=float("nan")))).allowed
    sent = json.loads((tmp_path / "in").read_text())
    assert (sent["hook"], sent["event"], sent["key"]) == ("p", SAVE, f"{SAVE}:17")
    assert sent["data"] == {"project": "p", "step": 7, "note": "'; rm -rf /", "loss": "NaN"}
    env = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert (env["MINE"], env["CKPTD_HOOK"], env["CKPTD_HOOK_EVENT"]) == ("x; y", "p", str(SAVE))
    assert "CKPTD_TOKEN" not in env
    assert (tmp_path / "cwd").read_text() == "/\n"
    assert (tmp_path / "argv").read_text() == "a b $(id)\n"
    assert [fd for fd in (tmp_path / "fds").read_text().split() if int(fd) > 3] == []


async def test_a_program_that_is_not_there_or_reads_nothing_is_no_trouble(running, program):
    absent = Spec(name="absent", kind=Kind.EXEC, target="/no/such/program", events=(SAVED,))
    deaf = program("exit 0", name="deaf", event=SAVED)
    async with running([absent, deaf]) as runner:
        failed = await runner.deliver(context(SAVED), absent)
        assert (failed.outcome, "No such file" in failed.error) == (Outcome.FAILED, True)
        big = context(SAVED, note="x" * 200_000)
        assert (await runner.deliver(big, deaf)).outcome is Outcome.OK


async def test_code_that_others_may_write_is_not_run(running, program, tmp_path):
    """S22: neither a program nor a module, nor a module out of such a directory."""
    open_program = program(f"touch {tmp_path}/ran", name="open", event=SAVED)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "loose.py").write_text("def f(context): pass\n")
    python = Spec(name="m", kind=Kind.PYTHON, target="loose:f", events=(SAVED,), import_path=(str(tmp_path / "mine"),))
    async with running([open_program]) as runner:
        run = await runner.deliver(context(SAVED), open_program)
        assert (run.outcome, "others may write" in run.error) == (Outcome.FAILED, True)
    for path, mode, problem in [("mine/loose.py", 0o666, True), ("mine", 0o777, True), ("mine", 0o755, False)]:
        (tmp_path / path).chmod(mode)
        async with running([python]) as runner:
            await runner.ask(context())
            assert ("others may write" in runner.registry.get("m").problem) is problem
        (tmp_path / path).chmod(0o755)
    assert not (tmp_path / "ran").exists()


async def test_a_veto_after_the_fact_is_a_failure_that_says_so(running, program):
    """M057, row 18."""
    hook = program("echo no; exit 10", event=SAVED)
    async with running([hook]) as runner:
        run = await runner.deliver(context(SAVED), hook)
        assert run.outcome is Outcome.FAILED
        assert "only before_* points can be vetoed" in run.error


async def test_what_a_program_starts_ends_with_it(running, program, tmp_path):
    hook = program(
        f"setsid sh -c 'sleep 60 & echo $! > {tmp_path}/pid' & while ! [ -s {tmp_path}/pid ]; do sleep 0.01; done"
    )
    async with running([hook]) as runner:
        assert (await runner.ask(context())).allowed
        started = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/cwd")
        with anyio.fail_after(20):  # it was killed; that it is gone takes it a moment more
            while started.exists():
                await anyio.sleep(0.02)
