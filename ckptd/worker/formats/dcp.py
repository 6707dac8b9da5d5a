"""A torch.distributed.checkpoint directory: data in *.distcp, and .metadata that is written last.

.metadata is a pickle, so it is only ever described. It names every file with offset and length,
which makes completeness exact. A save into an old directory leaves the old .metadata over new data
for a while: one that is older than any data is stale.
"""

from collections.abc import Iterator

from ckptd.worker.formats import opcodes
from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.opcodes import Made, fields_of, pairs_of
from ckptd.worker.formats.source import Folder, broken
from ckptd.worker.formats.torch_state import dtype_of, numbers
from ckptd.worker.protocol import Inspected, TensorRecord

METADATA = ".metadata"
DATA_ENDING = ".distcp"
_TEMPORARY = (".metadata.tmp",)
_CLASSES = "torch.distributed.checkpoint.metadata."
_UNIQUE_MAX = 1_000_000

Place = tuple[str, int, int]  # file, offset, length


def read(folder: Folder, ask: Ask) -> Inspected:
    """Check that .metadata is the newest and that all data it names is there; list its tensors.

    InvalidFormat  "missing", "stale" or "truncated": not whole, or not yet; "invalid_format": damaged
    A .metadata of another tool's classes leaves complete at None: only its age tells then.
    """
    _check_ages(folder)
    root = opcodes.describe(folder.read_whole(METADATA, opcodes.BYTES_MAX))
    if not isinstance(root, Made) or not root.is_a(_CLASSES + "Metadata"):
        return Inspected(format="dcp", complete=None, extra={"unread": f"{METADATA} describes something else"})
    top = fields_of(root)
    places = dict(_places(top.get("storage_data")))
    for file, offset, length in places.values():
        _check_place(folder, file, offset + length)
    tensors = list(_tensors(top.get("state_dict_metadata"), places))
    return Inspected(
        format="dcp",
        complete=True if places else None,
        tensors=tensors[: ask.tensors_max],
        tensors_total=len(tensors),
    )


def _check_ages(folder: Folder) -> None:
    by_path = {member.path: member for member in folder.members}
    if METADATA not in by_path:
        raise broken("missing", f"{METADATA} is not there yet")
    for name in _TEMPORARY:
        if name in by_path:
            raise broken("stale", f"{name} is there: a save goes on")
    written_ns = by_path[METADATA].mtime_ns
    for path, member in by_path.items():
        if path.endswith(DATA_ENDING) and member.mtime_ns > written_ns:
            raise broken("stale", f"{path!r} is newer than {METADATA}")


def _places(storage: object) -> Iterator[tuple[tuple[str, int], Place]]:
    """Yield ((tensor name, count), place) for each piece of data; names may repeat for sharded tensors."""
    for count, (index, info) in enumerate(pairs_of(storage)):
        facts = fields_of(info)
        file, offset, length = facts.get("relative_path"), facts.get("offset"), facts.get("length")
        if not isinstance(file, str) or type(offset) is not int or type(length) is not int or count > _UNIQUE_MAX:
            raise broken("invalid_format", f"{METADATA} names data without file, offset and length")
        if min(offset, length) < 0 or max(offset, length) >= 1 << 63:
            raise broken("invalid_format", f"{METADATA} names a place that no file has")
        name = fields_of(index).get("fqn")
        yield (name if isinstance(name, str) else "", count), (file, offset, length)


def _check_place(folder: Folder, file: str, end: int) -> None:
    size_bytes = folder.sizes.get(file)
    if size_bytes is None:
        raise broken("missing", f"{file!r}, which {METADATA} names")
    if size_bytes < end:
        raise broken("truncated", f"{file!r} has {size_bytes} bytes, {METADATA} needs {end}")


def _tensors(described: object, places: dict[tuple[str, int], Place]) -> Iterator[TensorRecord]:
    """Yield every tensor; one that lies in a single piece comes with its place."""
    pieces: dict[str, list[Place]] = {}
    for (of, _), place in places.items():
        pieces.setdefault(of, []).append(place)
    for name, what in pairs_of(described):
        if not isinstance(name, str) or not isinstance(what, Made):
            continue
        if not what.is_a(_CLASSES + "TensorStorageMetadata"):
            continue
        facts = fields_of(what)
        shape, dtype = numbers(facts.get("size")), _dtype(facts.get("properties"))
        lying = pieces.get(name, [])
        if len(lying) == 1:
            file, offset, length = lying[0]
            yield TensorRecord(name, dtype, shape or [], file, offset, offset + length)
        else:
            yield TensorRecord(name, dtype, shape or [])


def _dtype(properties: object) -> str:
    """TensorProperties pickles itself as a tuple whose first member is the dtype, or as fields."""
    state = properties.state if isinstance(properties, Made) else None
    if isinstance(state, tuple) and state:
        return dtype_of(state[0])
    return dtype_of(fields_of(properties).get("dtype"))
