"""Sharded weights as transformers lays them out: shards, and an index that says which tensor is in which."""

import json
from typing import Any

from ckptd.worker.formats import contents
from ckptd.worker.formats.ask import TEXT_BYTES_MAX, Ask
from ckptd.worker.formats.source import Folder, broken
from ckptd.worker.protocol import Inspected

INDEX_ENDINGS = (".safetensors.index.json", ".bin.index.json")


def read(folder: Folder, ask: Ask) -> Inspected:
    """Check that every shard that an index names is there and whole.

    InvalidFormat "missing" names the first shard that is not; other torn files are answered.
    """
    shards = check_indexes(folder)
    found = contents.check(folder, ask)
    return Inspected(
        format="safetensors-sharded",
        complete=not found.problem and bool(shards),
        problem=found.problem or ("" if shards else "missing: no index yet"),
        tensors=found.tensors,
        tensors_total=found.tensors_total,
        step=found.step,
        epoch=found.epoch,
        extra={"shards": sorted(shards)[:1000]},
    )


def check_indexes(folder: Folder) -> set[str]:
    """Return the shards that all indexes of the directory name. InvalidFormat when one of them is missing."""
    shards: set[str] = set()
    for member in folder.members:
        if not member.path.endswith(INDEX_ENDINGS):
            continue
        prefix = member.path.rpartition("/")[0]
        for name in sorted(_shards(member.path, folder.read_whole(member.path, TEXT_BYTES_MAX))):
            path = f"{prefix}/{name}" if prefix else name
            if path not in folder.sizes:
                raise broken("missing", f"shard {name!r}, which {member.path!r} names")
            shards.add(path)
    return shards


def _shards(path: str, raw: bytes) -> set[str]:
    weight_map = parse_object(path, raw).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise broken("invalid_format", f"{path!r} has no weight_map")
    names = set()
    for name in weight_map.values():
        if not isinstance(name, str) or "/" in name or name in {"", ".", ".."}:
            raise broken("invalid_format", f"{path!r} names a shard outside of its directory")
        names.add(name)
    return names


def parse_object(path: str, raw: bytes) -> dict[str, Any]:
    """Parse a JSON object. InvalidFormat "truncated" when it does not parse: it may still be written."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise broken("truncated", f"{path!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise broken("invalid_format", f"{path!r} is no object")
    return found
