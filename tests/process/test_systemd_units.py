"""The unit files: what systemd itself says of them. S30"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.managed import Managed
from tests.support.trainer import Nursery

pytestmark = pytest.mark.slow

UNITS = Path(__file__).parents[2] / "systemd"
SERVICES = ("ckptd.service", "ckptd@.service", "user/ckptd.service")
# Keys that systemd before 254 does not know, and leaves out: what they would add, it can't do.
NEWER = {"FileDescriptorStorePreserve", "RestartSteps", "RestartMaxDelaySec"}
OWN_UID_MAX, MULTI_USER_MAX = 0.6, 2.5

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")


def run(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run one of systemd's tools."""
    given = {**os.environ, "SYSTEMD_COLORS": "0", **environ}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, env=given)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as an administrator has them: the command in a place of its own, the template with a user's name."""
    found = tmp_path / "units"
    shutil.copytree(UNITS, found)
    program = Path(sys.executable).with_name("ckptd")
    for path in found.rglob("*.service"):
        path.write_text(re.sub(r"^ExecStart=ckptd ", f"ExecStart={program} ", path.read_text(), flags=re.MULTILINE))
    for kind in ("service", "socket"):
        (found / f"ckptd@.{kind}").rename(found / f"ckptd@root.{kind}")
    return found


@needs_systemd
@pytest.mark.parametrize("name", ["ckptd", "ckptd@root", "user/ckptd"])
def test_systemd_finds_nothing_wrong_with_the_units(installed: Path, tmp_path: Path, name: str) -> None:
    user = ["--user"] if name.startswith("user/") else []
    files = [str(installed / f"{name}.{kind}") for kind in ("service", "socket")]
    said = run("systemd-analyze", "verify", "--man=no", *user, *files, XDG_RUNTIME_DIR=str(tmp_path))
    complaints = [line for line in said.stderr.splitlines() if line.strip()]
    unknown = {found[1] for line in complaints if (found := re.search(r"Unknown key(?: name)? '(\w+)'", line))}
    assert said.returncode == 0, said.stderr
    assert unknown <= NEWER
    assert len(complaints) == len([line for line in complaints if "Unknown key" in line]), said.stderr


@needs_systemd
def test_a_mistake_in_a_unit_would_be_found(installed: Path) -> None:
    path = installed / "ckptd.service"
    path.write_text(path.read_text().replace("WatchdogSec=30s", "WatchdogSec=often\nProtectKernelTunable=yes"))
    said = run("systemd-analyze", "verify", "--man=no", str(path))
    assert "often" in said.stderr
    assert "ProtectKernelTunable" in said.stderr


def exposure(path: Path) -> tuple[float, dict[str, bool]]:
    """Return systemd's score of a unit, 0 to 10, and which of its switches are set."""
    said = run("systemd-analyze", "security", "--offline=true", "--no-pager", str(path))
    score = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said.stdout)
    assert score, said.stdout + said.stderr
    listed = run("systemd-analyze", "security", "--offline=true", "--json=short", str(path))
    return float(score[1]), {row["json_field"]: bool(row["set"]) for row in json.loads(listed.stdout)}


@needs_systemd
@pytest.mark.parametrize(("name", "most"), [("ckptd@.service", OWN_UID_MAX), ("ckptd.service", MULTI_USER_MAX)])
def test_the_daemon_is_exposed_to_no_more_than_it_needs(name: str, most: float) -> None:
    score, _ = exposure(UNITS / name)
    assert score <= most


def settings(name: str) -> dict[str, list[str]]:
    """Every key of a unit file with its values."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_every_unit_has_the_contract_and_none_of_what_would_break_it(name: str) -> None:
    """Arenas outlive crash (and crash after crash), upgrade and stop; the watchdog is on; workers may lower their
    priority; peers keep uids.
    """
    unit = settings(name)
    assert unit["Type"] == ["notify"]
    assert unit["NotifyAccess"] == ["main"]
    assert unit["FileDescriptorStoreMax"] == ["512"]
    assert unit["FileDescriptorStorePreserve"] == ["yes"]
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert unit["KillMode"] == ["mixed"]
    assert unit["Restart"] == ["on-failure"]
    assert unit["WatchdogSec"] == ["30s"]
    assert unit["UMask"] == ["0077"]
    assert "CKPTD_FAIL" in unit["UnsetEnvironment"][0]
    for key in ("ProtectHome", "PrivateTmp", "ProcSubset"):
        assert key not in unit
    assert not any("@resources" in value for value in unit.get("SystemCallFilter", []))


def test_the_daemon_of_several_users_sees_their_uids_and_their_processes() -> None:
    unit = settings("ckptd.service")
    assert {"PrivateUsers", "ProtectProc"}.isdisjoint(unit)
    assert unit["Environment"][0] == "CKPTD_MODE=system"
    assert not any(value.startswith("~@privileged") for value in unit["SystemCallFilter"])


@pytest.mark.parametrize(
    ("socket", "mode"),
    [("ckptd.socket", "0666"), ("ckptd@.socket", "0600"), ("user/ckptd.socket", "0600")],
)
def test_only_the_door_of_all_is_open_to_all(socket: str, mode: str) -> None:
    unit = settings(socket)
    assert unit["SocketMode"] == [mode]
    assert unit["FileDescriptorName"] == ["ckptd.socket"]
    service = settings(socket.replace(".socket", ".service"))
    assert service["Requires"] == [socket.rpartition("/")[2].replace("@", "@%i")]


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="no systemd-sysusers")
def test_systemd_would_make_the_account() -> None:
    said = run("systemd-sysusers", "--dry-run", str(UNITS / "sysusers.d" / "ckptd.conf"))
    assert said.returncode == 0, said.stderr
    assert "ckptd" in (UNITS / "sysusers.d" / "ckptd.conf").read_text()


@pytest.mark.skipif(
    shutil.which("systemd-tmpfiles") is None or os.getuid() != 0, reason="no systemd-tmpfiles, or no root"
)
def test_a_state_directory_in_tmp_is_never_aged_out(tmp_path: Path) -> None:
    """A home on NFS puts catalog and spool below /tmp: ten days later they must still be there."""
    root = tmp_path / "root"
    state = root / "tmp" / "ckptd-1000"
    (state / "spool").mkdir(parents=True)
    (root / "tmp" / "other").mkdir()
    (root / "etc").mkdir()
    (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nckptd:x:990:990::/:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\nckptd:x:990:\n")
    aging = tmp_path / "aging.conf"
    aging.write_text("d /tmp 1777 root root 0\n")  # anything is too old at once
    ours = UNITS / "tmpfiles.d" / "ckptd.conf"
    said = run("systemd-tmpfiles", f"--root={root}", "--clean", str(aging), str(ours))
    assert said.returncode == 0, said.stderr
    assert (state / "spool").is_dir()
    assert not (root / "tmp" / "other").exists()
    said = run("systemd-tmpfiles", f"--root={root}", "--create", str(ours))
    assert said.returncode == 0, said.stderr
    assert (root / "run" / "ckptd").stat().st_mode & 0o777 == 0o755


@pytest.mark.timeout(240)
def test_a_save_passes_without_memory_that_is_writable_and_executable(short_dir: Path, nursery: Nursery) -> None:
    """MemoryDenyWriteExecute is in the units: libffi, SQLite and the watcher live with the kernel's own form of it."""
    deny = Path(__file__).parents[1] / "support" / "run_denied.py"
    probe = "import runpy, sys; sys.exit(not runpy.run_path(sys.argv[1])['deny']())"
    if run(sys.executable, "-c", probe, str(deny)).returncode:
        pytest.skip("the kernel has no PR_SET_MDWE")
    node = Managed(short_dir, program=(str(deny),))
    try:
        node.start()
        trainer = nursery.trainer(node.environ)
        trainer.open(name="denied", project="units", dir=str(node.runs))
        node.wait_level(trainer.save(seed=1, step=1)["id"])
        assert "refused" in Path(f"/proc/{node.manager.pid}/environ").read_text()
    finally:
        print(node.tail())
        node.clean_up()


def system_calls(*filters: str) -> set[str]:
    """Return what SystemCallFilter= lines let through, as this systemd knows its groups."""
    groups: dict[str, list[str]] = {}
    for line in run("systemd-analyze", "syscall-filter", "--no-pager").stdout.splitlines():
        if line.startswith("@"):
            members = groups.setdefault(line.strip(), [])
        elif (name := line.strip()) and not name.startswith("#"):
            members.append(name)

    def of(name: str) -> set[str]:
        return {call for member in groups[name] for call in of(member)} if name.startswith("@") else {name}

    allowed: set[str] = set()
    for each in filters:
        allowed = allowed - of(each[1:]) if each.startswith("~") else allowed | of(each)
    return allowed


@needs_systemd
@pytest.mark.faults
@pytest.mark.timeout(120)
@pytest.mark.skipif(shutil.which("strace") is None or os.getuid() != 0, reason="needs root and strace")
def test_daemon_and_workers_make_no_system_call_that_their_units_deny(short_dir: Path, nursery: Nursery) -> None:
    """Start, save, publish, verify, watch, retire, restart, stop: whatever EPERM would break is not denied."""
    traced = Path(__file__).parents[1] / "support" / "run_traced.py"
    watched = short_dir / "legacy"
    watched.mkdir()
    more = f'[retention]\nkeep_last = 1\ntrash_grace_s = 0\n[[roots]]\npath = "{watched}"\nkind = "watched"\n'
    node = Managed(short_dir, program=(str(traced), str(short_dir / "calls")), more=more)
    try:
        node.start()
        trainer = nursery.trainer(node.environ)
        trainer.open(name="traced", project="units", dir=str(node.runs))
        (watched / "step_1.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        for step in range(1, 4):
            saved = trainer.save(seed=step, step=step)
            node.wait_level(saved["id"])
        node.manager.restart()
        node.wait_idle()
        node.stop()
    finally:
        print(node.tail())
        node.clean_up()
    text = "".join(path.read_text(errors="replace") for path in short_dir.glob("calls*"))
    made = set(re.findall(r"^(?:\d+ +)?(?:<\.\.\. )?(\w+)(?:\(| resumed)", text, flags=re.MULTILINE))
    assert {"memfd_create", "renameat2", "fdatasync", "recvmsg", "inotify_add_watch"} <= made
    everybodys = system_calls(*settings("ckptd.service")["SystemCallFilter"])
    assert made - everybodys == set()
    own = system_calls(*settings("ckptd@.service")["SystemCallFilter"])
    assert own < everybodys
    assert made - own <= {"fchown"}  # SQLite gives its log the database's owner when it runs as root, and only then
