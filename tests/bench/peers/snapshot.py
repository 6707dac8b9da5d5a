"""torchsnapshot: async_take stages into memory and writes from a thread."""

from pathlib import Path
from typing import Any

import torch
from torchsnapshot import Snapshot, StateDict
from torchsnapshot.snapshot import PendingSnapshot

from tests.bench.peers import Peer
from tests.bench.state import State


class TorchSnapshot(Peer):
    """One pending snapshot for each save."""

    def __init__(self, folder: Path) -> None:
        """Nothing is started before the first save."""
        super().__init__(folder)
        self._pending: dict[int, PendingSnapshot] = {}

    def save(self, state: State, step: int) -> None:
        """Return when the tensors are staged."""
        app_state = {group: StateDict(**members) for group, members in state.items()}
        self._pending[step] = Snapshot.async_take(str(self.path(step)), app_state)

    def wait(self, step: int) -> None:
        """Wait for that snapshot."""
        self._pending[step].wait()

    def load(self, step: int, like: State, *, cold: bool) -> dict[str, Any]:
        """Restore into empty tensors; there is no check of content."""
        into = {
            group: StateDict(**{name: torch.empty_like(t) for name, t in members.items()})
            for group, members in like.items()
        }
        Snapshot(str(self.path(step))).restore(into)
        return {group: dict(members) for group, members in into.items()}
