"""doctor and config. M162, M165"""

import os
import socket
import tomllib

import pytest

from tests.support.canned_daemon import HANG_UP, HELLO, SILENCE


def _checks(ran):
    return {check["name"]: check for check in ran.json["checks"]}


def test_doctor_is_a_liveness_probe(run, daemon):
    """M162: exit 0 with a daemon that answers."""
    ran = run("doctor")
    assert ran.code == 0
    assert "ok    catalog: schema 1, integrity ok" in ran.out
    assert "daemon: answers at" in ran.out


def test_doctor_without_a_daemon_is_exit_code_1_with_a_hint(run):
    ran = run("doctor")
    assert ran.code == 1
    assert "fail  daemon: no daemon answers" in ran.out
    assert "hint: start" in ran.out
    checks = _checks(run("doctor", "--json"))
    assert checks["socket"]["status"] == "fail"
    assert checks["configuration"]["status"] == "ok"


def test_doctor_finds_a_daemon_that_hangs(run, daemon):
    daemon.replies["doctor"] = SILENCE
    assert run("doctor", "--timeout", "200ms").code == 1


def test_a_failing_check_of_the_daemon_is_exit_code_1_and_a_warning_is_not(run, daemon):
    check = {"name": "disk", "status": "warn", "detail": "5 % free", "hint": "lower retention"}
    daemon.replies["doctor"]["checks"] = [check]
    ran = run("doctor", "-q")
    assert ran.code == 0
    assert ran.out == "warn  disk: 5 % free\n      hint: lower retention\n"
    check["status"] = "fail"
    assert run("doctor", "-q").code == 1


def test_doctor_warns_when_daemon_and_command_line_differ(run, daemon):
    daemon.replies["hello"] = {**daemon.replies["hello"], "server": "ckptd/9.9.9"}
    checks = _checks(run("doctor", "--json"))
    assert checks["versions"]["status"] == "warn"
    assert "9.9.9" in checks["versions"]["detail"]


def test_doctor_finds_a_broken_configuration(run, daemon, short_dir):
    (short_dir / "config" / "ckptd").mkdir(parents=True)
    (short_dir / "config" / "ckptd" / "config.toml").write_text("nonsense = 1\n")
    ran = run("doctor", "--json")
    assert ran.code == 1
    assert "nonsense" in _checks(ran)["configuration"]["detail"]


@pytest.mark.parametrize("answers", [True, False])
def test_doctor_finds_a_state_directory_that_others_may_write(run, daemon, short_dir, answers):
    """That of the daemon that answers; without one, that which the next one would have."""
    state = short_dir / ("elsewhere" if answers else "state")
    state.mkdir()
    state.chmod(0o777)
    daemon.replies["hello"] = {**HELLO, "uid": os.getuid(), "state_dir": str(state)} if answers else HANG_UP
    check = _checks(run("doctor", "--json"))["state directory"]
    assert check["status"] == "fail"
    assert str(state) in check["detail"]


def test_doctor_does_not_look_into_another_users_state_directory(run, daemon, short_dir):
    """All users' daemon has its own; what is here is where this user's spool lies."""
    daemon.replies["hello"] = {**HELLO, "uid": os.getuid() + 1, "state_dir": "/root"}
    assert str(short_dir / "state") in _checks(run("doctor", "--json"))["state directory"]["detail"]


def test_doctor_finds_a_file_where_the_socket_should_be(run, short_dir):
    (short_dir / "absent").touch()
    assert "no socket" in _checks(run("doctor", "--json"))["socket"]["detail"]


def test_doctor_warns_of_a_socket_open_to_everybody(run, short_dir):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(short_dir / "absent"))
        (short_dir / "absent").chmod(0o666)
        assert _checks(run("doctor", "--json"))["socket"]["status"] == "warn"


def test_config_show_is_toml_that_says_where_each_value_comes_from(run, short_dir, monkeypatch):
    """M165: the origin of each value."""
    home = short_dir / "config" / "ckptd"
    home.mkdir(parents=True)
    (home / "config.toml").write_text('[retention]\nkeep_last = 3\nkeep_best = {metric = "loss", mode = "min"}\n')
    monkeypatch.setenv("CKPTD_ARENAS__BYTES_MAX", "4G")
    ran = run("config", "show", "--origin")
    assert f"retention.keep_last = 3  # {home}/config.toml:2" in ran.out.splitlines()
    assert "arenas.bytes_max = 4294967296  # env CKPTD_ARENAS__BYTES_MAX" in ran.out.splitlines()
    assert "# retention.keep_every =  # default" in ran.out.splitlines()
    read = tomllib.loads(ran.out)
    [rule] = read["retention"]["keep_best"]
    assert {key: rule[key] for key in ("name", "metric", "mode")} == {"name": "loss", "metric": "loss", "mode": "min"}
    body = run("config", "show", "--json").json
    assert body["settings"]["arenas"]["bytes_max"] == 4 << 30
    assert body["origins"]["jobs.running_max"] == "default"


def test_config_show_never_prints_a_password(run, short_dir):
    file = short_dir / "c.toml"
    file.write_text('[catalog]\nurl = "postgresql+asyncpg://u:s3cret@db/ckptd"\n')
    for words in (["config", "show", "--config", str(file)], ["config", "show", "--json", "--config", str(file)]):
        ran = run(*words)
        assert "s3cret" not in ran.out
        assert "u:***@db/ckptd" in ran.out


def test_config_check_lists_every_error_at_once_with_exit_code_78(run, short_dir):
    file = short_dir / "c.toml"
    file.write_text('foo = 1\n[arenas]\nbytes_mx = 3\nlease_wait_s = "x"\n')
    ran = run("config", "check", str(file))
    assert (ran.code, ran.out) == (78, "")
    assert f"{file}:1: foo" in ran.err
    assert "did you mean bytes_max?" in ran.err
    assert "lease_wait_s" in ran.err
    ran = run("config", "check", str(file), "--json")
    assert (ran.code, ran.json["valid"], len(ran.json["errors"])) == (78, False, 3)


def test_config_check_of_a_good_file_says_so(run, short_dir):
    file = short_dir / "c.toml"
    file.write_text("drain_s = 5\n")
    ran = run("config", "check", str(file))
    assert (ran.code, ran.out) == (0, f"valid: {file}\n")


def test_config_reads_the_file_that_the_environment_names(run, short_dir, monkeypatch):
    file = short_dir / "c.toml"
    file.write_text("drain_s = 5\n")
    monkeypatch.setenv("CKPTD_CONFIG", str(file))
    assert run("config", "show", "--json").json["settings"]["drain_s"] == 5


@pytest.mark.parametrize("words", [["config", "show"], ["config", "check"]])
def test_config_needs_no_daemon(run, words):
    assert run(*words).code == 0


@pytest.mark.parametrize(
    ("mode", "status"), [(0o700, "ok"), (0o755, "ok"), (0o775, "fail"), (0o777, "fail"), (0o1777, "ok")]
)
def test_doctor_finds_a_socket_in_a_directory_where_others_may_make_one(run, daemon, short_dir, mode, status):
    """S10. Whoever may write there can serve trainers in the daemon's place."""
    short_dir.chmod(mode)
    found = _checks(run("doctor", "--json"))["socket"]
    short_dir.chmod(0o700)
    assert found["status"] == status
    assert ("chmod go-w" in found["hint"]) == (status == "fail")


def test_every_check_of_the_command_is_known_to_the_guide(run, daemon):
    from ckptd.intake.trouble import CHECKS

    daemon.replies["doctor"]["checks"] = []
    assert set(_checks(run("doctor", "--json"))) == {"configuration", "state directory", "socket", "daemon", "versions"}
    assert set(_checks(run("doctor", "--json"))) <= set(CHECKS)
