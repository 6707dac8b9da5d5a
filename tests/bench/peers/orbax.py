"""Orbax (JAX). Not comparable with the others: JAX arrays never change, so a save need not copy them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import torch

from tests.bench.peers import Peer
from tests.bench.state import State


class Orbax(Peer):
    """Shown for completeness; each training step would have made new arrays anyway."""

    def __init__(self, folder: Path) -> None:
        """Use JAX on the CPU."""
        super().__init__(folder)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._arrays: dict[str, Any] = {}

    def bring(self, state: State) -> None:
        """Make JAX arrays of the tensors' present values."""
        self._arrays = {
            group: {name: jax.numpy.array(tensor.numpy(), copy=True) for name, tensor in members.items()}
            for group, members in state.items()
        }
        jax.block_until_ready(self._arrays)

    def save(self, state: State, step: int) -> None:
        """Save the arrays that `bring` made."""
        self._checkpointer.save(self.path(step), args=ocp.args.StandardSave(self._arrays))

    def wait(self, step: int) -> None:
        """Wait for everything it has begun."""
        self._checkpointer.wait_until_finished()

    def load(self, step: int, like: State, *, cold: bool) -> dict[str, Any]:
        """Restore as JAX arrays; there is no check of content."""
        loaded = self._checkpointer.restore(self.path(step), args=ocp.args.StandardRestore(self._arrays))
        return {
            group: {name: torch.from_numpy(np.asarray(array).copy()) for name, array in members.items()}
            for group, members in loaded.items()
        }

    def close(self) -> None:
        """End its threads."""
        self._checkpointer.close()
