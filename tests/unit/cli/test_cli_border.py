"""What holds for every verb: help, exit codes, errors as one line, quiet pipes, and a fast start."""

import json
import os
import signal
import subprocess
import sys
import time

import click
import pytest

from ckptd import errors
from ckptd.cli import VERBS, ckpt, main
from ckptd.cli.options import Family
from tests.support.canned_daemon import HANG_UP, SILENCE

ENTRY = [sys.executable, "-c", "import sys; from ckptd.cli import main; sys.exit(main())"]
HEAVY = (
    "pydantic",
    "pydantic_core",
    "sqlalchemy",
    "structlog",
    "anyio",
    "asyncio",
    "rich",
    "msgspec",
    "aiosqlite",
    "alembic",
)


def _commands():
    context = click.Context(ckpt, info_name="ckpt")
    for name in ckpt.list_commands(context):
        command = ckpt.get_command(context, name)
        yield (name,), command
        if isinstance(command, Family):
            for inner, verb in command.commands.items():
                yield (name, inner), verb


COMMANDS = list(_commands())


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_dash_h_explains_every_verb_with_examples_first(run, words, command):
    ran = run(*words, "-h")
    assert ran.code == 0
    assert ran.err == ""
    assert ran.out.index("Examples:") < ran.out.index("Options:")
    assert len(command.examples) > 0
    assert all(line.split()[0] in {"ckpt", "python"} for line, _ in command.examples)


def test_the_overview_says_of_each_verb_what_the_verb_says_itself():
    """`ckpt -h` knows the verbs' lines without importing them; they must not drift apart."""
    context = click.Context(ckpt, info_name="ckpt")
    for family in VERBS.values():
        for name, entry in family.items():
            command = ckpt.get_command(context, name)
            assert command.help.split("\n")[0] == entry.help, name
            assert command.name == name


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("lss", "ls"), ("satus", "status"), ("delete", "rm"), ("prune", "retention plan"), ("describe", "show")],
)
def test_a_wrong_verb_is_answered_with_the_right_one(run, typed, meant):
    ran = run(typed)
    assert ran.code == 2
    assert f"Did you mean '{meant}'?" in ran.err


def test_a_wrong_option_is_answered_with_the_right_one(run):
    ran = run("ls", "--limt", "3")
    assert ran.code == 2
    assert "--limit" in ran.err


def test_without_a_verb_the_help_goes_to_standard_error_with_a_usage_code(run):
    ran = run()
    assert (ran.code, ran.out) == (2, "")
    assert "Examples:" in ran.err


def test_version_is_printed_alone(run):
    ran = run("--version")
    assert (ran.code, ran.out) == (0, "ckpt 0.1.0\n")


@pytest.mark.parametrize("cls", [cls for cls in errors.BY_CODE.values() if cls is not errors.BadConfig])
def test_an_error_of_the_daemon_becomes_one_line_its_hint_and_its_exit_code(run, daemon, cls):
    daemon.replies["status"] = cls("what happened\nand where", hint="what to do")
    ran = run("status")
    assert ran.code == cls.exit_code
    assert ran.out == ""
    assert ran.err == f"ckpt: what happened\\nand where [{cls.code}]\nhint: what to do\n"


def test_with_json_an_error_is_a_json_object_on_standard_error(run, daemon):
    daemon.replies["show"] = errors.Ambiguous("two of them", candidates=["a", "b"])
    ran = run("show", "6f1c0e", "--json")
    assert (ran.code, ran.out) == (2, "")
    error = json.loads(ran.err)
    assert error["v"] == 1
    assert error["error"]["code"] == "ambiguous"
    assert error["error"]["candidates"] == ["a", "b"]


def test_an_error_code_from_a_newer_daemon_still_ends_in_one_line(run, daemon):
    class FromTheFuture(errors.CkptdError):
        code = "from_the_future"

    daemon.replies["status"] = FromTheFuture("new")
    ran = run("status")
    assert ran.code == 1
    assert ran.err.startswith("ckpt: new [")


def test_no_daemon_is_exit_code_5_and_says_where_it_looked(run, short_dir):
    ran = run("status")
    assert ran.code == 5
    assert str(short_dir / "absent") in ran.err
    assert "ckptd" in ran.err


def test_a_named_socket_beats_the_environment(run, daemon, monkeypatch):
    named = daemon.path
    monkeypatch.setenv("CKPTD_SOCKET", "/nonexistent/s")
    assert run("status").code == 5
    assert run("status", "--socket", named).code == 0
    assert run("--socket", named, "status").code == 0


def test_a_socket_path_too_long_for_the_kernel_is_a_usage_error(run):
    ran = run("status", "--socket", "/" + "x" * 200)
    assert ran.code == 2
    assert "107" in ran.err


def test_a_daemon_that_does_not_answer_is_exit_code_6_after_timeout(run, daemon):
    daemon.replies["status"] = SILENCE
    started_s = time.monotonic()
    ran = run("status", "--timeout", "200ms")
    assert ran.code == 6
    assert time.monotonic() - started_s < 30  # it would say nothing for ever


def test_a_daemon_that_hangs_up_is_exit_code_5(run, daemon):
    daemon.replies["status"] = HANG_UP
    assert run("status").code == 5


def test_what_is_no_daemon_is_exit_code_5(run, daemon):
    """Something else may listen on a socket that a person named."""
    daemon.replies["hello"] = errors.UnsupportedVersion("only version 9 here")
    ran = run("status")
    assert ran.code == 7
    assert "version 9" in ran.err


def test_a_timeout_that_is_no_duration_is_a_usage_error(run):
    ran = run("status", "--timeout", "soon")
    assert ran.code == 2
    assert "duration" in ran.err


def test_a_defect_is_one_line_and_a_traceback_only_on_request(run, daemon, monkeypatch):
    daemon.replies["status"] = {"daemon": None}  # breaks whoever takes it for an object
    ran = run("status")
    assert ran.code == 1
    assert "[internal]" in ran.err
    assert "Traceback" not in ran.err
    assert "CKPTD_DEBUG=1" in ran.err
    monkeypatch.setenv("CKPTD_DEBUG", "1")
    assert "Traceback" in run("status").err


def test_json_and_quiet_exclude_one_another(run, daemon):
    assert run("ls", "--json", "-q").code == 2


def test_a_closed_pipe_is_quiet(daemon):
    """`ckpt ls | head -1` must not print a traceback."""
    rows = daemon.replies["list"]["checkpoints"]
    daemon.replies["list"] = {"checkpoints": rows * 400, "next": None}
    process = subprocess.Popen([*ENTRY, "ls", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert err == b""


def test_a_full_disk_under_the_output_is_one_line(daemon):
    with open("/dev/full", "w") as full:
        ran = subprocess.run([*ENTRY, "ls"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert "No space left" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_ctrl_c_is_exit_code_130_without_a_traceback(daemon):
    daemon.replies["status"] = SILENCE
    process = subprocess.Popen([*ENTRY, "status"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not daemon.asked("status"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


@pytest.mark.parametrize("words", [["--help"], ["ls"], ["path", "latest"], ["status"]], ids=" ".join)
def test_a_quick_verb_imports_nothing_heavy(daemon, words):
    """`ckpt --help` and `ckpt ls` have 100 and 150 ms as whole processes; each of these modules would take most of it."""
    code = (
        "import sys; from ckptd.cli import main; code = main(sys.argv[1:]); "
        f"sys.stderr.write(' '.join(m for m in {HEAVY!r} if m in sys.modules)); sys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_output_in_ascii_never_fails_on_a_name(daemon):
    daemon.replies["list"]["checkpoints"][0]["name"] = "größe"
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ran = subprocess.run([*ENTRY, "ls"], capture_output=True, env=env, timeout=60, check=False)
    assert ran.returncode == 0
    assert rb"gr\xf6\xdfe" in ran.stdout


def test_main_never_raises_keyboard_interrupt(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ckpt, "invoke", interrupted)
    assert main(["status"]) == 130
