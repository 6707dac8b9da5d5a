"""Real text that every machine has: the sources of Python's own standard library."""

import sysconfig
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 128  # ASCII; anything else becomes the last code
TEXT_BYTES_MAX = 4_000_000
VALIDATION_WINDOWS = 32


def read_text() -> torch.Tensor:
    """Return the first TEXT_BYTES_MAX characters of the library, as codes below VOCABULARY."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = bytearray()
    for path in sorted(library.glob("*.py")):
        found += path.read_bytes()
        if len(found) >= TEXT_BYTES_MAX:
            break
    codes = torch.frombuffer(found[:TEXT_BYTES_MAX], dtype=torch.uint8)
    return codes.clamp(max=VOCABULARY - 1).long()


class Windows:
    """Cuts the text into windows and hands them out in a shuffled order that can be resumed.

    The order of an epoch follows from its number alone, so that epoch and position are the whole
    state: `state_dict()` is two integers.
    """

    def __init__(self, text: torch.Tensor, window: int, batch: int) -> None:
        """Keep the last VALIDATION_WINDOWS windows apart; they are never trained on."""
        count = (len(text) - 1) // window
        self._text, self._window, self._batch = text, window, batch
        self._held_out = range(count - VALIDATION_WINDOWS, count)
        self._count = count - VALIDATION_WINDOWS
        self._epoch = self._position = 0
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        generator = torch.Generator().manual_seed(1000 + self._epoch)
        order: list[int] = torch.randperm(self._count, generator=generator).tolist()
        return order

    def _cut(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        starts = [number * self._window for number in numbers]
        inputs = torch.stack([self._text[start : start + self._window] for start in starts])
        targets = torch.stack([self._text[start + 1 : start + self._window + 1] for start in starts])
        return inputs, targets

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next batch: inputs and targets, each (batch, window)."""
        if self._position + self._batch > self._count:
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled()
        chosen = self._order[self._position : self._position + self._batch]
        self._position += self._batch
        return self._cut(chosen)

    def validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the held-out windows as one batch."""
        return self._cut(list(self._held_out))

    def state_dict(self) -> dict[str, int]:
        """Where in the data the training is."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._shuffled()
