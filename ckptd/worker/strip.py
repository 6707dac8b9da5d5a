"""Take files out of a checkpoint that stays, into the trash, and put them back: `stripped.json` beside its manifest.

The manifest is written once and never touched again; it goes on naming every file that was saved. What
was taken out is named by stripped.json, and the two together are true at every instant:

    a file of the manifest is whole under its name, or stripped.json names it and the trash holds it whole

1. stripped.json names the files, durably (replace_file: its bytes, then its name, then the directory).
   Each still stands under its name, which is allowed: to be named is no promise to be gone.
2. Each file is renamed into the trash, durably (move: the new name's directory is fsynced before the
   old one's). A power cut leaves it under one of the two names, or both; step 1 covers it either way. Who
   comes after a crash fsyncs the trash before anything that could make the old name's end durable.

Back again the other way round: first the renames, durably, and then stripped.json goes. At every instant
in between the files that are still away are named. Each step can be repeated from wherever it stopped.
"""

import os
import stat
from collections.abc import Mapping
from contextlib import suppress

import msgspec

from ckptd import failpoint
from ckptd.errors import BadPath, Missing, SourceChanged
from ckptd.worker import beneath, durable
from ckptd.worker.context import Context
from ckptd.worker.formats.ckptd_dir import STRIPPED, STRIPPED_BYTES_MAX, named_in
from ckptd.worker.fsync import fsync_directory
from ckptd.worker.members import identity, members
from ckptd.worker.protocol import Strip, Stripped, Unstrip
from ckptd.worker.trash import TRASH

_COMPARED_BYTES = 4 << 20


def strip(request: Strip, context: Context) -> Stripped:
    """Move `files` into the trash, durably; safe to repeat.

    Missing        the checkpoint, or one of the files, is neither here nor in the trash
    SourceChanged  it is another checkpoint, or a file has another length than recorded: nothing of it is moved
    """
    root_fd = beneath.open_root(request.root)
    try:
        here_fd = _checkpoint(root_fd, request)
        try:
            _check(here_fd, request.files)
            bin_fd = _bin(root_fd, request.trash)
            try:
                _note(here_fd, bin_fd, request)
                failpoint.hit("strip.noted")
                for name in sorted(request.files):
                    context.alive()
                    _move((here_fd, name), (bin_fd, name))
                    failpoint.hit("strip.file_moved")
            finally:
                os.close(bin_fd)
            return Stripped(identity(os.fstat(here_fd), members(here_fd)))
        finally:
            os.close(here_fd)
    finally:
        os.close(root_fd)


def unstrip(request: Unstrip, context: Context) -> Stripped:
    """Move them back, durably; safe to repeat. Exists: a name is taken by something else, and stays so."""
    root_fd = beneath.open_root(request.root)
    try:
        here_fd = _checkpoint(root_fd, request)
        try:
            bin_fd = _bin(root_fd, request.trash)
            try:
                # Whoever began this may have died before its fsyncs: the new names first, here as everywhere.
                fsync_directory(here_fd)
                fsync_directory(bin_fd)
                for name in sorted(request.files):
                    context.alive()
                    _move((bin_fd, name), (here_fd, name))
                    failpoint.hit("strip.file_moved")
            finally:
                os.close(bin_fd)
            if _facts(here_fd, STRIPPED) is not None:
                durable.remove_tree(here_fd, STRIPPED)
            _drop_bin(root_fd, request.trash)
            return Stripped(identity(os.fstat(here_fd), members(here_fd)))
        finally:
            os.close(here_fd)
    finally:
        os.close(root_fd)


def _checkpoint(root_fd: int, request: Strip | Unstrip) -> int:
    try:
        fd = beneath.open_directory(root_fd, beneath.parts_below(request.root, request.path), one_mount=True)
    except FileNotFoundError as error:
        raise Missing(f"{request.path!r} is not there", path=request.path) from error
    if named_in(fd) != request.checkpoint:
        os.close(fd)
        raise SourceChanged(f"{request.path!r} does not say that it is checkpoint {request.checkpoint}")
    return fd


def _check(here_fd: int, files: Mapping[str, int]) -> None:
    for name, size_bytes in files.items():
        if len(beneath.parts_of(name)) != 1 or name in {durable.MANIFEST, STRIPPED}:
            raise BadPath(f"{name!r} is no file that can be taken out")
        facts = _facts(here_fd, name)
        if facts is not None and (not stat.S_ISREG(facts.st_mode) or facts.st_size != size_bytes):
            raise SourceChanged(f"{name!r} is not as it was recorded: verify the checkpoint first")


def _note(here_fd: int, bin_fd: int, request: Strip) -> None:
    said = {"v": 1, "checkpoint": request.checkpoint, "files": sorted(request.files), "at": request.at}
    text = msgspec.json.encode(said) + b"\n"
    try:
        with open(beneath.open_file(here_fd, STRIPPED), "rb") as file:
            is_said = file.read(STRIPPED_BYTES_MAX) == text
    except FileNotFoundError:
        is_said = False
    if is_said:
        # Its name may be from a process that died before its fsync, or after its renames: then the fsync of
        # this directory makes the old names go, and the new ones must be durable before.
        fsync_directory(bin_fd)
        fsync_directory(here_fd)
    else:
        durable.replace_file(here_fd, STRIPPED, text)


def _bin(root_fd: int, trash: str) -> int:
    if len(beneath.parts_of(trash)) != 1:
        raise BadPath(f"{trash!r} is not a plain name")
    return durable.make_dir_chain(root_fd, (TRASH, trash))


def _drop_bin(root_fd: int, trash: str) -> None:
    """Remove the empty place in the trash; a purge would as well, and one that is left does no harm."""
    fd = beneath.open_directory(root_fd, (TRASH,))
    try:
        with suppress(OSError):
            os.rmdir(trash, dir_fd=fd)
    finally:
        os.close(fd)


def _move(old: tuple[int, str], new: tuple[int, str]) -> None:
    facts, there = _facts(*old), _facts(*new)
    if facts is not None and (there is None or not _are_one(old, new)):
        durable.move(old, new, (facts.st_dev, facts.st_ino))
        return
    if there is None:
        raise Missing(f"{old[1]!r} is neither in its checkpoint nor in the trash", path=old[1])
    if facts is not None:  # the power failed between the two halves of a rename
        durable.remove_tree(*old)


def _are_one(old: tuple[int, str], new: tuple[int, str]) -> bool:
    """Say whether two names hold the same bytes: one file with two names, or a copy that a repair of the disk made."""
    with open(beneath.open_file(*old), "rb") as one, open(beneath.open_file(*new), "rb") as other:
        if os.fstat(one.fileno()).st_size != os.fstat(other.fileno()).st_size:
            return False
        while part := one.read(_COMPARED_BYTES):
            if other.read(_COMPARED_BYTES) != part:
                return False
    return True


def _facts(directory_fd: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
