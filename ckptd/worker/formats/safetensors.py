"""The safetensors file: 8 bytes of length, a JSON header, then data without holes.

The header is written first and the size of the file is known from it, so a file that ends early
is told exactly, with the tensor it ends in. A file of full size may still hold zeros where data
was never written: structure is no proof of content, a digest is.
"""

import json
import math
from typing import Any

from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.dtypes import BITS
from ckptd.worker.formats.source import Source, broken
from ckptd.worker.protocol import Inspected, TensorRecord

HEADER_BYTES_HARD = 100_000_000  # what the format's own library refuses to pass
_TENSORS_MAX = 1_000_000
_DIMENSIONS_MAX = 64
_NUMBER_MAX = 1 << 63
_DIGITS_MAX = 18
_LENGTH_BYTES = 8
_METADATA_BYTES_MAX = 64 << 10
_METADATA = "__metadata__"

_TYPES = {"dtype": str, "shape": list, "data_offsets": list}


def read(source: Source, ask: Ask) -> Inspected:
    """Check the header against the format's rules and the file's size. InvalidFormat when it breaks them.

    A file that is shorter or longer than its header says is answered, not raised: its tensors are
    listed and `problem` names the one at which it ends.
    """
    header_bytes = _header_bytes(source, ask)
    header = _parse(source.read(_LENGTH_BYTES, header_bytes, "header"))
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict):
        raise broken("invalid_format", f"{_METADATA} is no object")
    data_start = _LENGTH_BYTES + header_bytes
    tensors = [_tensor(name, entry, data_start, source.name) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor[0], tensor[1]))
    problem = _extent_problem(tensors, data_start, source.size_bytes)
    return Inspected(
        format="safetensors",
        complete=not problem,
        problem=problem,
        tensors=[record for _, _, record in tensors[: ask.tensors_max]],
        tensors_total=len(tensors),
        step=_whole_number(metadata.get("step", metadata.get("global_step"))),
        extra=_extra(metadata),
    )


def _header_bytes(source: Source, ask: Ask) -> int:
    if source.size_bytes < _LENGTH_BYTES:
        raise broken("truncated", f"{source.size_bytes} bytes, less than the header's length takes")
    count = int.from_bytes(source.read(0, _LENGTH_BYTES), "little")
    if count > HEADER_BYTES_HARD:
        raise broken("invalid_format", f"header of {count} bytes, the format allows {HEADER_BYTES_HARD}")
    if count > ask.header_bytes_max:
        raise broken("invalid_format", f"header of {count} bytes, {ask.header_bytes_max} at most are parsed")
    if count < len("{}"):
        raise broken("invalid_format", f"header of {count} bytes holds nothing")
    if source.size_bytes > _LENGTH_BYTES and source.read(_LENGTH_BYTES, 1) != b"{":
        raise broken("invalid_format", "the header does not start with '{'")
    return count


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise broken("invalid_format", "a key occurs twice in the header")
    return found


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise broken("invalid_format", f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise broken("invalid_format", "the header is no object")
    if len(header) > _TENSORS_MAX:
        raise broken("invalid_format", f"{len(header)} tensors, {_TENSORS_MAX} at most")
    return header


def _tensor(name: str, entry: object, data_start: int, file: str) -> tuple[int, int, TensorRecord]:
    """Check one entry; return (begin, end, record), with begin and end counted from the data's start."""
    if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in _TYPES.items()):
        raise broken("invalid_format", f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if len(shape) > _DIMENSIONS_MAX or not all(_is_count(n) for n in shape):
        raise broken("invalid_format", f"tensor {name!r} has a bad shape")
    match offsets:
        case (begin, end) if _is_count(begin) and _is_count(end) and begin <= end:
            pass
        case _:
            raise broken("invalid_format", f"tensor {name!r} has bad data_offsets")
    bits = BITS.get(dtype)
    if bits is not None and math.prod(shape) * bits != (end - begin) * 8:
        raise broken("invalid_format", f"tensor {name!r}: {dtype} of shape {shape} does not take {end - begin} bytes")
    return begin, end, TensorRecord(name, dtype, shape, file, data_start + begin, data_start + end)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _NUMBER_MAX


def _extent_problem(tensors: list[tuple[int, int, TensorRecord]], data_start: int, size_bytes: int) -> str:
    """Raise for overlaps and holes; say at which tensor the file ends if it ends elsewhere than it should."""
    at, last = 0, ""
    for begin, end, record in tensors:
        if begin != at:
            what = "overlaps" if begin < at else "leaves a hole after"
            raise broken("invalid_format", f"tensor {record.name!r} {what} {last!r}")
        at, last = end, record.name
    if size_bytes > data_start + at:
        return f"invalid_format: {size_bytes - data_start - at} bytes after the last tensor {last!r}"
    if size_bytes < data_start + at:
        cut = next(record for _, _, record in tensors if record.end is not None and record.end > size_bytes)
        return f"truncated: the file ends at byte {size_bytes} in tensor {cut.name!r}, which ends at {cut.end}"
    return ""


def _extra(metadata: dict[str, Any]) -> dict[str, Any]:
    kept, room = {}, _METADATA_BYTES_MAX
    for key, value in metadata.items():
        if not isinstance(value, str):
            continue
        room -= len(key) + len(value)
        if room < 0:
            break
        kept[key] = value
    return {"metadata": kept} if kept else {}


def _whole_number(text: object) -> int | None:
    return (
        int(text) if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX else None
    )
