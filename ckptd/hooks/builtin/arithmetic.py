"""Figures of a checkpoint's tensors: numpy where it is installed, the standard library where it is not."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

from ckptd.hooks.builtin import plain
from ckptd.hooks.builtin.plain import FLOATS, Tally
from ckptd.hooks.builtin.tensors import Tensor, Tensors


class Arithmetic(NamedTuple):
    """How numbers are read and summed up, and how many bytes a checkpoint may take of that."""

    name: str
    decode: Callable[[str, bytes], Any]
    tally: Callable[[Any], Tally]
    row_norms: Callable[[Any, int, slice], list[float]]
    bytes_max: int


# Each is good for some seconds of one core.
PLAIN = Arithmetic("standard library", plain.decode, plain.tally, plain.row_norms, 64 << 20)
VECTORS_BYTES_MAX = 2 << 30
# One thread: cores are training's, and each thread's buffers count against the process's address space.
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def arithmetic() -> Arithmetic:
    """Return the fastest there is. Call it in a hook's own process only: it may load numpy."""
    if find_spec("numpy") is None:
        return PLAIN
    for variable in _THREADS:
        os.environ.setdefault(variable, "1")
    from ckptd.hooks.builtin import vectors  # noqa: PLC0415 - the daemon lists the built-ins and must not load numpy

    return Arithmetic("numpy", vectors.decode, vectors.tally, vectors.row_norms, VECTORS_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Figures:
    """What is known of a checkpoint's numbers.

    tallies     by the tensor's key; of a sample, figures are of the sample and its norm is scaled up
    shapes      of the same tensors
    dtypes      likewise
    share       of their bytes that was read: 1.0 is all
    unread      tensors left out: beyond a limit, without a place in the file, of a packed type
    """

    step: int | None
    tallies: Mapping[str, Tally]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    share: float = 1.0
    unread: int = 0
    read_bytes: int = 0
    by: str = field(default="")


def figures(tensors: Tensors, by: Arithmetic, bytes_max: int = 0) -> Figures:
    """Read the floating-point tensors and return their figures. Blocks; InvalidFormat when a file ends early.

    bytes_max  read about so many bytes, in samples spread over every tensor when there are more; 0: by.bytes_max
    """
    limit = bytes_max or by.bytes_max
    wanted = [tensor for tensor in tensors.listed if tensor.dtype in FLOATS]
    size_bytes = sum(tensor.size_bytes for tensor in wanted)
    share = 1.0 if size_bytes <= limit else limit / size_bytes
    tallies: dict[str, Tally] = {}
    unread = tensors.unlisted
    for tensor in wanted:
        if tensors.read_bytes >= 2 * limit:  # many small tensors, each read whole, can go over the limit
            unread += 1
            continue
        tallies[tensor.key] = _scaled(_sum(by, tensor, tensors.pieces(tensor, share)), tensor)
    read = {tensor.key: tensor for tensor in wanted if tensor.key in tallies}
    return Figures(
        step=tensors.step,
        tallies=tallies,
        shapes={key: tensor.shape for key, tensor in read.items()},
        dtypes={key: tensor.dtype for key, tensor in read.items()},
        share=min(1.0, tensors.read_bytes / size_bytes) if size_bytes else 1.0,
        unread=unread,
        read_bytes=tensors.read_bytes,
        by=by.name,
    )


def _sum(by: Arithmetic, tensor: Tensor, pieces: Iterable[bytes]) -> Tally:
    whole = Tally()
    for piece in pieces:
        whole = whole.plus(by.tally(by.decode(tensor.dtype, piece)))
    return whole


def _scaled(seen: Tally, tensor: Tensor) -> Tally:
    """Let the norm of a sample stand for the whole tensor's."""
    pairs = 2 if tensor.dtype in {"C64", "C128"} else 1
    count = tensor.size_bytes // plain.SIZES[tensor.dtype] * pairs
    if not seen.elements or seen.elements >= count:
        return seen
    return seen._replace(norm=seen.norm * (count / seen.elements) ** 0.5)
