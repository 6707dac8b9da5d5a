"""The two ways that stop the training until the bytes are on the disk."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.bench.peers import Peer
from tests.bench.state import State, tensors


def _fsync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


class TorchSave(Peer):
    """torch.save, then fsync of the file and its directory."""

    fsyncs = True

    def save(self, state: State, step: int) -> None:
        """Block until durable."""
        torch.save(state, self.path(step))
        _fsync(self.path(step))
        _fsync(self.folder)

    def load(self, step: int, like: State, *, cold: bool) -> dict[str, Any]:
        """torch.load, as most scripts call it; there is no check of content."""
        loaded: dict[str, Any] = torch.load(self.path(step), weights_only=True)
        return loaded


class Safetensors(Peer):
    """save_file, then fsync of the file and its directory."""

    fsyncs = True

    def save(self, state: State, step: int) -> None:
        """Block until durable."""
        save_file(dict(tensors(state)), self.path(step))
        _fsync(self.path(step))
        _fsync(self.folder)

    def load(self, step: int, like: State, *, cold: bool) -> dict[str, Any]:
        """load_file; there is no check of content."""
        loaded: dict[str, Any] = {group: {} for group in like}
        for key, tensor in load_file(self.path(step)).items():
            group, _, name = key.partition("/")
            loaded[group][name] = tensor
        return loaded
