"""The header of a safetensors file: which tensor lies where. Foreign bytes, so every number is checked."""

import json
from typing import Any, Dict, List, NamedTuple, Tuple

from ckptd_client.dtypes import ITEM_BYTES

HEADER_BYTES_MAX = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    """One tensor: its element type as the file calls it, and where its bytes are in the file."""

    dtype: str
    shape: Tuple[int, ...]
    start: int
    end: int


def parse_header(data: Any) -> Dict[str, Entry]:
    """Return the tensors of a file whose bytes are `data`. ValueError when it is no whole safetensors file."""
    size = len(data)
    length = int.from_bytes(bytes(data[:8]), "little")
    if size < len(b"12345678") or length > min(size - 8, HEADER_BYTES_MAX):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    entries = json.loads(bytes(data[8 : 8 + length]).decode("utf-8"))
    base, found = 8 + length, {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        want = ITEM_BYTES.get(entry["dtype"], 0)
        for extent in shape:
            if not isinstance(extent, int) or extent < 0:
                raise ValueError(f"tensor {name!r} has the shape {shape}")
            want *= extent
        if not 0 <= start <= end <= size - base or (entry["dtype"] in ITEM_BYTES and want != end - start):
            raise ValueError(f"tensor {name!r} lies at {start} to {end} of {size - base} bytes, its shape takes {want}")
        found[name] = Entry(entry["dtype"], shape, base + start, base + end)
    return found


def header_of(data: Any) -> Dict[str, Any]:
    """Return the raw header of a file that may be damaged or no safetensors at all; {} when there is none."""
    length = int.from_bytes(bytes(data[:8]), "little")
    if length > min(len(data) - 8, HEADER_BYTES_MAX):
        return {}
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
    except (ValueError, RecursionError):
        return {}
    return {**header, "": 8 + length} if isinstance(header, dict) else {}


def tensors_between(header: Dict[str, Any], start: int, end: int) -> List[str]:
    """Name the tensors that have bytes between two offsets of the file; `header` is from header_of."""
    base = header.get("", 0)
    found = []
    for name, entry in header.items():
        place = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(place, list) or [type(at) for at in place] != [int, int]:
            continue
        if base + place[0] < end and base + place[1] > start:
            found.append(name)
    return found
