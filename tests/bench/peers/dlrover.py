"""DLRover Flash Checkpoint: one shared-memory segment, persisted by an agent process."""

import time
from pathlib import Path
from typing import Any

import torch
from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType
from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

from tests.bench.peers import Peer
from tests.bench.state import State

POLL_S = 0.01
SILENCE_S = 10.0  # nothing new in its folder for this long, with a save outstanding: it is lost


class Dlrover(Peer):
    """Started without its launcher, as its documentation allows: the agent is a child."""

    def __init__(self, folder: Path) -> None:
        """The harness has set TORCHELASTIC_RUN_ID, which keeps its names apart from other runs'."""
        super().__init__(folder)
        self._checkpointer = DdpCheckpointer(str(folder))

    def save(self, state: State, step: int) -> None:
        """Copy into shared memory; the agent does the rest."""
        self._checkpointer.save_checkpoint(step, dict(state), storage_type=StorageType.DISK)

    def wait(self, step: int) -> None:
        """Wait for its tracker to name this step or a later one. TimeoutError when it never does."""
        tracker = self.folder / "dlrover_latest.txt"
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < SILENCE_S:
            if tracker.exists() and int(tracker.read_text() or -1) >= step:
                return
            written = sum(entry.stat().st_size for entry in self.folder.rglob("*.pt"))
            if written != seen:
                seen, since = written, time.monotonic()
            time.sleep(POLL_S)
        raise TimeoutError(f"no word of step {step}, and nothing written for {SILENCE_S:.0f} s")

    def path(self, step: int) -> Path:
        """A directory with one file for each rank."""
        return self.folder / str(step)

    def load(self, step: int, like: State, *, cold: bool) -> dict[str, Any]:
        """What its agent wrote is torch.save's format; there is no check of content."""
        loaded = torch.load(self.path(step) / "rank_0.pt", weights_only=False)
        return {group: loaded[group] for group in like}

    def close(self) -> None:
        """End its agent. The segment and the sockets that it leaves behind are the harness's to remove."""
        engine = self._checkpointer._engine
        engine.close()
        if engine.saver_proc is not None:
            engine.saver_proc.kill()
            engine.saver_proc.join()
