"""What lies around the daemon: its files' modes, its environment, its secrets, its dependencies (S23, S25 to S29)."""

import importlib.metadata
import os
import re
import socket
import stat
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ckptd.errors import BadConfig
from ckptd.intake import premises
from ckptd.worker.child import clean_environment
from ckptd_client import channel, places
from tests.support import tree
from tests.support.node import Node, eventually

NOBODY = 65534
CANARY = "c4n4ry-s3cr3t"
# Runtime dependencies beside ckptd's own client. One more is a decision, not a line in a file.
DEPENDENCIES = {
    "aiosqlite", "alembic", "anyio", "click", "msgspec", "prometheus_client", "pydantic", "sqlalchemy", "stamina",
    "starlette", "structlog", "uvicorn", "watchfiles", "xxhash",
}  # fmt: skip


def open_to_others(directory: Path) -> list[str]:
    """Everything at or below a directory that its group or others may read, write or enter."""
    found = []
    for path in [directory, *directory.rglob("*")]:
        mode = os.lstat(path).st_mode
        if not stat.S_ISLNK(mode) and mode & 0o077:
            found.append(f"{path.name} {stat.S_IMODE(mode):04o}")
    return found


# -- what others could read: S25 ------------------------------------------------------------------


def test_a_node_started_under_the_laxest_umask_keeps_its_own_files_to_itself(node: Node, plain_nursery):
    """S25: state, catalog, its journals, spool, socket; and lent memory has no path and the narrowest mode."""
    node.prefix = ("sh", "-c", 'umask 0; exec "$@"', "sh")
    node.start()
    trainer = plain_nursery.trainer(node.environ)
    trainer.open(name="run", project="p", dir=str(node.runs))
    node.wait_level(trainer.save(seed=0, step=0)["id"])
    modes = set()
    for pid in node.family():
        with suppress(OSError):  # it ended meanwhile
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    if "memfd:ckptd-arena" in os.readlink(fd):
                        modes.add(stat.S_IMODE(fd.stat().st_mode))
    assert modes == {0o600}
    assert open_to_others(node.state) == [] or not os.lstat(node.state).st_mode & 0o077
    assert not (node.state / "spool").stat().st_mode & 0o077
    assert stat.S_IMODE(node.socket.stat().st_mode) == 0o600


def test_a_state_directory_that_others_may_write_is_refused_and_one_they_may_read_is_closed(short_dir):
    """S25, S10: a catalog that somebody else can change proves nothing."""
    for mode in (0o777, 0o775):
        shared = short_dir / f"{mode:o}"
        shared.mkdir()
        shared.chmod(mode)
        with pytest.raises(BadConfig, match="may be written by others"):
            premises.lock(shared)
    readable = short_dir / "readable"
    readable.mkdir()
    readable.chmod(0o755)
    os.close(premises.lock(readable))
    assert stat.S_IMODE(readable.stat().st_mode) == 0o700


# -- a server that is somebody else: S27 ----------------------------------------------------------


def test_a_server_run_by_another_user_is_told_nothing(short_dir):
    """S27: a real second uid listens where the daemon should; the client reads nothing and says nothing."""
    if os.getuid() != 0:
        pytest.skip("needs root to be somebody else for a moment")
    short_dir.chmod(0o777)
    path = short_dir / "s"
    code = (
        "import os, socket, sys\n"
        f"os.setgroups([]); os.setresgid(*[{NOBODY}]*3); os.setresuid(*[{NOBODY}]*3)\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print('up', flush=True)\n"
        "peer, _ = s.accept(); peer.settimeout(30)\n"
        "try: peer.sendall(b'x' * 4096); print('heard', len(peer.recv(99)), flush=True)\n"
        "except OSError: print('heard 0', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-I", "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        place = places.SocketPlace(str(path), (os.getuid(),), own=True)
        with pytest.raises(channel.ChannelLost, match=f"served by uid {NOBODY}"):
            channel.dial(place)
        assert server.stdout.readline() == "heard 0\n"


# -- environment: S26 -----------------------------------------------------------------------------


def test_a_hostile_environment_and_directory_change_nothing(node: Node, short_dir: Path, monkeypatch):
    """S26: variables that speak to services, watchers or Python, and modules that lie in the working directory."""
    trap = short_dir / "trap"
    trap.mkdir()
    for name in ("json", "socket", "msgspec", "anyio", "ckptd", "sitecustomize"):
        (trap / f"{name}.py").write_text(
            f"open({str(short_dir / 'canary')!r}, 'w').write({name!r})\nraise SystemExit(9)\n"
        )
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(short_dir / "n"))
    manager.setblocking(False)
    hostile = {
        "NOTIFY_SOCKET": str(short_dir / "n"), "LISTEN_FDS": "7", "LISTEN_PID": "1", "LISTEN_FDNAMES": "ckptd.socket",
        "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "WATCHFILES_FORCE_POLLING": "1", "WATCHFILES_IGNORE_PERMISSION_DENIED": "1",
        "PYTHONSTARTUP": str(trap / "json.py"), "PYTHONINSPECT": "", "PYTHONBREAKPOINT": "os.abort",
    }  # fmt: skip
    for name, value in hostile.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(trap)
    node.start()
    node.ask("root.add", path=str(node.dir))
    eventually(node.workers, "a worker")
    assert not (short_dir / "canary").exists()
    for pid in node.workers():
        environ = Path(f"/proc/{pid}/environ").read_bytes().decode()
        for name in ("NOTIFY_SOCKET", "LISTEN_FDS", "WATCHFILES_", "WATCHDOG_", "PYTHONMALLOC"):
            assert name not in environ
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
    manager.close()


def test_a_workers_environment_lacks_what_is_meant_for_the_daemon():
    """S26."""
    given = {"PATH": "/bin", "NOTIFY_SOCKET": "/n", "LISTEN_PID": "1", "WATCHFILES_X": "1", "WATCHDOG_USEC": "1"}
    given["PYTHONMALLOC"] = "malloc"
    assert clean_environment(given) == {"PATH": "/bin"}


# -- secrets: S28 ---------------------------------------------------------------------------------


def test_a_secret_in_the_configuration_reaches_no_output(node: Node, monkeypatch):
    """S28: a catalog's password; asked for in every way, by a daemon that can't even start with it."""
    monkeypatch.setenv("CKPTD_CATALOG__URL", f"postgresql+asyncpg://ckptd:{CANARY}@127.0.0.1:1/catalog?token={CANARY}")
    node.configure()
    environ = {**os.environ, **node.environ}
    said = []
    for words in (["config", "show"], ["config", "show", "--json"], ["config", "check"], ["doctor"], ["status"]):
        command = [str(Path(sys.executable).with_name("ckpt")), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)
        said.append(done.stdout + done.stderr)
    command = [sys.executable, "-P", "-m", "ckptd.daemon", "--config", str(node.dir / "toml")]
    command += ["--state-dir", str(node.state), "--socket", str(node.socket)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60, check=False)
    assert done.returncode != 0
    said.append(done.stdout + done.stderr)
    assert "postgresql" in said[0]
    assert [text for text in said if CANARY in text] == []


@pytest.mark.timeout(300)
def test_a_trainers_secrets_reach_neither_log_nor_catalog_nor_disk(node: Node, plain_nursery):
    """S28: in its configuration, in its command line's shape, in a URL: everything that the node wrote is searched."""
    node.start()
    code = (
        "import sys\n"
        f"sys.argv += ['--api-key', '{CANARY}', '--wandb-token={CANARY}']\n"
        "import ckptd_client as ckptd\n"
        f"config = {{'lr': 0.1, 'password': '{CANARY}', 'hub': {{'token': '{CANARY}'}}, 'url': 'https://u:{CANARY}@h/x'}}\n"
        f"with ckptd.Experiment('e', project='p', config=config, dir={str(node.runs)!r}) as run:\n"
        "    run.save({'w': {'a': 1}}, step=1).wait('verified', timeout=100)\n"
    )
    environ = {**os.environ, **node.environ, "HF_TOKEN": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=110)
    said = [node.log]
    said += [path for top in (node.state, node.runs) for path in top.rglob("*") if path.is_file()]
    assert any(path.name == "manifest.json" for path in said)
    assert any("catalog" in path.name for path in said)
    assert [str(path) for path in said if CANARY.encode() in path.read_bytes()] == []


# -- supply chain: S29 ----------------------------------------------------------------------------


def test_the_daemon_has_these_dependencies_and_its_client_has_none():
    """S29."""
    asked = tomllib.loads(tree.text("pyproject.toml"))["project"]["dependencies"]
    assert {Requirement(text).name for text in asked} - {"ckptd-client"} == DEPENDENCIES
    assert tomllib.loads(tree.text("client/pyproject.toml"))["project"]["dependencies"] == []


def test_every_version_that_is_set_up_is_pinned_exactly():
    """S29: constraints.txt names one version of each; none floats, none comes from another place."""
    lines = [line for line in tree.text("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    assert {name.lower() for name in DEPENDENCIES} <= {line.partition("==")[0].lower() for line in lines}
    made = tree.text("Makefile").partition("$(STAMP):")[2].partition("\n\n")[0]
    installs = [line for line in made.splitlines() if "pip install" in line]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)


def test_what_is_native_code_among_the_dependencies_is_known():
    """S29: bytes of other users reach these; of ckptd itself nothing is native."""
    native = set()
    for name in DEPENDENCIES:
        files = importlib.metadata.distribution(name).files or []
        native |= {name} if any(str(file).endswith((".so", ".abi3.so")) for file in files) else set()
    assert native <= {"msgspec", "pydantic", "sqlalchemy", "watchfiles", "xxhash"}
    assert [path for path in tree.files() if path.endswith((".so", ".c", ".pyx", ".rs"))] == []
