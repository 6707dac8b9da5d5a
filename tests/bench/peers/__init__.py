"""One adapter for each way to save; all speak the same small interface."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tests.bench.state import State


class Peer:
    """What the benchmark asks of a way to save. One process uses one peer."""

    fsyncs: ClassVar[bool] = False  # False: the harness fsyncs what it wrote, and counts that

    def __init__(self, folder: Path) -> None:
        """`folder` is empty and this peer's alone."""
        self.folder = folder

    def prepare(self, state: State) -> None:
        """Do what the peer's documentation advises before a first save; timed apart from it."""

    def bring(self, state: State) -> None:
        """Turn the tensors into what the library can save; not part of the save. Most take tensors."""

    def save(self, state: State, step: int) -> None:
        """Return as soon as the tensors may change."""
        raise NotImplementedError

    def wait(self, step: int) -> None:
        """Block until the peer says that the save of `step` is done. Raises what the save raised."""

    def wait_verified(self, step: int) -> bool:
        """Block until the peer has read it back and compared; False when it never does."""
        return False

    def path(self, step: int) -> Path:
        """Where the save of `step` lies, a file or a directory."""
        return self.folder / f"step_{step}"

    def load(self, step: int, like: State, *, cold: bool) -> dict[str, Any]:
        """Return the state of `step`. `like` may be used as the target's shape, never its values.

        cold  from the disk, with every check of content that the peer has
        """
        raise NotImplementedError

    def roots(self) -> list[int]:
        """Processes outside our own tree that work for this peer."""
        return []

    def close(self) -> None:
        """End threads and processes; remove what lies outside `folder`."""


@dataclass(frozen=True)
class Entry:
    """One row of the benchmark: where the adapter is, and which pinned requirement it needs."""

    name: str
    title: str
    target: str
    needs: str = "torch"
    only_first: bool = False
    sizes_mb: tuple[int, ...] = (64, 1024, 4096)
    shapes: tuple[str, ...] = ("large", "small")


ENTRIES = [
    Entry("ckptd", "ckptd", "ckptd:Ckptd", "ckptd-client"),
    Entry("ckptd-unprepared", "ckptd, no prepare()", "ckptd:CkptdUnprepared", "ckptd-client", only_first=True),
    Entry("torch-save", "torch.save + fsync", "plain:TorchSave"),
    Entry("safetensors", "safetensors + fsync", "plain:Safetensors"),
    Entry("dcp-sync", "DCP save", "dcp:Sync", sizes_mb=(64, 1024)),
    Entry("dcp-thread", "DCP async, thread", "dcp:Thread", sizes_mb=(64, 1024)),
    Entry("dcp-cached", "DCP async, thread, cached stager", "dcp:ThreadCached"),
    Entry("dcp-process", "DCP async, process", "dcp:Process", sizes_mb=(64, 1024)),
    Entry("dcp-shared", "DCP async, process, cached shared stager", "dcp:ProcessShared"),
    Entry("torch-checkpointing", "torch_checkpointing", "meta:TorchCheckpointing", "torch_checkpointing"),
    Entry("dlrover", "DLRover Flash Checkpoint", "dlrover:Dlrover", "dlrover"),
    Entry("torchsnapshot", "torchsnapshot async_take", "snapshot:TorchSnapshot", "torchsnapshot", sizes_mb=(64, 1024)),
    Entry("lightning", "Lightning AsyncCheckpointIO", "lightning:Lightning", "lightning", sizes_mb=(64, 1024)),
    Entry("orbax", "Orbax (JAX, not comparable)", "orbax:Orbax", "orbax", sizes_mb=(64, 1024), shapes=("large",)),
]
BY_NAME = {entry.name: entry for entry in ENTRIES}


def make(name: str, folder: Path) -> Peer:
    """Import one adapter and what it needs. ImportError when that is not installed."""
    module, _, attribute = BY_NAME[name].target.partition(":")
    adapter: Peer = getattr(importlib.import_module(f"tests.bench.peers.{module}"), attribute)(folder)
    return adapter
