"""Every verb of an I/O worker, and what it answers; protocol.py, fetching.py and trashlist.py say what they mean."""

import msgspec

from ckptd.worker.fetching import FetchBegin, FetchDrop, FetchedList, Fetching, FetchKeep, Kept
from ckptd.worker.protocol import (
    Amend,
    Candidates,
    Digest,
    Digested,
    Done,
    Hints,
    Inspect,
    Inspected,
    Link,
    Publish,
    Published,
    Purge,
    Request,
    Restore,
    Scan,
    Scanned,
    Settle,
    Settlement,
    Strip,
    Stripped,
    Sweep,
    Trash,
    Unstrip,
    Usage,
    Used,
    Verified,
    Verify,
    Watch,
)
from ckptd.worker.trashlist import TrashList, TrashListed

AnyRequest = (
    Publish
    | Digest
    | Verify
    | Inspect
    | Settle
    | Scan
    | Watch
    | Link
    | Trash
    | Restore
    | Purge
    | Strip
    | Unstrip
    | Sweep
    | Usage
    | Amend
    | FetchBegin
    | FetchKeep
    | FetchDrop
    | FetchedList
    | TrashList
)

REPLY_OF: dict[type[Request], type[msgspec.Struct]] = {
    Publish: Published,
    FetchBegin: Fetching,
    FetchKeep: Done,
    FetchDrop: Done,
    FetchedList: Kept,
    Digest: Digested,
    Verify: Verified,
    Inspect: Inspected,
    Settle: Settlement,
    Scan: Scanned,
    Watch: Done,
    Link: Done,
    Trash: Done,
    Restore: Done,
    Purge: Done,
    Strip: Stripped,
    Unstrip: Stripped,
    Sweep: Done,
    Usage: Used,
    Amend: Done,
    TrashList: TrashListed,
}

PART_OF: dict[type[Request], type[msgspec.Struct]] = {Scan: Candidates, Watch: Hints}
