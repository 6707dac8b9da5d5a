"""States that can be told apart after a save, and what came of them."""

from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors

import ckptd_client as ckptd
from ckptd_client import spool
from tests.support.fake_daemon import files_of

BOUND_S = 20.0  # far below LONG_S, above what a machine that stands for some seconds adds
LONG_S = 90.0  # what a save would take that waits for what its test gives it no reason to wait for


def state(value: float, size: int = 1000) -> dict[str, object]:
    return {"model": {"w": torch.full((size,), float(value)), "b": torch.arange(size)}, "epoch": int(value)}


def value_in(image: bytes) -> float:
    """The one value that fills `w`; fails when two states were mixed."""
    w = load_safetensors(files_of(image)["model.safetensors"])["w"]
    assert w.unique().numel() == 1, "the image mixes two states"
    return float(w[0])


def spooled_image(home: Path, handle: ckptd.Handle) -> bytes:
    assert handle.wait_settled(30)
    return Path(spool.arena_path(str(home / "state" / "spool"), handle.id)).read_bytes()
