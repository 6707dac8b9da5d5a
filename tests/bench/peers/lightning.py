"""Lightning's AsyncCheckpointIO: clones every tensor, then torch.save in one thread."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from tests.bench.peers import Peer
from tests.bench.state import State


class Lightning(Peer):
    """The plugin gives no handle, so a no-op queued behind the save in its one thread tells its end."""

    def __init__(self, folder: Path) -> None:
        """Its thread starts with the first save."""
        super().__init__(folder)
        self._io = AsyncCheckpointIO(TorchCheckpointIO())
        self._behind: dict[int, Future[None]] = {}

    def save(self, state: State, step: int) -> None:
        """Return when the clones are made."""
        self._io.save_checkpoint(state, self.path(step))
        self._behind[step] = self._io._executor.submit(lambda: None)

    def wait(self, step: int) -> None:
        """Wait for the no-op behind that save."""
        self._behind[step].result()
        if self._io._error is not None:
            raise self._io._error

    def load(self, step: int, like: State, *, cold: bool) -> dict[str, Any]:
        """torch.load; there is no check of content."""
        loaded: dict[str, Any] = torch.load(self.path(step), weights_only=True)
        return loaded

    def close(self) -> None:
        """End its thread."""
        self._io.teardown()
