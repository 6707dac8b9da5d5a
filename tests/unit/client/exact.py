"""What "exact" means for a state that came back, and a checkpoint directory made without a daemon."""

import collections
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from ckptd_client.arena import MappedArena, copy_state
from ckptd_client.flatten import flatten
from ckptd_client.plan import build_plan


def assert_same(found: Any, wanted: Any, where: str = "state") -> None:  # noqa: C901  # one branch for each kind
    """Fail unless both have the same types, order, element types, shapes and bits."""
    assert type(found) is type(wanted), f"{where}: {type(found)} is not {type(wanted)}"
    if isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), where
        assert bits(found) == bits(wanted), where
        if isinstance(wanted, torch.nn.Parameter):
            assert found.requires_grad == wanted.requires_grad, where
    elif isinstance(wanted, np.ndarray | np.generic):
        assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes()), where
    elif isinstance(wanted, float):
        assert struct.pack("<d", found) == struct.pack("<d", wanted), where
    elif isinstance(wanted, complex):
        assert_same(found.real, wanted.real, where)
        assert_same(found.imag, wanted.imag, where)
    elif isinstance(wanted, dict):
        assert_same(list(found), list(wanted), where + " keys")
        for one, other in zip(found.values(), wanted.values(), strict=True):
            assert_same(one, other, where)
        assert vars(found) == vars(wanted) if isinstance(wanted, collections.OrderedDict) else True
        assert getattr(found, "default_factory", None) is getattr(wanted, "default_factory", None)
    elif isinstance(wanted, (list, tuple, collections.deque)):
        assert len(found) == len(wanted), where
        assert getattr(found, "maxlen", None) == getattr(wanted, "maxlen", None)
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(wanted, (set, frozenset)):
        assert sorted(map(repr, found)) == sorted(map(repr, wanted)), where
    else:
        assert found == wanted, where


def bits(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes in row-major order, whatever its strides and element type."""
    packed = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).reshape(-1)
    return packed.view(torch.uint8).numpy().tobytes() if packed.numel() else b""


def image(state: Any) -> tuple[MappedArena, list[dict[str, Any]]]:
    """Copy a state into an arena of its own; return it and the descriptor's files."""
    flat = flatten(state)
    plan = build_plan(flat)
    arena = MappedArena.anonymous(plan.arena_bytes)
    return arena, copy_state(plan, flat, arena).files


def write_checkpoint(path: Path, state: Any, **manifest: Any) -> Path:
    """Publish a state as a checkpoint directory, as the daemon would."""
    path.mkdir(parents=True)
    arena, files = image(state)
    records = []
    for file in files:
        data = bytes(arena.buffer[file["offset"] :][: file["size_bytes"]])
        (path / file["path"]).write_bytes(data)
        xxh3 = [xxhash.xxh3_64_hexdigest(data[at : at + (1 << 20)]) for at in range(0, len(data), 1 << 20)]
        digest = hashlib.sha256(data).hexdigest()
        records.append({"path": file["path"], "size_bytes": len(data), "sha256": digest, "xxh3": xxh3})
    arena.close()
    facts = {
        "v": 1,
        "checkpoint": "ab" * 16,
        "step": 1,
        "revision": 0,
        "created_at": "2026-01-01T00:00:00Z",
        **manifest,
    }
    (path / "manifest.json").write_text(json.dumps({**facts, "files": records}))
    return path


def memory_file(arena: MappedArena) -> int:
    """Return a read-only descriptor of a memfd with an arena's bytes, as attach gives it."""
    fd = os.memfd_create("test-arena")
    os.write(fd, arena.buffer)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return read_only
