"""The state that every peer saves: known bytes that change in each element from step to step."""

from collections.abc import Iterator
from typing import Any

import torch

SMALL_TENSORS = 5000
LARGE_TENSORS = 24
MODEL_SHARE = 3  # one tensor in three is a weight, the others are the optimizer's moments

State = dict[str, dict[str, torch.Tensor]]


def build(size_bytes: int, shape: str) -> State:
    """Return about `size_bytes` of fp32 in few "large" or 5,000 "small" tensors, at step 0.

    Small ones differ in size, as biases and norms do; the sum is the same.
    """
    count = SMALL_TENSORS if shape == "small" else LARGE_TENSORS
    mean = size_bytes // 4 // count
    noise = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)).add_(1.0)
    state: State = {"model": {}, "optimizer": {}}
    for index in range(count):
        length = mean + (index % 7 - 3) * (mean // 16) if shape == "small" else mean
        values = torch.empty(length)
        for start in range(0, length, len(noise)):
            part = values[start : start + len(noise)]
            part.copy_(noise[: len(part)])
        values.view(torch.int32).add_(index * 7919)
        group = "model" if index % MODEL_SHARE == 0 else "optimizer"
        state[group][f"layer{index:04d}.weight"] = values
    return state


def tensors(state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor with its dotted name."""
    for group, members in state.items():
        for name, tensor in members.items():
            yield f"{group}/{name}", tensor


def size(state: State) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for _, tensor in tensors(state))


def advance(state: State) -> None:
    """One step: every element of every tensor changes (its bit pattern rises by one)."""
    for _, tensor in tensors(state):
        tensor.view(torch.int32).add_(1)


def compare(loaded: dict[str, Any], state: State, steps_behind: int) -> str:
    """Say how `loaded` relates to what `state` was `steps_behind` steps ago.

    "exact", "torn: n of m tensors are of another step", or "wrong: ..." with the first difference.
    """
    found = dict(tensors(loaded))
    expected = dict(tensors(state))
    if found.keys() != expected.keys():
        return f"wrong: {len(found.keys() ^ expected.keys())} tensors missing or unknown"
    torn = 0
    for name, now in expected.items():
        then = found[name]
        if then.shape != now.shape or then.dtype != now.dtype:
            return f"wrong: {name} has another shape or type"
        behind = now.view(torch.int32) - then.view(torch.int32)
        if not bool((behind == steps_behind).all()):
            if int(behind.max()) - int(behind.min()) > 1000 or abs(int(behind[0])) > 1000:
                return f"wrong: {name} holds other values"
            torn += 1
    return f"torn: {torn} of {len(expected)} tensors are of another step" if torn else "exact"
