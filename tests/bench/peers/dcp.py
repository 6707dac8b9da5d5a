"""torch.distributed.checkpoint: synchronous, and four ways to be asynchronous."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from tests.bench.peers import Peer
from tests.bench.state import State


def _empty_like(like: State) -> dict[str, Any]:
    return {group: {name: torch.empty_like(t) for name, t in members.items()} for group, members in like.items()}


@contextmanager
def _as_exception() -> Iterator[None]:
    """DCP's own error is a BaseException; make it one that a caller may expect."""
    try:
        yield
    except CheckpointException as error:
        raise RuntimeError(str(error).strip().splitlines()[-1]) from error


class Sync(Peer):
    """dcp.save; its file writer fsyncs by default."""

    fsyncs = True

    def __init__(self, folder: Path) -> None:
        """DCP wants a process group even for one process."""
        super().__init__(folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=0, world_size=1)

    def save(self, state: State, step: int) -> None:
        """Block until durable."""
        dcp.save(state, checkpoint_id=self.path(step))

    def load(self, step: int, like: State, *, cold: bool) -> dict[str, Any]:
        """dcp.load into empty tensors; there is no check of content."""
        loaded = _empty_like(like)
        with _as_exception():
            dcp.load(loaded, checkpoint_id=self.path(step))
        return loaded

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()


class _Async(Sync):
    kind = AsyncCheckpointerType.THREAD

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._futures: dict[int, Future[Any]] = {}
        self._stager: DefaultStager | None = None

    def save(self, state: State, step: int) -> None:
        """Stage, and leave the rest to a thread or a process."""
        answer = dcp.async_save(
            state, checkpoint_id=self.path(step), async_checkpointer_type=self.kind, async_stager=self._stager
        )
        self._futures[step] = answer.upload_completion if isinstance(answer, AsyncSaveResponse) else answer

    def wait(self, step: int) -> None:
        """Wait for the future of that save."""
        with _as_exception():
            self._futures[step].result()

    def close(self) -> None:
        """End the stager, then the process group."""
        if self._stager is not None:
            self._stager.close()
        super().close()


class Thread(_Async):
    """async_save as the documentation shows it: a fresh stager for each save."""


class ThreadCached(_Async):
    """async_save with one stager that keeps its buffers."""

    def __init__(self, folder: Path) -> None:
        """Pinned memory and non-blocking copies must be off without a GPU."""
        super().__init__(folder)
        self._stager = DefaultStager(StagingOptions(False, False, False, False))


class Process(_Async):
    """async_save into a process of its own."""

    kind = AsyncCheckpointerType.PROCESS


class ProcessShared(_Async):
    """The same with one stager whose buffers are shared memory."""

    kind = AsyncCheckpointerType.PROCESS

    def __init__(self, folder: Path) -> None:
        """Only use_shared_memory is on."""
        super().__init__(folder)
        self._stager = DefaultStager(StagingOptions(False, True, False, False))
