"""torch_checkpointing: staging into cached shared memory, written by a child process."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch_checkpointing import CheckpointManager, CheckpointStagerConfig
from torch_checkpointing.config import AsyncCheckpointSaverConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from tests.bench.peers import Peer
from tests.bench.state import State


class TorchCheckpointing(Peer):
    """Direct I/O is off: with it every save fails here with EINVAL (unaligned O_DIRECT writes)."""

    def __init__(self, folder: Path) -> None:
        """Make its manager, without the features that need a GPU."""
        super().__init__(folder)
        staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        self._manager = CheckpointManager(
            CheckpointManager.Config(
                storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
                save=AsyncCheckpointSaverConfig(staging_config=staging),
            )
        )
        self._futures: dict[int, Future[Any] | None] = {}

    def prepare(self, state: State) -> None:
        """Its own advice: allocate the staging pool beforehand. Training would hide the wait."""
        self._manager.prewarm_staging(state)
        prewarmed = self._manager._prewarm_staging_future
        if prewarmed is not None:
            prewarmed.result()

    def save(self, state: State, step: int) -> None:
        """Return once the lock that guards the optimizer's step is free again."""
        self._futures[step] = self._manager.save(str(self.path(step)), state)
        with self._manager.lock():
            pass

    def wait(self, step: int) -> None:
        """Wait for the write's future."""
        future = self._futures[step]
        if future is not None:
            future.result()

    def load(self, step: int, like: State, *, cold: bool) -> dict[str, Any]:
        """Load into empty tensors; there is no check of content."""
        into = {group: {name: torch.empty_like(t) for name, t in members.items()} for group, members in like.items()}
        return dict(self._manager.load(self.path(step), into))

    def close(self) -> None:
        """End its child."""
        self._manager.close()
