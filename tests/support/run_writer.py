"""A program that writes checkpoints and has never heard of ckptd: does what it is told, one JSON object per line each way.

Bytes are made under a name first (by torch.save and the like, in memory), then come to a path piece by piece, the way
the test wants: through a descriptor, through a shared mapping, all at once by torch's own writer.
"""

import io
import json
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save as safetensors_bytes

torch.set_num_threads(1)


def tensors(seed: int, size_bytes: int) -> dict[str, torch.Tensor]:
    """Noise that follows from the seed: nothing in it is zero for long."""
    noise = torch.Generator().manual_seed(seed)
    count = max(2, size_bytes // 8)
    return {name: torch.randn(count, generator=noise) for name in ("layer.weight", "layer.bias")}


class Writer:
    """Orders are methods by name."""

    def __init__(self) -> None:
        self.made: dict[str, bytes] = {}
        self.open_files: dict[str, int] = {}
        self.maps: dict[str, mmap.mmap] = {}

    def make(self, name: str, form: str, seed: int, size_bytes: int = 1 << 20) -> dict[str, Any]:
        """Have the bytes of a checkpoint ready under a name."""
        state = tensors(seed, size_bytes)
        if form == "torch":
            buffer = io.BytesIO()
            torch.save({"model": state, "epoch": seed}, buffer)
            self.made[name] = buffer.getvalue()
        elif form == "safetensors":
            self.made[name] = safetensors_bytes(state)
        else:
            self.made[name] = b"".join(t.numpy().tobytes() for t in state.values())
        return {"size_bytes": len(self.made[name])}

    def take(self, name: str, path: str) -> dict[str, Any]:
        """Have the bytes of an existing file ready under a name."""
        self.made[name] = Path(path).read_bytes()
        return {"size_bytes": len(self.made[name])}

    def put(self, name: str, path: str) -> dict[str, Any]:
        """Write everything at once and close."""
        Path(path).write_bytes(self.made[name])
        return {}

    def torch_save(self, path: str, seed: int, size_bytes: int = 1 << 20) -> dict[str, Any]:
        """As a training script does it."""
        torch.save({"model": tensors(seed, size_bytes), "epoch": seed}, path)
        return {}

    def dcp_save(self, path: str, seed: int, size_bytes: int = 1 << 20) -> dict[str, Any]:
        """As one rank alone does it."""
        dcp.save({"model": tensors(seed, size_bytes)}, checkpoint_id=path, no_dist=True)
        return {"files": sorted(os.listdir(path))}

    def open(self, path: str, how: str = "new") -> dict[str, Any]:
        """Open for writing: "new" truncates, "old" leaves the bytes, "end" appends."""
        flags = {"new": os.O_CREAT | os.O_TRUNC, "old": 0, "end": os.O_APPEND}[how]
        self.open_files[path] = os.open(path, os.O_RDWR | flags, 0o644)
        return {}

    def write(self, name: str, path: str, part: int, of: int) -> dict[str, Any]:
        """Write one of equal parts to where it belongs."""
        body = self.made[name]
        start, end = len(body) * part // of, len(body) * (part + 1) // of
        view = memoryview(body)[start:end]
        while view:
            done = os.pwrite(self.open_files[path], view, start)
            view, start = view[done:], start + done
        return {}

    def close(self, path: str) -> dict[str, Any]:
        os.close(self.open_files.pop(path))
        return {}

    def map(self, name: str, path: str) -> dict[str, Any]:
        """Make the file in its full size, map it shared, close the descriptor: only the mapping writes from now on."""
        fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        os.ftruncate(fd, len(self.made[name]))
        self.maps[path] = mmap.mmap(fd, len(self.made[name]))
        os.close(fd)
        return {}

    def fill(self, name: str, path: str, part: int, of: int) -> dict[str, Any]:
        body = self.made[name]
        start, end = len(body) * part // of, len(body) * (part + 1) // of
        self.maps[path][start:end] = body[start:end]
        return {}

    def unmap(self, path: str) -> dict[str, Any]:
        self.maps.pop(path).close()
        return {}

    def burst(self, root: str, rounds: int, depth: int, files: int) -> dict[str, Any]:
        """Make nested directories and files in them as fast as it goes."""
        body = safetensors_bytes({"w": torch.ones(1)})
        made = []
        for number in range(rounds):
            directory = Path(root, *(f"{number}-{level}" for level in range(depth)))
            directory.mkdir(parents=True)
            for index in range(files):
                path = directory / f"model_{index}.safetensors"
                path.write_bytes(body)
                made.append(str(path))
        return {"paths": made}


def main() -> int:
    writer = Writer()
    sys.stdout.write('{"ready": true}\n')
    sys.stdout.flush()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(writer, order.pop("do"))(**order)
        except Exception as error:  # noqa: BLE001 - told to whoever gave the order
            answer = {"raised": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
