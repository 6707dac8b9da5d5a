"""format="torch": torch.save's own zip as the one file of a checkpoint, for states that have no other form."""

import collections
from typing import Any, Callable

from ckptd_client.dtypes import framework

FILE = "checkpoint.pt"


class _Sink:
    """A file that torch.save can write to; it has no seek, so the zip is written front to back."""

    def __init__(self, put: Callable[[Any], None]) -> None:
        self._put = put
        self.size_bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._put(view)
        self.size_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: what was written is already in place."""


def resolve(state: Any) -> Any:
    """Replace the objects in plain containers that have a state_dict() by what it gives."""
    kind = type(state)
    if kind in (dict, collections.OrderedDict):
        return kind((key, resolve(value)) for key, value in state.items())
    if kind in (list, tuple):
        return kind(resolve(value) for value in state)
    if callable(getattr(state, "state_dict", None)) and not isinstance(state, type):
        return state.state_dict()
    return state


def measure(state: Any) -> int:
    """Return the bytes torch.save writes for `state`; costs one serialisation of it."""
    sink = _Sink(lambda _: None)
    framework("torch").save(resolve(state), sink)
    return sink.size_bytes


def save_into(state: Any, buffer: memoryview) -> int:
    """Write `state` as torch.save does to the start of `buffer`; return the bytes written.

    ValueError when it does not fit: the state has grown since it was measured.
    """
    at = 0

    def put(data: memoryview) -> None:
        nonlocal at
        if at + len(data) <= len(buffer):  # an error raised in here would be lost in torch's own
            buffer[at : at + len(data)] = data
        at += len(data)

    framework("torch").save(resolve(state), _Sink(put))
    if at > len(buffer):
        raise ValueError(f"the state needs {at} bytes, more than the {len(buffer)} it was measured to need")
    return at
