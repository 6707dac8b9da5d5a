"""torch.save's zip file: entries stored as they are, all below one folder that holds data.pkl.

The zip's directory is written last, so a file that has one was finished once; its CRC-32s tell a
file rewritten in place from a finished one. A writer may switch checksums off: then all of them
are 0 and the structure is all there is.
"""

from collections.abc import Mapping

import msgspec

from ckptd.errors import InvalidFormat
from ckptd.worker.formats import opcodes, torch_state
from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.dtypes import BITS
from ckptd.worker.formats.source import Source, broken
from ckptd.worker.formats.zip_directory import DEFLATED, Entry
from ckptd.worker.formats.zip_directory import read as read_directory
from ckptd.worker.protocol import Inspected, TensorRecord

_STATE = "data.pkl"
_CODE = "code"  # TorchScript's sources, the only entries that torch compresses


def read(source: Source, ask: Ask) -> Inspected:
    """Check the zip and list its tensors. InvalidFormat when the zip is broken or none of torch's.

    complete is None where checksums were switched off: nothing tells a torn rewrite then.
    """
    entries = read_directory(source)
    top = _top(entries)
    checksums = any(entry.crc for entry in entries) or not any(entry.size_bytes for entry in entries)
    if ask.crc and checksums:
        _check_crcs(source, entries)
    found = Inspected(
        format="torch-zip", complete=True if checksums else None, extra={} if checksums else {"checksums": False}
    )
    state = next(entry for entry in entries if entry.name == f"{top}/{_STATE}")
    return _with_state(source, found, {entry.name: entry for entry in entries}, (top, state), ask)


def _top(entries: list[Entry]) -> str:
    tops = {entry.name.partition("/")[0] for entry in entries}
    top = next(iter(tops), "")
    if len(tops) != 1 or not any(entry.name == f"{top}/{_STATE}" for entry in entries):
        raise broken("invalid_format", f"not torch's: no single folder with {_STATE}")
    for entry in entries:
        if entry.method == DEFLATED and not entry.name.startswith(f"{top}/{_CODE}/"):
            raise broken("invalid_format", f"zip entry {entry.name!r} is compressed")
    return top


def _check_crcs(source: Source, entries: list[Entry]) -> None:
    for entry in entries:
        if entry.method != DEFLATED and source.crc32(entry.start, entry.size_bytes) != entry.crc:
            raise broken("crc", f"entry {entry.name!r} does not match its checksum")


def _with_state(
    source: Source, found: Inspected, entries: Mapping[str, Entry], place: tuple[str, Entry], ask: Ask
) -> Inspected:
    """Add what data.pkl tells. A state that can't be described leaves the zip as whole as it is."""
    top, entry = place
    try:
        if entry.size_bytes > opcodes.BYTES_MAX:
            raise broken("invalid_format", f"{_STATE} of {entry.size_bytes} bytes, {opcodes.BYTES_MAX} at most")
        root = opcodes.describe(source.read(entry.start, entry.size_bytes, _STATE))
    except InvalidFormat as error:
        return _changed(found, extra={**found.extra, "unread": error.message})
    keys, step, epoch = torch_state.top_level(root)
    tensors: list[TensorRecord] = []
    total = 0
    for name, tensor in torch_state.tensors(root) if ask.tensors_max else ():
        total += 1
        record, problem = _record(name, tensor, entries.get(f"{top}/data/{tensor.key}"), source.name)
        if problem:
            return _changed(found, complete=False, problem=problem, tensors=tensors, tensors_total=total)
        if total <= ask.tensors_max:
            tensors.append(record)
    return _changed(
        found, tensors=tensors, tensors_total=total, step=step, epoch=epoch, extra={**found.extra, "keys": keys}
    )


def _record(name: str, tensor: torch_state.Tensor, entry: Entry | None, file: str) -> tuple[TensorRecord, str]:
    """Describe one tensor with its place in the file; the text says what is wrong with it, if anything."""
    plain = TensorRecord(name, tensor.dtype, tensor.shape, file)
    bits = BITS.get(tensor.dtype)
    if not tensor.key or bits is None:
        return plain, ""
    if entry is None:
        return plain, f"invalid_format: tensor {name!r} has no data in the file"
    start = tensor.offset * bits // 8
    end = start + (tensor.extent * bits + 7) // 8
    if end > entry.size_bytes:
        return plain, f"invalid_format: tensor {name!r} needs {end} bytes of its storage, which has {entry.size_bytes}"
    return TensorRecord(name, tensor.dtype, tensor.shape, file, entry.start + start, entry.start + end), ""


def _changed(found: Inspected, **changes: object) -> Inspected:
    return msgspec.structs.replace(found, **changes)
