"""A training step to be disturbed: matrix products on all cores, then an update of the whole state."""

import time

import torch

from tests.bench.state import State, advance

WIDTH, BATCH, LAYERS = 768, 256, 3


class Training:
    """Each step computes like a small network and then, as an optimizer does, changes every tensor."""

    def __init__(self, state: State) -> None:
        """Make the network; `state` is what is checkpointed."""
        self._state = state
        self._layers = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        self._inputs = torch.randn(BATCH, WIDTH)
        self.taken = 0

    def step(self) -> float:
        """Take one step; return its wall seconds."""
        begun = time.perf_counter()
        self._layers(self._inputs).square().mean().backward()
        advance(self._state)
        self.taken += 1
        return time.perf_counter() - begun
