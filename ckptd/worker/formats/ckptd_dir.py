"""Our own directories: manifest.json is written last and lists every file with size and digest."""

from typing import Any

import msgspec

from ckptd.errors import BadPath
from ckptd.model import is_id
from ckptd.worker import beneath
from ckptd.worker.formats import contents
from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.source import Folder, broken
from ckptd.worker.protocol import FileRecord, Inspected
from ckptd_client import wire

MANIFEST = "manifest.json"
LATE = "late.json"  # what became known after the manifest was written
LATE_BYTES_MAX = 8 << 20
STRIPPED = "stripped.json"  # which files of the manifest were taken out (worker/strip.py)
STRIPPED_BYTES_MAX = 1 << 20
MANIFEST_BYTES_MAX = 32 << 20  # 19 bytes for each MiB of a checkpoint: room for 1.6 TB
_BRACKETS_MAX = 400_000  # lists and objects: two for each file of a checkpoint, and what a config holds
_DEPTH_MAX = 24  # levels: a frame holds a few more around them


class _Manifest(msgspec.Struct):
    """What must be there and of which type; everything else is passed on as it is."""

    v: int
    checkpoint: str
    files: list[FileRecord]


class _Named(msgspec.Struct, frozen=True):
    checkpoint: str


class _Late(msgspec.Struct, omit_defaults=True):
    v: int
    checkpoint: str
    metrics: dict[str, float | str]
    veto: str | None = None


def parse_manifest(raw: bytes) -> dict[str, Any]:
    """Return a manifest as it is. InvalidFormat when it is not one, or too large or deep to be one."""
    if len(raw) > MANIFEST_BYTES_MAX:
        raise broken("invalid_format", f"{MANIFEST} of {len(raw)} bytes, {MANIFEST_BYTES_MAX} at most")
    if raw.count(b"[") + raw.count(b"{") > _BRACKETS_MAX:
        raise broken("invalid_format", f"{MANIFEST} nests more than {_BRACKETS_MAX} lists and objects")
    try:
        known = msgspec.json.decode(raw, type=_Manifest)
        whole = msgspec.json.decode(raw)
        wire.check_keys(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise broken("invalid_format", f"{MANIFEST} is none: {error}") from error
    if known.v != 1 or not is_id(known.checkpoint) or not isinstance(whole, dict):
        raise broken("invalid_format", f"{MANIFEST} of an unknown version, or without an id")
    if not _shallow(whole, _DEPTH_MAX):
        raise broken("invalid_format", f"{MANIFEST} nests deeper than {_DEPTH_MAX}")
    return whole


def named_in(directory_fd: int) -> str | None:
    """Return the id in a directory's manifest; None when there is no manifest, or none that can be read."""
    try:
        with open(beneath.open_file(directory_fd, MANIFEST), "rb") as file:
            return msgspec.json.decode(file.read(MANIFEST_BYTES_MAX), type=_Named).checkpoint
    except (BadPath, FileNotFoundError, msgspec.DecodeError):
        return None


def parse_late(raw: bytes) -> dict[str, Any] | None:
    """Return what late.json says; None when it is none of ours: the manifest stands without it."""
    try:
        found = msgspec.json.decode(raw, type=_Late)
        wire.check_keys(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return msgspec.to_builtins(found) if found.v == 1 else None


class _Stripped(msgspec.Struct):
    v: int
    checkpoint: str
    files: list[str]


def parse_stripped(raw: bytes, checkpoint: str) -> list[str]:
    """Return the files that stripped.json names; none when it is none of ours, or another checkpoint's."""
    try:
        found = msgspec.json.decode(raw, type=_Stripped)
        wire.check_keys(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return []
    return found.files if found.v == 1 and found.checkpoint == checkpoint else []


def _shallow(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(_shallow(item, depth - 1) for item in value.values())
    if isinstance(value, list):
        return depth > 0 and all(_shallow(item, depth - 1) for item in value if isinstance(item, dict | list))
    return True


def read(folder: Folder, ask: Ask) -> Inspected:
    """Check that every file of the manifest is there in its size. Digests are the business of verify."""
    if MANIFEST not in folder.sizes:
        raise broken("missing", f"{MANIFEST} is not there")
    manifest = parse_manifest(folder.read_whole(MANIFEST, MANIFEST_BYTES_MAX))
    away = folder.read_whole(STRIPPED, STRIPPED_BYTES_MAX) if STRIPPED in folder.sizes else b""
    stripped = parse_stripped(away, manifest["checkpoint"])
    for record in manifest["files"]:
        size_bytes = folder.sizes.get(record["path"])
        if size_bytes is None and record["path"] in stripped:
            continue
        if size_bytes is None:
            raise broken("missing", f"{record['path']!r}, which {MANIFEST} names")
        if size_bytes != record["size_bytes"]:
            raise broken("truncated", f"{record['path']!r} has {size_bytes} bytes, not {record['size_bytes']}")
    found = contents.check(folder, ask)
    step, epoch = manifest.get("step"), manifest.get("epoch")
    metrics = manifest.get("metrics")
    return Inspected(
        format="ckptd",
        complete=not found.problem,
        problem=found.problem,
        tensors=found.tensors,
        tensors_total=found.tensors_total,
        step=step if type(step) is int else None,
        epoch=float(epoch) if isinstance(epoch, int | float) else None,
        metrics={
            name: float(value)
            for name, value in (metrics.items() if isinstance(metrics, dict) else ())
            if isinstance(value, int | float)
        },
        extra={key: manifest[key] for key in ("checkpoint", "project", "experiment", "note") if key in manifest},
    )
