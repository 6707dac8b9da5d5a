"""Arena to final name: whole or absent, durable, and one publish however often it is asked for."""

import hashlib
import os
from dataclasses import dataclass

import msgspec

from ckptd import failpoint
from ckptd.errors import BadPath, BadRequest, Corrupt, Exists, NoSpace, SourceChanged
from ckptd.model import is_id
from ckptd.worker import beneath, durable, rootmark
from ckptd.worker.context import Context
from ckptd.worker.durable import MANIFEST, TemporaryDirectory
from ckptd.worker.fsync import FsyncFailed, fsync_directory, fsync_file
from ckptd.worker.image import Image
from ckptd.worker.imagewriter import ImageWriter, Written
from ckptd.worker.members import identity, members
from ckptd.worker.owner import acting_as
from ckptd.worker.protocol import FileRecord, Publish, Published
from ckptd_client.wire import FrameError, check_keys

MANIFEST_BYTES_MAX = 64 << 20
_SPARE = 1.02  # free space asked for, to the size: metadata, the manifest, and what others write meanwhile
_TRIES = 2  # a failed fsync is answered once by another inode; a second failure is the disk's


class _Manifest(msgspec.Struct, frozen=True):
    checkpoint: str
    files: list[FileRecord]


@dataclass(slots=True)
class _Place:
    """Where the checkpoint goes: the open parent directory, whose own name is durable."""

    parent_fd: int
    name: str
    checkpoint: str


def run(request: Publish, context: Context) -> Published:
    """Publish an arena. Blocks until it is durable; beats and can be cancelled at every chunk.

    Exists      the target is another checkpoint
    Corrupt     the target is this checkpoint, but its files are not as its manifest says
    NoSpace     before anything was written, or with nothing left behind
    FsyncFailed the disk lost bytes twice
    SourceChanged  the arena holds other bytes than those asked for; nothing is left behind
    Denied      its owner may not write there
    """
    if context.fd is None:
        raise BadRequest("a publish needs an arena")
    checkpoint = str(request.manifest.get("checkpoint", ""))
    if not is_id(checkpoint):
        raise BadRequest("the manifest names no checkpoint")
    parts = beneath.parts_below(request.root, request.target)
    if not parts:
        raise BadPath("the target is the root itself")
    root_fd = rootmark.make_root(request, context)
    with acting_as(request.owner, request.target):
        try:
            parent_fd = durable.make_dir_chain(root_fd, parts[:-1])
        finally:
            os.close(root_fd)
        try:
            place = _Place(parent_fd, parts[-1], checkpoint)
            if found := _adopted(request, place):
                return found
            image = Image(context.fd, request.files)
            context.after(image.close)
            return _publish(request, context, place, image)
        finally:
            os.close(parent_fd)


def _publish(request: Publish, context: Context, place: _Place, image: Image) -> Published:
    _admit(request, place)
    tries = 1
    while True:
        try:
            return _attempt(request, context, place, image)
        except FsyncFailed:
            if tries == _TRIES:
                raise
            tries += 1
        except Exists:
            # Somebody published meanwhile: if it was this checkpoint, that publish is ours too.
            if found := _adopted(request, place):
                return found
            raise


def _admit(request: Publish, place: _Place) -> None:
    """Refuse what can't fit before a byte is written."""
    facts = os.fstatvfs(place.parent_fd)
    need = int(sum(file.size_bytes for file in request.files) * _SPARE)
    free = facts.f_bavail * facts.f_frsize
    if need > free:
        raise NoSpace(f"{need} bytes needed, {free} free", need_bytes=need, free_bytes=free, path=request.target)


def _attempt(request: Publish, context: Context, place: _Place, image: Image) -> Published:
    """Write everything under a temporary name, then publish that name.

    The order is the promise: each file is fsynced before the manifest is written, the manifest
    before the directory is fsynced, the directory before the rename, the rename before we answer.
    So a manifest tells of durable files only, and a final name of a durable manifest.
    """
    temporary = TemporaryDirectory.create(place.parent_fd, place.name, place.checkpoint)
    try:
        failpoint.hit("copy.tmp_created")
        written = ImageWriter(image, request.files, temporary.fd, context).run()
        _check_digests(request, written.records)
        text = manifest_text(request.manifest, written.records)
        _write_manifest(temporary.fd, text)
        temporary.publish(place.name)
    except BaseException:
        temporary.discard()
        temporary.close()
        raise
    try:
        return _reply(request, temporary.fd, (text, written))
    finally:
        temporary.close()


def manifest_text(manifest: dict[str, object], records: list[FileRecord]) -> bytes:
    """Write manifest.json: indented for people, but one line for each file whatever its damage map holds.

    >>> print(manifest_text({"v": 1}, [FileRecord("a", 0, "e3")]).decode(), end="")
    {
      "v": 1,
      "files": [
        {"path":"a","size_bytes":0,"sha256":"e3","xxh3":[]}
      ]
    }
    """
    plain = {key: value for key, value in manifest.items() if key != "files"}
    head = msgspec.json.format(msgspec.json.encode(plain), indent=2).rstrip().removesuffix(b"}").rstrip()
    files = b",\n    ".join(msgspec.json.encode(record) for record in records)
    comma = b"," if plain else b""
    return head + comma + b'\n  "files": [\n    ' + files + b"\n  ]\n}\n"


def _write_manifest(directory_fd: int, text: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    fd = beneath.open_beneath(directory_fd, (MANIFEST,), flags, mode=0o666)
    try:
        rest = memoryview(text)
        while rest:
            rest = rest[os.write(fd, rest) :]
        failpoint.hit("manifest.written")
        fsync_file(fd, "manifest.fsynced")
    finally:
        os.close(fd)


def _reply(request: Publish, directory_fd: int, made: tuple[bytes, Written | None]) -> Published:
    text, written = made
    records = msgspec.json.decode(text, type=_Manifest).files if written is None else written.records
    took = written or Written(direct=False)
    return Published(
        path=request.target,
        files=records,
        manifest_sha256=hashlib.sha256(text).hexdigest(),
        identity=identity(os.fstat(directory_fd), members(directory_fd)),
        size_bytes=sum(record.size_bytes for record in records),
        adopted=written is None,
        write_ms=took.write_s * 1e3,
        hash_ms=took.hash_s * 1e3,
        cpu_ms=took.cpu_s * 1e3,
        direct=took.direct,
    )


def _adopted(request: Publish, place: _Place) -> Published | None:
    """Answer for a target that is there already; None when it is not.

    A final name is given only after everything below it was fsynced, so of an earlier publish that
    was cut off only the name itself may not be durable yet: that is fsynced now.
    """
    try:
        fd = beneath.open_directory(place.parent_fd, (place.name,))
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise Exists(f"{request.target!r} is a file") from error
    try:
        text = _read_manifest(fd, request.target)
        try:
            found = msgspec.json.decode(text, type=_Manifest)
            check_keys(text)
        except (msgspec.DecodeError, FrameError) as error:
            raise Exists(f"{request.target!r} holds another manifest") from error
        if found.checkpoint != place.checkpoint:
            raise Exists(f"{request.target!r} is checkpoint {found.checkpoint!r}", checkpoint=found.checkpoint)
        _check_sizes(request, fd, found)
        _check_digests(request, found.files)
        fsync_directory(place.parent_fd)
        return _reply(request, fd, (text, None))
    finally:
        os.close(fd)


def _check_digests(request: Publish, records: list[FileRecord]) -> None:
    """Refuse to name bytes that are not those asked for: their own manifest would vouch for them ever after."""
    written = {record.path: record.sha256 for record in records}
    if any(written.get(path) != sha256 for path, sha256 in request.sha256.items()):
        raise SourceChanged(f"the memory no longer holds the bytes of {request.target!r}", path=request.target)


def _read_manifest(directory_fd: int, target: str) -> bytes:
    try:
        fd = beneath.open_file(directory_fd, MANIFEST)
    except (FileNotFoundError, BadPath) as error:
        raise Exists(f"{target!r} exists and is not a checkpoint of ckptd") from error
    with open(fd, "rb") as file:
        text = file.read(MANIFEST_BYTES_MAX + 1)
    if len(text) > MANIFEST_BYTES_MAX:
        raise Exists(f"the manifest of {target!r} is over {MANIFEST_BYTES_MAX} bytes")
    return text


def _check_sizes(request: Publish, directory_fd: int, found: _Manifest) -> None:
    on_disk = {member.path: member.size_bytes for member in members(directory_fd)}
    recorded = {record.path: record.size_bytes for record in found.files}
    wanted = {file.path: file.size_bytes for file in request.files}
    if recorded != wanted:
        raise Corrupt(f"the manifest of {request.target!r} lists other files than its arena", path=request.target)
    wrong = sorted(path for path, size_bytes in wanted.items() if on_disk.get(path) != size_bytes)
    if wrong:
        raise Corrupt(f"{wrong[0]!r} in {request.target!r} is not as long as it was written", path=request.target)
