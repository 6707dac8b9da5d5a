"""ckptd: its own daemon for each case, so that no arena is warm before its time."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import ckptd_client
from ckptd_client import restore
from ckptd_client.handle import Handle
from tests.bench.peers import Peer
from tests.bench.state import State
from tests.bench.venv import REPOSITORY

START_S = 30.0
STOP_S = 30.0
PREPARE_S = 120.0


class Ckptd(Peer):
    """Handed over by memory; the daemon, its supervisor and its worker are measured with it."""

    fsyncs = True
    name = "prepared"

    def __init__(self, folder: Path) -> None:
        """Start a daemon with a state directory and a socket of its own."""
        super().__init__(folder)
        self._private = Path(tempfile.mkdtemp(prefix="ckbench"))  # short: a socket's path has 107 bytes
        environment = {"CKPTD_DIR": str(folder / "daemon"), "CKPTD_SOCKET": str(self._private / "s")}
        os.environ.update(environment)
        command = [str(REPOSITORY / ".venv" / "bin" / "ckptd")]
        self._daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._run = ckptd_client.Experiment(self.name, project="bench", dir=folder / "runs", autostart=False)
        self._handles: dict[int, Handle] = {}
        until = time.monotonic() + START_S
        while not self._run.stats()["connected"]:
            if time.monotonic() > until or self._daemon.poll() is not None:
                raise RuntimeError("the daemon did not start")
            time.sleep(0.05)

    def prepare(self, state: State) -> None:
        """Have the arenas populated and mapped; training would hide the wait."""
        if not self._run.prepare(state, wait_s=PREPARE_S):
            raise RuntimeError(f"no arena was ready within {PREPARE_S:.0f} s")

    def save(self, state: State, step: int) -> None:
        """Copy into the arena and commit."""
        self._handles[step] = self._run.save(state, step=step)

    def wait(self, step: int) -> None:
        """Wait for the daemon's word that it is fsynced."""
        self._handles[step].wait("durable")

    def wait_verified(self, step: int) -> bool:
        """Wait for its word that it was read back and compared."""
        self._handles[step].wait("verified")
        return True

    def path(self, step: int) -> Path:
        """Where it was published."""
        return Path(self._handles[step].path)

    def load(self, step: int, like: State, *, cold: bool) -> dict[str, Any]:
        """cold: from the disk with every digest checked; else as a restarted script would."""
        if cold:
            return dict(restore.read_checkpoint(str(self.path(step)), verify=True))
        return dict(self._run.load(step))

    def close(self) -> None:
        """Close the experiment, stop the daemon."""
        self._run.close()
        self._daemon.terminate()
        self._daemon.wait(STOP_S)
        shutil.rmtree(self._private, ignore_errors=True)


class CkptdUnprepared(Ckptd):
    """Without prepare(): the first save pays for its pages."""

    name = "unprepared"

    def prepare(self, state: State) -> None:
        """Nothing."""
