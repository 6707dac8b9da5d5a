"""Finding a checkpoint with no daemon to ask: by the manifests that lie under an experiment's directory.

What is on the disk may be anything; whatever is not a whole manifest beside whole files is passed over.
"""

import json
import os
import stat
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Union

from ckptd_client.errors import NotFound, Refused, Unavailable
from ckptd_client.readback import Order, is_intact
from ckptd_client.wire import unique

MANIFEST = "manifest.json"
STRIPPED = "stripped.json"  # beside a manifest: which of its files were taken out since
STRIPPED_BYTES_MAX = 1 << 20
LATE = "late.json"  # beside a manifest: what was said after it was written
LATE_BYTES_MAX = 8 << 20
MANIFEST_BYTES_MAX = 256 << 20  # a damage map takes 20 bytes for each MiB of files
ENTRIES_MAX = 100_000  # directory entries that one search looks at
DEPTH_MAX = 3  # directory templates may put checkpoints some levels down
ID_CHARS_MIN = 6
INTACT_TRIES_MAX = 3  # checkpoints that are read back to find an intact one


class Found(NamedTuple):
    """One checkpoint on the disk, as its manifest tells. `veto`: which hook keeps it from being the latest, and why."""

    path: str
    step: int
    checkpoint: str
    files: List[Dict[str, Any]]
    manifest: Dict[str, Any]
    veto: str = ""


def find_checkpoint(experiment_dir: str, selector: Union[str, int] = "latest") -> Found:
    """Find "latest" (highest step, newest revision), "step:N" or N, an id or a unique prefix of one.

    Files must be there in their full size; whether their bytes are right shows when they are read.
    NotFound when nothing answers. Refused with the code "vetoed" when a hook vetoed all that "latest" could be: the run
    must not begin anew over them. Unavailable for "best": only the daemon knows directions of metrics.
    """
    wanted = str(selector)
    if wanted == "best" or wanted.startswith(("best:", "best_")):
        raise Unavailable(f"{wanted!r} needs the daemon: it knows in which direction a metric is better")
    found = [each for each in list_checkpoints(experiment_dir) if _answers(each, wanted)]
    if not found:
        raise NotFound(f"no whole checkpoint under {experiment_dir} answers to {wanted!r}")
    if wanted == "latest":
        vetoed, found = found[0], [each for each in found if not each.veto]
        if not found:
            hint = "name one by its step or id, or let it count: `ckpt unveto`"
            raise Refused(
                "vetoed", f"every checkpoint under {experiment_dir} is vetoed, the newest by {vetoed.veto}", hint
            )
    if len({each.checkpoint for each in found}) > 1 and wanted != "latest" and _step(wanted) is None:
        raise NotFound(f"{wanted!r} is the beginning of several ids under {experiment_dir}")
    return found[0]


def list_checkpoints(experiment_dir: str, depth: int = DEPTH_MAX) -> List[Found]:
    """Return every whole checkpoint up to `depth` levels under a directory, the newest step and revision first."""
    found = [each for path in _manifests(experiment_dir, depth) for each in [read_manifest(path)] if each is not None]
    found = [each for each in found if _has_files(each)]
    return sorted(found, key=_order, reverse=True)


def newest_intact(experiment_dir: str, besides: str) -> Optional[str]:
    """Return the path of the newest checkpoint but `besides` that reads back as it was written.

    Reads and digests up to INTACT_TRIES_MAX checkpoints: for use when a load has failed.
    """
    bad = os.path.realpath(besides)
    others = [each for each in list_checkpoints(experiment_dir, 1) if os.path.realpath(each.path) != bad]
    others = [each for each in others if not each.veto]
    for each in others[:INTACT_TRIES_MAX]:
        if is_intact(Order(each.path, each.files)):
            return each.path
    return None


def read_manifest(path: str) -> Optional[Found]:
    """Read the manifest of the checkpoint at `path`; None when there is none that makes sense."""
    try:
        with open(os.path.join(path, MANIFEST), "rb") as file:
            raw = file.read(MANIFEST_BYTES_MAX + 1)
        if len(raw) > MANIFEST_BYTES_MAX:
            return None
        manifest = json.loads(raw, object_pairs_hook=unique)
        files = [file for file in manifest["files"] if isinstance(file["path"], str) and file["size_bytes"] >= 0]
        if len(files) != len(manifest["files"]):
            return None
        checkpoint = str(manifest["checkpoint"])
        gone = set(stripped_files(path, checkpoint))
        files = [file for file in files if file["path"] not in gone]
        return Found(path, int(manifest["step"] or 0), checkpoint, files, manifest, _veto(path, checkpoint))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _veto(path: str, checkpoint: str) -> str:
    """Say which hook vetoed the save, and why; "" when none did, or its late.json is another's or makes no sense."""
    try:
        with open(os.path.join(path, LATE), "rb") as file:
            said = json.loads(file.read(LATE_BYTES_MAX), object_pairs_hook=unique)
        return str(said.get("veto") or "") if said["checkpoint"] == checkpoint else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""


def stripped_files(path: str, checkpoint: str = "") -> List[str]:
    """Name the files that were taken out of the checkpoint at `path` and are not there: optimizer states of an old one.

    Empty when its stripped.json is another checkpoint's, or makes no sense.
    """
    try:
        with open(os.path.join(path, STRIPPED), "rb") as file:
            said = json.loads(file.read(STRIPPED_BYTES_MAX), object_pairs_hook=unique)
        if checkpoint and said["checkpoint"] != checkpoint:
            return []
        return [name for name in said["files"] if not os.path.lexists(os.path.join(path, name))]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _manifests(experiment_dir: str, depth: int) -> Iterator[str]:
    """Give every directory under an experiment that has a manifest; no symlink and no hidden name is followed."""
    left = ENTRIES_MAX
    level = [experiment_dir]
    for _ in range(depth + 1):
        below: List[str] = []
        for directory in level:
            try:
                entries = list(os.scandir(directory))
            except OSError:
                continue  # gone meanwhile, or not ours to read
            left -= len(entries)
            if left < 0:
                return
            if any(entry.name == MANIFEST for entry in entries):
                yield directory
                continue
            below += [
                entry.path
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
            ]
        level = below


def _has_files(found: Found) -> bool:
    for file in found.files:
        try:
            status = os.stat(os.path.join(found.path, file["path"]))
        except (OSError, ValueError):
            return False
        if not stat.S_ISREG(status.st_mode) or status.st_size != file["size_bytes"]:
            return False
    return True


def _order(found: Found) -> Any:
    revision = found.manifest.get("revision")
    created = found.manifest.get("created_at")
    return (
        found.step,
        revision if isinstance(revision, int) else 0,
        created if isinstance(created, str) else "",
        found.checkpoint,
    )


def _step(selector: str) -> Optional[int]:
    _, _, text = selector.rpartition("step:")
    return int(text) if text.isdecimal() and text.isascii() else None


def _answers(found: Found, selector: str) -> bool:
    if selector == "latest":
        return True
    step = _step(selector)
    if step is not None:
        return found.step == step
    return len(selector) >= ID_CHARS_MIN and found.checkpoint.startswith(selector)
