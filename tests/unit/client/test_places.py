"""Where state and socket are: the rules that daemon, CLI and client share."""

import os
from pathlib import Path

import pytest

from ckptd_client import places


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mountinfo that a test writes."""
    path = tmp_path / "mountinfo"
    path.write_text("1 0 8:1 / / rw - ext4 /dev/sda rw\n")
    monkeypatch.setattr(places, "_MOUNTINFO", str(path))
    return path


def add_mount(mounts: Path, point: str, kind: str) -> None:
    with mounts.open("a") as file:
        file.write(f"2 1 0:5 / {point} rw,relatime shared:1 master:2 - {kind} host:/x rw\n")


def test_the_named_directory_wins(tmp_path: Path):
    assert places.state_dir({"CKPTD_DIR": str(tmp_path), "XDG_STATE_HOME": "/x"}) == str(tmp_path)


def test_xdg_comes_before_the_home(tmp_path: Path, mounts: Path):
    assert places.state_dir({"XDG_STATE_HOME": str(tmp_path), "HOME": "/h"}) == str(tmp_path / "ckptd")
    assert places.state_dir({"HOME": str(tmp_path)}) == str(tmp_path / ".local/state/ckptd")


def test_a_relative_xdg_directory_is_ignored(tmp_path: Path, mounts: Path):
    assert places.state_dir({"XDG_STATE_HOME": "rel", "HOME": str(tmp_path)}).startswith(str(tmp_path))
    assert places.socket_path({"XDG_RUNTIME_DIR": "rel"}).startswith(places.TEMP)


@pytest.mark.parametrize("kind", ["nfs4", "nfs", "lustre", "cifs", "ceph", "gpfs", "beegfs", "9p", "fuse.sshfs"])
def test_a_home_on_a_network_file_system_moves_the_state_to_the_node(tmp_path: Path, mounts: Path, kind: str):
    """SQLite's WAL does not work there, and two nodes must not share a catalog."""
    add_mount(mounts, str(tmp_path), kind)
    assert places.network_type(str(tmp_path / "deep" / "er")) == kind
    assert places.state_dir({"HOME": str(tmp_path)}) == f"/tmp/ckptd-{os.getuid()}"


@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs", "overlay", "btrfs", "fuse.fuse-overlayfs", "fuseblk"])
def test_a_local_home_keeps_it(tmp_path: Path, mounts: Path, kind: str):
    add_mount(mounts, str(tmp_path), kind)
    assert places.network_type(str(tmp_path)) is None
    assert places.state_dir({"HOME": str(tmp_path)}).startswith(str(tmp_path))


def test_the_longest_and_latest_mount_decides(tmp_path: Path, mounts: Path):
    add_mount(mounts, str(tmp_path), "nfs4")
    add_mount(mounts, str(tmp_path / "local"), "ext4")
    assert places.filesystem_type(str(tmp_path / "local" / "x")) == "ext4"
    assert places.filesystem_type(str(tmp_path / "localx")) == "nfs4"
    add_mount(mounts, str(tmp_path / "local"), "lustre")
    assert places.filesystem_type(str(tmp_path / "local" / "x")) == "lustre"


def test_a_mount_point_with_a_space_is_understood(tmp_path: Path, mounts: Path):
    (tmp_path / "my home").mkdir()
    add_mount(mounts, str(tmp_path) + "/my\\040home", "nfs4")
    assert places.network_type(str(tmp_path / "my home")) == "nfs4"


def test_a_symlinked_home_is_judged_by_where_it_leads(tmp_path: Path, mounts: Path):
    (tmp_path / "nfs").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "nfs")
    add_mount(mounts, str(tmp_path / "nfs"), "nfs4")
    assert places.network_type(str(tmp_path / "home" / "x")) == "nfs4"


def test_a_home_that_can_t_be_written_moves_the_state(mounts: Path, monkeypatch: pytest.MonkeyPatch):
    """Containers run with HOME=/ and an arbitrary uid."""
    monkeypatch.setattr(os, "access", lambda path, _mode: path != "/proc")  # root may do anything, tests as root too
    assert places.state_dir({"HOME": "/proc"}) == places.fallback_dir()


def test_this_machine_s_own_mounts_are_readable():
    assert places.filesystem_type("/proc/self") == "proc"


def test_the_socket_follows_its_own_rules(tmp_path: Path):
    assert places.socket_path({"CKPTD_SOCKET": "/a/s", "XDG_RUNTIME_DIR": "/r"}) == "/a/s"
    assert places.socket_path({"XDG_RUNTIME_DIR": "/r"}) == "/r/ckptd.sock"
    assert places.socket_path({}) == f"/tmp/ckptd-{os.getuid()}/ckptd.sock"


def test_the_user_s_socket_is_tried_before_the_system_s():
    own, system = places.socket_places({"XDG_RUNTIME_DIR": "/r"})
    assert (own.path, own.servers, own.own) == ("/r/ckptd.sock", (os.getuid(),), True)
    assert (system.path, system.servers, system.own) == ("/run/ckptd/ckptd.sock", (os.getuid(), 0), False)


def test_who_names_a_socket_gets_no_other():
    (named,) = places.socket_places({"CKPTD_SOCKET": "/a/s", "XDG_RUNTIME_DIR": "/r"})
    assert named.path == "/a/s"
    (system,) = places.socket_places({"CKPTD_SOCKET": places.SYSTEM_SOCKET})
    assert not system.own


def test_107_bytes_fit_and_108_do_not():
    assert places.check_socket_path("/" + "x" * 106, "V")
    with pytest.raises(places.PlaceError, match=r"108 bytes, 107 at most.*set CKPTD_SOCKET"):
        places.socket_path({"CKPTD_SOCKET": "/" + "x" * 107})
    with pytest.raises(places.PlaceError, match="XDG_RUNTIME_DIR"):
        places.socket_path({"XDG_RUNTIME_DIR": "/" + "é" * 50})


def test_a_directory_is_made_for_this_user_alone(tmp_path: Path):
    state = str(tmp_path / "a" / "state")
    assert places.ensure_state_dir(state) == state
    assert os.stat(state).st_mode & 0o777 == 0o700
    assert os.stat(places.spool_dir(state)).st_mode & 0o777 == 0o700


def test_a_directory_of_someone_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Anybody may make /tmp/ckptd-<uid> before we do."""
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(places.PlaceError, match="belongs to uid"):
        places.ensure_private_dir(str(tmp_path / "x"))


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_a_directory_that_others_may_write_is_refused(tmp_path: Path, mode: int):
    (tmp_path / "x").mkdir()
    (tmp_path / "x").chmod(mode)
    with pytest.raises(places.PlaceError, match="may be written by others"):
        places.ensure_private_dir(str(tmp_path / "x"))


def test_a_file_or_a_stranger_s_symlink_in_its_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    with pytest.raises(places.PlaceError):
        places.ensure_private_dir(str(tmp_path / "file"))
    (tmp_path / "dir").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "dir")
    places.ensure_private_dir(str(tmp_path / "link"))  # a link of one's own is one's own business
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(places.PlaceError, match="not a directory"):
        places.check_private_dir(str(tmp_path / "link"))


def test_the_directory_of_a_named_socket_is_only_made_when_missing(tmp_path: Path):
    (tmp_path / "shared").mkdir(mode=0o755)
    places.ensure_socket_dir(str(tmp_path / "shared" / "s"))
    assert os.stat(tmp_path / "shared").st_mode & 0o777 == 0o755
    places.ensure_socket_dir(str(tmp_path / "new" / "s"))
    assert os.stat(tmp_path / "new").st_mode & 0o777 == 0o700
