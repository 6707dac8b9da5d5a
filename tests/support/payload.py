"""What trainers of the process tests save: bytes that follow from a seed, so that everybody knows what must come back."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

SMALL_BYTES = 96 << 10


def arrays(seed: int, size_bytes: int = SMALL_BYTES) -> dict[str, dict[str, "np.ndarray[Any, Any]"]]:
    """Two files' worth of arrays: three quarters of the bytes in the model, one in the optimizer."""
    noise = np.random.default_rng(seed)
    words = max(4, size_bytes // 4)
    return {
        "model": {
            "weight": noise.integers(0, 1 << 32, words // 2, dtype=np.uint32).view(np.int32),
            "bias": noise.integers(0, 1 << 32, words // 4, dtype=np.uint32).view(np.int32),
        },
        "optimizer": {"moment": noise.integers(0, 1 << 32, words // 4, dtype=np.uint32).view(np.int32)},
    }


def plain(seed: int) -> dict[str, Any]:
    """Values that need no tensor library."""
    return {"seed": seed, "text": hashlib.sha256(str(seed).encode()).hexdigest()}


def check_directory(path: Path) -> dict[str, Any]:
    """Return the manifest of a published checkpoint whose every file is as it says. AssertionError names what is not."""
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())
    assert manifest["files"], f"{path} lists no files"
    for file in manifest["files"]:
        body = (path / file["path"]).read_bytes()
        assert len(body) == file["size_bytes"], f"{path / file['path']}: {len(body)} bytes"
        assert hashlib.sha256(body).hexdigest() == file["sha256"], f"{path / file['path']}: another digest"
    return manifest


def check_saved(path: Path, seed: int, size_bytes: int = SMALL_BYTES) -> dict[str, Any]:
    """check_directory(), and what is in it is exactly what the trainer with this seed had: read by the public library."""
    manifest = check_directory(path)
    for stem, wanted in arrays(seed, size_bytes).items():
        found = load_file(path / f"{stem}.safetensors")
        assert len(found) == len(wanted)
        for name, array in wanted.items():
            (key,) = [key for key in found if key.endswith(name)]
            assert found[key].dtype == array.dtype
            assert np.array_equal(found[key], array), f"{path}/{stem}.safetensors: {key} differs"
    check_plain(path, seed)
    return manifest


def check_plain(path: Path, seed: int) -> None:
    """The plain values are the seed's."""
    state = (path / "state.json").read_text()
    assert plain(seed)["text"] in state, f"{path}/state.json is not of seed {seed}"
