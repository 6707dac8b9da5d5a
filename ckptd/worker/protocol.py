"""What the daemon asks of an I/O worker, and what it gets back.

Frames are those of ckptd_client.wire, over a socket pair: {"id": 3, "verb": "publish", ...}.
Replies are {"id": 3, "ok": true, "result": {...}}, {"id": 3, "ok": false, "error": {...}} or, for
verbs that answer in parts (scan, watch), any number of {"id": 3, "part": {...}} before the reply.
{"id": 3, "verb": "cancel"} ends request 3 and has no reply of its own: the request it ends answers
(a watch with Done, all others with the error "timeout"). "fds": 1 in a request: one arena rides along.
{"id": 3, "alive": true} comes at least every 5 s while a request makes progress, or waits behind one
that does; a request that hangs in the kernel falls silent. A worker exits at the end of its socket.
"root": {...} beside a result or an error is what the root is known by from now on (RootMark).

Frames of this socket pair may have FRAME_BYTES_MAX of this file, not that of clients: a damage map
takes 19 bytes a MiB, so a checkpoint of 1 TB needs 19 MB. Both ends encode with msgspec.

Every path is absolute text; the worker resolves it without following symlinks below `root`. Structs only, for both sides.
"""

from typing import Any

import msgspec

FRAME_BYTES_MAX = 64 << 20


class RootMark(msgspec.Struct, frozen=True):
    """What a managed root is known by: its mark's id, and the device where that was seen. id "": by nothing yet."""

    id: str = ""
    device: int = 0


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", forbid_unknown_fields=True):
    """Base of all verbs. `root` is the storage root that the worker must not leave.

    mark   what the root must be (worker/rootmark.py), or the error is "root_degraded"; None: nobody asks
    owner  what is made under the root is made as this user (worker/owner.py); None: as the worker itself
    """

    root: str
    mark: RootMark | None = None
    owner: int | None = None


class FileImage(msgspec.Struct, frozen=True):
    """One file as it lies in an arena: `size_bytes` from `offset` (a multiple of 4096)."""

    path: str
    offset: int
    size_bytes: int


class FileRecord(msgspec.Struct, frozen=True):
    """One file with its digests (model.FileEntry on the wire)."""

    path: str
    size_bytes: int
    sha256: str
    xxh3: list[str] = []


class IdentityRecord(msgspec.Struct, frozen=True):
    """model.Identity on the wire."""

    dev: int
    ino: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


class DamageRecord(msgspec.Struct, frozen=True):
    """model.Damage on the wire."""

    file: str
    kind: str
    detail: str = ""
    mib: list[int] = []
    tensors: list[str] = []


class Publish(Request, frozen=True, tag="publish"):
    """Write an arena's files under a final name: whole or absent.

    target    absolute directory that must not exist yet (parents are made, 0755 & ~umask)
    manifest  everything manifest.json says except "files"; holds "checkpoint": the id
    sha256    what each file must have, by path, where that is known already (a repair); {}: it is not
    A target that exists with the same checkpoint id is adopted (a repeated publish is one publish); with another id
    the error is "exists". "source_changed": the arena holds other bytes than `sha256` says; nothing has the final name.
    """

    target: str
    files: list[FileImage]
    manifest: dict[str, Any]
    sha256: dict[str, str] = {}


class Published(msgspec.Struct, frozen=True):
    """The final name holds every byte, fsynced, and so do its parents."""

    path: str
    files: list[FileRecord]  # manifest.json excluded
    manifest_sha256: str
    identity: IdentityRecord
    size_bytes: int
    adopted: bool
    write_ms: float
    hash_ms: float
    cpu_ms: float
    direct: bool  # O_DIRECT was used


class Digest(Request, frozen=True, tag="digest"):
    """Make existing files durable (fsync them and their directory) and record their digests.

    Error "source_changed" when anything changed while it was read.
    """

    path: str


class Digested(msgspec.Struct, frozen=True):
    """What `path` holds. A single file has one record whose path is ""."""

    files: list[FileRecord]
    identity: IdentityRecord
    size_bytes: int


class Verify(Request, frozen=True, tag="verify"):
    """Read `path` back past the page cache and compare with the records.

    manifest_sha256  of manifest.json, which no record names; "": there is none of ours
    """

    path: str
    files: list[FileRecord]
    manifest_sha256: str = ""


class Verified(msgspec.Struct, frozen=True):
    """`damage` is empty when every digest is equal."""

    damage: list[DamageRecord]
    read_bytes: int
    ms: float


class TensorRecord(msgspec.Struct, frozen=True):
    """One tensor's description; `file` and byte range where the format tells them."""

    name: str
    dtype: str
    shape: list[int]
    file: str = ""
    start: int | None = None
    end: int | None = None


class Inspect(Request, frozen=True, tag="inspect"):
    """Read headers only, in a child with memory and CPU limits; nothing is executed."""

    path: str
    tensors_max: int = 10_000


class Inspected(msgspec.Struct, frozen=True):
    """What a checkpoint looks like from outside.

    format    "safetensors", "safetensors-sharded", "torch-zip", "torch-legacy", "hf-trainer",
              "dcp", "ckptd", "opaque"
    complete  the structure is whole; None when the format can't tell
    problem   why it is not, with a stable code in front ("truncated: ...")
    """

    format: str
    complete: bool | None
    problem: str = ""
    tensors: list[TensorRecord] = []
    tensors_total: int = 0
    step: int | None = None
    epoch: float | None = None
    metrics: dict[str, float] = {}
    extra: dict[str, Any] = {}


class Settle(Request, frozen=True, tag="settle"):
    """Is the writer of `path` done? Never waits: says when to ask again.

    last    identity seen by the question before, if any
    still_s seconds for which that identity had not changed, by the asker's monotonic clock
    told    the writer itself said so (file hand-off): structure and open writers are still checked
    owner_uid  whoever handed it over may name only what is this user's; None: no such question
    """

    path: str
    quiet_s: float
    last: IdentityRecord | None = None
    still_s: float = 0.0
    told: bool = False
    owner_uid: int | None = None


class Settlement(msgspec.Struct, frozen=True):
    """reason: "told", "marker", "structure", "lease", "quiet" when settled; "writer", "changing",
    "incomplete: ...", "young" when not; "gone" when nothing is there; "refused: ..." when it will never be a checkpoint.
    """

    settled: bool
    reason: str
    retry_after_s: float
    identity: IdentityRecord | None
    format: str = "opaque"
    step: int | None = None
    epoch: float | None = None
    metrics: dict[str, float] = {}


class Scan(Request, frozen=True, tag="scan"):
    """List everything under `root` that is or may become a checkpoint, in parts of Candidates.

    managed  the root's layout is ours: manifests are read, nothing else is a checkpoint
    under    scan only this sub-directory ("" for all)
    known    marks (worker/mark.py) of what is not to be told again, MARK_BYTES each, one after the other
    adopt    the root is not asked for its mark: which one it has, or none, is told with the reply
    """

    managed: bool
    under: str = ""
    entries_max: int = 2_000_000
    known: bytes = b""
    adopt: bool = False


class Candidate(msgspec.Struct, frozen=True):
    """One file or directory that a reader would load. `manifest`, `late` and `stripped` only in managed roots."""

    path: str
    kind: str  # "file" or "directory"
    format: str  # by name and neighbours only; settle() looks inside
    identity: IdentityRecord
    step: int | None = None
    manifest: dict[str, Any] | None = None
    late: dict[str, Any] | None = None
    stripped: list[str] = []


class Candidates(msgspec.Struct, frozen=True):
    """One part of a scan's answer."""

    found: list[Candidate]


class Scanned(msgspec.Struct, frozen=True):
    """The scan's end. `complete` is false when a limit cut it short (`problem` says which).

    device  number of the file system that the root is on now; 0 when a worker does not say
    same    how many of the request's marks were met: told by this number alone
    unmet   positions of the others among the request's marks, ascending
    """

    seen: int
    complete: bool
    problem: str = ""
    skipped: dict[str, int] = {}
    device: int = 0
    same: int = 0
    unmet: list[int] = []


class Watch(Request, frozen=True, tag="watch"):
    """Say when something may have changed under `root`, in parts of Hints, until cancelled."""

    debounce_ms: int = 200


class Hints(msgspec.Struct, frozen=True):
    """Directories to rescan; `lost` when events may have been dropped: rescan everything.

    problem  why not all events are to be had here, as of now ("" when they are)
    blind    and it is this machine's doing: a limit or a failure, not a root that comes and goes
    """

    directories: list[str]
    lost: bool = False
    problem: str = ""
    blind: bool = False


class Link(Request, frozen=True, tag="link"):
    """Replace the symlink `name` (absolute) atomically by one that points to `target` (relative
    text). target "" removes the link. Refused when `name` exists and is no symlink.
    """

    name: str
    target: str


class Trash(Request, frozen=True, tag="trash"):
    """Move `path` into <root>/.ckptd-trash/<trash> by rename; refused unless it is still `identity`.

    checkpoint  the id that a manifest must name, where the device number is another than recorded
    named       it must have a manifest that names `checkpoint`, whatever else is as recorded
    """

    path: str
    identity: IdentityRecord
    trash: str
    checkpoint: str = ""
    named: bool = False


class Restore(Request, frozen=True, tag="restore"):
    """Move <root>/.ckptd-trash/<trash> back to `path`, which must not exist.

    identity, checkpoint  what was retired, as for Trash: what lies at `path` while the trash holds nothing counts
                          as restored only when it is that
    """

    path: str
    identity: IdentityRecord
    trash: str
    checkpoint: str = ""


class Amend(Request, frozen=True, tag="amend"):
    """Make late.json in the directory `path` say this of `checkpoint`: all its metrics, numbers as on the wire, and
    the veto of its save, if no person has lifted it.
    """

    path: str
    checkpoint: str
    metrics: dict[str, float | str]
    veto: str | None = None


class Strip(Request, frozen=True, tag="strip"):
    """Move `files` (name -> bytes) of the directory `path` into <root>/.ckptd-trash/<trash>/, named by stripped.json.

    at  when that was meant, for stripped.json: the same words for the same intent
    """

    path: str
    checkpoint: str
    files: dict[str, int]
    trash: str
    at: str


class Unstrip(Request, frozen=True, tag="unstrip"):
    """Move them back, and forget that they were away."""

    path: str
    checkpoint: str
    files: dict[str, int]
    trash: str


class Stripped(msgspec.Struct, frozen=True):
    """The checkpoint's directory as it is now."""

    identity: IdentityRecord


class Purge(Request, frozen=True, tag="purge"):
    """Unlink <root>/.ckptd-trash/<trash> for good; already gone is fine."""

    trash: str


class Sweep(Request, frozen=True, tag="sweep"):
    """Remove our own temporary directories under `root` older than `older_s`, except `keep` ids."""

    older_s: float
    keep: list[str] = []


class Usage(Request, frozen=True, tag="usage"):
    """How full is the file system under `root`?"""


class Used(msgspec.Struct, frozen=True):
    """statvfs in bytes; `filesystem` is the type's name, `direct_io` and `leases` what it can do.

    unwritable  why nothing can be made under the root, "" when it can
    """

    total_bytes: int
    free_bytes: int
    filesystem: str
    direct_io: bool
    leases: bool
    unwritable: str = ""


class Done(msgspec.Struct, frozen=True):
    """Nothing more to say. `count` where the verb counts."""

    count: int = 0
