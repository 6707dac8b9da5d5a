"""Where each value of the configuration comes from, and what a person is told when one is wrong. M165"""

import tomllib
from pathlib import Path

import pytest

from ckptd import config, errors
from ckptd.origins import files, load, places, render_example, render_reference
from ckptd.origins.__main__ import main
from ckptd.origins.render import EXAMPLE, REFERENCE

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without any configuration, and an empty /etc/ckptd."""
    monkeypatch.setattr(files, "ETC", tmp_path / "etc")
    (tmp_path / "etc" / "conf.d").mkdir(parents=True)
    (tmp_path / "xdg" / "ckptd").mkdir(parents=True)
    return tmp_path


def env(home: Path, **more: str) -> dict[str, str]:
    return {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / "xdg"),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_RUNTIME_DIR": "/run/user/1",
        **more,
    }


def refused(home: Path, *args, **more: str) -> list[dict[str, str]]:
    with pytest.raises(errors.BadConfig) as caught:
        load(*args, environ=env(home, **more))
    for error in caught.value.details["errors"]:
        assert error["message"] in caught.value.message
    return caught.value.details["errors"]


def test_a_file_that_the_environment_names_is_the_only_one_unless_a_flag_names_another(home):
    """The daemon reads what `ckpt` reads."""
    (home / "xdg" / "ckptd" / "config.toml").write_text('drain_s = "1m"\nstate_dir = "/not/this"\n')
    for name, seconds in (("named.toml", 120), ("flag.toml", 180)):
        (home / name).write_text(f"drain_s = {seconds}\nstate_dir = '{home / name}.d'\n")
    named = env(home, CKPTD_CONFIG=str(home / "named.toml"))
    loaded = load(environ=named)
    assert (loaded.settings.drain_s, loaded.files) == (120, (home / "named.toml",))
    assert loaded.settings.state_dir == files.places(environ=named).state_dir == home / "named.toml.d"
    assert load(home / "flag.toml", environ=named).settings.drain_s == 180
    assert load(environ=env(home, CKPTD_CONFIG="")).settings.drain_s == 60


def test_a_file_that_the_environment_names_must_be_there_and_must_not_depend_on_the_directory(home):
    """A daemon that goes to the background, or that a save starts, runs in /."""
    [error] = refused(home, CKPTD_CONFIG="c.toml")
    assert error["where"] == "env CKPTD_CONFIG"
    assert "absolute" in error["message"]
    [error] = refused(home, CKPTD_CONFIG=str(home / "gone.toml"))
    assert error["where"] == str(home / "gone.toml")
    with pytest.raises(errors.BadConfig, match="absolute"):
        files.places(environ=env(home, CKPTD_CONFIG="c.toml"))


def test_each_source_outranks_the_one_below_it(home):
    sources = [
        (home / "etc" / "config.toml", "1m"),
        (home / "etc" / "conf.d" / "10-a.toml", "2m"),
        (home / "etc" / "conf.d" / "20-b.toml", "3m"),
        (home / "xdg" / "ckptd" / "config.toml", "4m"),
    ]
    assert load(environ=env(home)).origins["drain_s"] == "default"
    for minutes, (path, text) in enumerate(sources, 1):
        path.write_text(f'drain_s = "{text}"\n')
        loaded = load(environ=env(home))
        assert loaded.settings.drain_s == minutes * 60
        assert loaded.origins["drain_s"] == f"{path}:1"
    loaded = load(environ=env(home, CKPTD_DRAIN_S="5m"))
    assert (loaded.settings.drain_s, loaded.origins["drain_s"]) == (300, "env CKPTD_DRAIN_S")
    loaded = load(environ=env(home, CKPTD_DRAIN_S="5m"), overrides={"drain_s": 360.0, "log.level": None})
    assert (loaded.settings.drain_s, loaded.origins["drain_s"]) == (360, "flag")
    assert loaded.origins["log.level"] == "default"
    assert loaded.files == tuple(path for path, _ in sources)


def test_tables_of_several_files_are_merged_key_by_key(home):
    (home / "etc" / "config.toml").write_text('[arenas]\nbytes_max = "1G"\nidle_s = "1m"\n')
    (home / "xdg" / "ckptd" / "config.toml").write_text('\n[arenas]\nbytes_max = "2G"\n')
    loaded = load(environ=env(home))
    assert loaded.settings.arenas.bytes_max == 2 << 30
    assert loaded.settings.arenas.idle_s == 60
    assert loaded.origins["arenas.bytes_max"].endswith("xdg/ckptd/config.toml:3")
    assert loaded.origins["arenas.idle_s"].endswith("etc/config.toml:3")


def test_every_setting_has_an_origin(home):
    loaded = load(environ=env(home))
    assert loaded.origins["workers.request_s"] == "default"
    assert set(loaded.origins.values()) == {"default"}
    assert len(loaded.origins) > 40


def test_the_environment_nests_with_two_underscores_and_takes_lists_as_json(home):
    loaded = load(
        environ=env(
            home,
            CKPTD_ARENAS__BYTES_MAX="4G",
            CKPTD_WORKERS__IDLE_IO="false",
            CKPTD_DRAIN_S="5",
            CKPTD_ROOTS='[{"path": "/data", "kind": "watched"}]',
            CKPTD_RETENTION__KEEP_BEST='{"metric": "val_loss", "mode": "min"}',
        )
    )
    assert loaded.settings.arenas.bytes_max == 4 << 30
    assert not loaded.settings.workers.idle_io
    assert loaded.settings.drain_s == 5
    assert loaded.settings.roots[0].path == Path("/data")
    assert loaded.settings.retention.keep_best[0].metric == "val_loss"
    assert loaded.origins["roots"] == "env CKPTD_ROOTS"


def test_variables_of_clients_are_no_settings_and_no_errors(home):
    loaded = load(environ=env(home, CKPTD_FAIL="a=kill", CKPTD_AUTOSTART="0", CKPTD_DRAIN="1"))
    assert loaded.problems == ("env CKPTD_DRAIN is no setting: did you mean CKPTD_DRAIN_S?",)


def test_all_errors_of_all_sources_come_at_once_with_file_line_and_key(home):
    (home / "etc" / "config.toml").write_text('[arenas]\nbyte_max = "1G"\n\n[jobs]\nretries_max = -1\n')
    (home / "etc" / "conf.d" / "a.toml").write_text("this is no toml")
    (home / "xdg" / "ckptd" / "config.toml").write_text('drain_s = "soon"\n[[roots]]\npath = "relative"\n')
    found = refused(home, CKPTD_WORKERS__THREAD="3")
    said = {(error["where"].removeprefix(f"{home}/"), error["key"]): error["message"] for error in found}
    assert said["etc/config.toml:2", "arenas.byte_max"] == "unknown key: did you mean bytes_max?"
    assert "greater than or equal to 0" in said["etc/config.toml:5", "jobs.retries_max"]
    assert "'soon' is no duration" in said["xdg/ckptd/config.toml:1", "drain_s"]
    assert "must be absolute" in said["xdg/ckptd/config.toml:2", "roots.0"]
    assert said["env CKPTD_WORKERS__THREAD", "workers__thread"].endswith("did you mean CKPTD_WORKERS__THREADS?")
    assert any(where == "etc/conf.d/a.toml" for where, _ in said)
    assert len(found) == 6


def test_an_unknown_key_inside_a_list_of_tables_is_an_error_too(home):
    (home / "xdg" / "ckptd" / "config.toml").write_text('[[roots]]\npath = "/a"\n[[roots]]\npath = "/b"\nkindd = "x"\n')
    (error,) = refused(home)
    assert error["key"] == "roots.1.kindd"
    assert error["message"] == "unknown key: did you mean kind?"
    assert error["where"].endswith(":5")


def test_limits_that_contradict_one_another_are_an_error(home):
    (error,) = refused(home, CKPTD_JOBS__LEASE_S="10s")
    assert "twice workers.request_s" in error["message"]


def test_a_named_file_is_the_only_one_and_must_exist(home):
    (home / "etc" / "config.toml").write_text('drain_s = "1m"\n')
    named = home / "c.toml"
    named.write_text('orphan_age_s = "2h"\n')
    loaded = load(named, env(home))
    assert loaded.settings.drain_s == config.Settings().drain_s
    assert loaded.files == (named,)
    (error,) = refused(home, home / "missing.toml")
    assert error["where"].endswith("missing.toml")


def test_a_file_that_everybody_may_write_is_refused(home):
    """S23."""
    path = home / "xdg" / "ckptd" / "config.toml"
    path.write_text("")
    path.chmod(0o666)
    (error,) = refused(home)
    assert "everybody may write it" in error["message"]


def test_a_system_daemon_does_not_read_its_users_file(home):
    (home / "xdg" / "ckptd" / "config.toml").write_text('drain_s = "1m"\n')
    loaded = load(environ=env(home, CKPTD_MODE="system"))
    assert loaded.files == ()
    assert loaded.settings.socket == Path("/run/ckptd/ckptd.sock")
    assert loaded.settings.state_dir == Path("/var/lib/ckptd")


def test_places_nobody_named_follow_the_clients_rules(home):
    loaded = load(environ=env(home))
    assert loaded.settings.state_dir == home / "state" / "ckptd"
    assert loaded.settings.socket == Path("/run/user/1/ckptd.sock")
    loaded = load(environ=env(home, CKPTD_DIR="/var/tmp/c", CKPTD_SOCKET="/var/tmp/c.sock"))
    assert (loaded.settings.state_dir, loaded.settings.socket) == (Path("/var/tmp/c"), Path("/var/tmp/c.sock"))
    assert loaded.origins["state_dir"] == "env CKPTD_DIR"
    assert loaded.origins["socket"] == "env CKPTD_SOCKET"


@pytest.mark.parametrize("key", ["state_dir", "socket"])
def test_a_relative_place_is_refused(home, key):
    with pytest.raises(errors.BadConfig, match=f"{key} must be an absolute path"):
        load(environ=env(home), overrides={key: "here"})


def test_a_socket_path_the_kernel_can_not_hold_is_refused(home):
    with pytest.raises(errors.BadConfig, match="107"):
        load(environ=env(home), overrides={"socket": "/" + "x" * 107})


@pytest.mark.parametrize(
    "written",
    [
        "",
        'state_dir = "/a/b"\n',
        'socket = "/a.sock"\n',
        'mode = "system"\n',
        'state_dir = "/a"\n[arenas]\nidle_s = 5\n',
    ],
)
@pytest.mark.parametrize("more", [{}, {"CKPTD_DIR": "/d"}, {"CKPTD_STATE_DIR": "/e"}, {"CKPTD_SOCKET": "/f.sock"}])
def test_the_supervisor_and_the_daemon_agree_on_the_places(home, written, more):
    """The supervisor asks `places`, which knows nothing of the settings' model; the daemon asks `load`."""
    (home / "etc" / "config.toml").write_text(written)
    found = places(environ=env(home, **more))
    settings = load(environ=env(home, **more)).settings
    assert (found.mode, found.state_dir, found.socket) == (settings.mode, settings.state_dir, settings.socket)


def test_the_reference_is_current():
    assert (REPOSITORY / REFERENCE).read_text() == render_reference()


def test_the_reference_has_a_heading_for_every_setting(home):
    text = render_reference()
    for key in load(environ=env(home)).origins:
        assert f"### {key}\n" in text or f"## [[{key}]]\n" in text or f"### {key.removeprefix('retention.')}\n" in text


def test_the_example_is_current():
    assert (REPOSITORY / EXAMPLE).read_text() == render_example()


def test_the_example_says_the_defaults():
    assert config.Settings.model_validate(tomllib.loads(render_example())) == config.Settings()


def test_the_examples_commented_tables_hold(home):
    """What a person gets by taking "# " away must be accepted."""
    lines = render_example().splitlines()
    tables = [
        line.removeprefix("# ") for line in lines[lines.index("# [[experiments]]") :] if "=" in line or "[[" in line
    ]
    settings = config.Settings.model_validate(tomllib.loads("\n".join(tables)))
    assert settings.roots[0].kind == "watched"
    assert settings.experiments[0].keep_last == 10


def test_the_generator_writes_what_the_tests_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reference", "example"]) == 0
    assert (tmp_path / REFERENCE).read_text() == render_reference()
    assert main(["nonsense"]) == 2
    assert main([]) == 2
    capsys.readouterr()
