"""One daemon of root's for everybody on the node: what it can't take at once arrives later, and stays its user's."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.node import Node, eventually
from tests.support.strangers import SOMEBODY, need_root

PATIENCE_S = 60.0
LONG = "delay:60"
PRIVATE = ("sh", "-c", 'umask 077 && exec "$0" "$@"')  # as its unit has it
_TRAIN = """
import encodings.ascii, importlib, json, os, pkgutil, sys
import ckptd_client
for found in pkgutil.walk_packages(ckptd_client.__path__, "ckptd_client."):
    if "integrations" not in found.name:
        importlib.import_module(found.name)
import torch
uid = int(sys.argv[1])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
run = ckptd_client.Experiment("run", project="shared", dir=sys.argv[2])
handles = []
for line in sys.stdin:
    said, found = json.loads(line), {}
    if said["op"] == "save":
        handles.append(run.save({"x": [said["step"]] * 1000}, step=said["step"]))
    elif said["op"] == "wait":
        handles[-1].wait(said["level"], 60)
    elif said["op"] == "flush":
        assert run.flush(60)
    elif said["op"] == "load":
        found["loaded"] = run.load("latest")["x"][0]
    if handles:
        found.update(level=handles[-1].level, spooled=handles[-1].spooled)
    print(json.dumps(found), flush=True)
run.close()
"""


class Shared(Node):
    """A node that serves every user."""

    def configure(self, more: str | None = None) -> None:
        super().configure(more)
        self.plan.touch()
        self.plan.chmod(0o666)  # fail points are met as whoever is acted as
        file = self.dir / "toml"
        file.write_text(f'mode = "system"\n{file.read_text()}\n[[roots]]\npath = "{self.runs}"\nkind = "managed"\n')


class Stranger:
    """A training process of another user."""

    def __init__(self, node: Node, home: Path) -> None:
        environ = {**os.environ, **node.environ, "HOME": str(home)}
        del environ["CKPTD_DIR"]  # a user's own state is its own
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TRAIN, str(SOMEBODY), str(node.runs)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)
        self.process.stdout.close()

    def do(self, op: str, **more: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"op": op, **more}) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ck") as directory:
        os.chown(directory, SOMEBODY, SOMEBODY)
        yield Path(directory)


@pytest.fixture
def shared() -> Iterator[Shared]:
    need_root()
    with tempfile.TemporaryDirectory(prefix="ck") as directory:
        os.chmod(directory, 0o755)
        node = Shared(Path(directory))
        node.runs.mkdir()
        os.chown(node.runs, SOMEBODY, SOMEBODY)
        try:
            node.request_s = 60.0
            node.start()
            yield node
        finally:
            node.clean_up()


def verified(node: Node, step: int) -> dict[str, Any]:
    def there() -> dict[str, Any] | None:
        return next((row for row in node.rows("shared") if row["step"] == step and row["level"] == "verified"), None)

    found: dict[str, Any] = eventually(there, f"step {step} to be verified", PATIENCE_S)
    return found


def test_what_another_user_saves_without_the_daemon_arrives_with_the_next(shared: Shared, home: Path):
    """M007, M209: the spool is one that the daemon looks into, and nobody else can."""
    with Stranger(shared, home) as trainer:
        trainer.do("save", step=1)
        trainer.do("wait", level="verified")
        mine = shared.spool / str(SOMEBODY)
        facts = mine.stat()
        assert (facts.st_uid, facts.st_mode & 0o777) == (SOMEBODY, 0o700)
        assert [path.stat().st_mode & 0o777 for path in (shared.spool, shared.state)] == [0o711, 0o711]
        shared.stop()
        trainer.do("save", step=2)
        assert trainer.do("flush")["spooled"]
        assert [path.suffix for path in mine.iterdir()] == [".arena"]
    shared.start()
    assert verified(shared, 2)["state"] == "live"
    eventually(lambda: not list(mine.iterdir()), "the spool to be empty", PATIENCE_S)
    assert not list(home.rglob("*.arena"))


def test_what_a_trainer_saved_that_never_reached_the_daemon_is_brought_by_the_next_one(shared: Shared, home: Path):
    """M007: it knew of no other spool than its user's own, which a daemon of everybody's does not look into."""
    shared.stop()
    with Stranger(shared, home) as trainer:
        trainer.do("save", step=1)
        assert trainer.do("flush")["spooled"]
    assert len(list(home.rglob("*.arena"))) == 1
    shared.start()
    with Stranger(shared, home) as trainer:
        trainer.do("save", step=2)
        trainer.do("wait", level="verified")
        verified(shared, 1)
    assert not list(home.rglob("*.arena"))


def test_what_a_stopping_daemon_spills_for_another_user_stays_that_users(shared: Shared, home: Path):
    """I12: the next daemon takes it for what it is, and does not say that its id is somebody else's."""
    with Stranger(shared, home) as trainer:
        trainer.do("save", step=1)
        trainer.do("wait", level="verified")
        shared.arm("copy.chunk", LONG)
        trainer.do("save", step=2)
        trainer.do("wait", level="staged")
        shared.wait_fired()
        shared.signal(signal.SIGTERM)
        eventually(lambda: shared.said("daemon.draining"), "the drain to begin", PATIENCE_S)
        shared.signal(signal.SIGTERM)
        assert shared.ended() == 0
    assert [path.stat().st_uid for path in shared.spool.glob("*.arena")] == [SOMEBODY]
    shared.start()
    verified(shared, 2)
    assert not shared.said("spool.refused")


def test_what_the_daemon_writes_for_another_user_is_that_users_who_loads_it_from_the_disk(shared: Shared, home: Path):
    """Root's own files, 0600 under the unit's umask, nobody could load who saved them."""
    shared.stop()
    shared.prefix = PRIVATE
    shared.start()
    with Stranger(shared, home) as trainer:
        trainer.do("save", step=1)
        trainer.do("wait", level="verified")
    path = Path(verified(shared, 1)["path"])
    eventually(lambda: os.path.lexists(path.parent / "latest"), "the link", PATIENCE_S)
    made = [below for below in shared.runs.rglob("*") if not below.name.startswith(".ckptd-")]
    assert {below.lstat().st_uid for below in made} == {SOMEBODY}
    assert {below.stat().st_mode & 0o077 for below in made} == {0}
    shared.stop()  # and the copies in memory with it
    shared.start()
    with Stranger(shared, home) as trainer:
        assert trainer.do("load")["loaded"] == 1


def test_where_its_user_may_not_write_a_save_waits_and_doctor_and_the_log_name_it(shared: Shared, home: Path):
    """The daemon is root, and still goes nowhere that the user could not go."""
    os.chown(shared.runs, 0, 0)
    shared.runs.chmod(0o755)
    with Stranger(shared, home) as trainer:
        trainer.do("save", step=1)
        trainer.do("wait", level="staged")
        [said, *_] = eventually(lambda: shared.said("stage.failed"), "the refusal", PATIENCE_S)
        assert said["code"] == "denied"
        refusal = f"uid {SOMEBODY} may not make or change {shared.runs}/shared/run/step_"
        assert said["message"].startswith(refusal)

        def named() -> bool:
            return any(c["name"] == "jobs" and refusal in c["detail"] for c in shared.ask("doctor")["checks"])

        eventually(named, "doctor to name it", PATIENCE_S)
        assert os.listdir(shared.runs) in ([], [".ckptd-root"])
        os.chown(shared.runs, SOMEBODY, SOMEBODY)
        trainer.do("wait", level="verified")
