"""Saves that no daemon took: images and offers in the spool directory, taken in when one runs again.

The spool lies in the state directory, which is ours and node-local. An image stays until the
checkpoint it holds is durable elsewhere; an offer until its row is made.
"""

import contextlib
import errno
import mmap
import os
import stat
from typing import Any

import anyio.to_thread
import msgspec
import structlog

from ckptd import failpoint
from ckptd.clock import tick
from ckptd.errors import BadRequest, Busy, CkptdError, Refused
from ckptd.intake import descriptor as descriptors
from ckptd.intake import spoolhomes
from ckptd.intake.admit import Admission
from ckptd.intake.arena import DESCRIPTOR_BYTES_MAX
from ckptd.intake.arenas import Arena, ArenaPool
from ckptd.intake.files import FileOffer, Files
from ckptd.intake.requests import Submit
from ckptd.model import State
from ckptd_client import control, spool
from ckptd_client.wire import FrameError, check_keys, from_number

log = structlog.get_logger()

POLL_S = 4.0  # each look costs three wake-ups, and a node at rest may have ten a second
ENTRIES_MAX = 1000


class Spool:
    """Takes in what lies in `directory`, and opens images for the pipeline."""

    def __init__(self, directory: str, admission: Admission, files: Files, pool: ArenaPool) -> None:
        """Nothing is read yet."""
        self._directory = directory
        self._admission = admission
        self._files = files
        self._pool = pool
        self._known: dict[str, str] = {}  # checkpoint -> the file that holds it
        self.refused: dict[str, str] = {}  # file -> why, for those that will never be a save

    async def run(self) -> None:
        """Look into the spool every POLL_S seconds; a listing of an empty directory costs microseconds."""
        while True:
            await self.take_in()
            await tick(POLL_S)

    async def take_in(self) -> int:
        """Take in everything there is now; return how many entries were new.

        What makes no sense is left where it lies and named by `ckpt doctor`; what a busy catalog or a full
        disk delays is tried again at the next look.
        """
        try:
            found = await anyio.to_thread.run_sync(_listing, self._directory)
        except OSError as error:
            log.warning("spool.unreadable", cause="listing", error=str(error))
            return 0
        here = {entry.path for entry, _ in found}
        self.refused = {path: why for path, why in self.refused.items() if path in here}
        new = [(e, uid) for e, uid in found if e.path not in self.refused and e.checkpoint not in self._known]
        taken = 0
        for entry, uid in new[:ENTRIES_MAX]:
            try:
                await (self._image(entry, uid) if entry.kind == "arena" else self._offer(entry, uid))
                taken += 1
            except FileNotFoundError:
                continue  # its writer took it back
            except Refused as error:
                self.refused[entry.path] = error.message
                log.error("spool.refused", file=os.path.basename(entry.path), **error.to_wire())  # noqa: TRY400 - the text says it all
            except (CkptdError, OSError) as error:
                log.warning("spool.delayed", cause=type(error).__name__, file=entry.path, error=str(error))
        return taken

    async def _image(self, entry: spool.Spooled, of_uid: int | None) -> None:
        raw, size_bytes, uid = await anyio.to_thread.run_sync(_read_image, entry.path, of_uid)
        found = descriptors.decode(raw, size_bytes)
        if found.checkpoint != entry.checkpoint:
            raise BadRequest(f"{os.path.basename(entry.path)} holds the checkpoint {found.checkpoint}")
        checkpoint = await self._admission.memory(found, uid, arena=None, size_bytes=size_bytes)
        failpoint.hit("spool.admitted")
        self._known[entry.checkpoint] = entry.path
        if checkpoint.state is not State.PENDING:
            await self.forget(checkpoint.id)

    async def _offer(self, entry: spool.Spooled, of_uid: int | None) -> None:
        request, uid = await anyio.to_thread.run_sync(_read_offer, entry.path, of_uid)
        await self._files.file(offer_of(request, uid))
        await anyio.to_thread.run_sync(_remove, entry.path)

    async def open(self, checkpoint_id: str) -> int | None:
        """Open a checkpoint's image, from its arena or from the spool; None when neither has it. Busy: not now."""
        arena = self._pool.of_checkpoint(checkpoint_id)
        try:
            if arena is not None:
                return os.dup(arena.fd)
            known = self._known.get(checkpoint_id)
            if known is not None:
                return await anyio.to_thread.run_sync(_open, known)
            return await self._found(checkpoint_id)
        except OSError as error:
            raise Busy(f"the image of {checkpoint_id} can't be opened: {error.strerror}", retry_after_s=1.0) from error

    async def _found(self, checkpoint_id: str) -> int | None:
        """Open an image that nobody has looked at yet: its job goes on before the first look into the spool."""
        fd = await anyio.to_thread.run_sync(_open, spool.arena_path(self._directory, checkpoint_id))
        uid = await self._admission.uid_of(checkpoint_id) if fd is None else None
        if uid is None or uid == os.getuid():
            return fd
        # Whoever saved it has a spool alone: nobody else's bytes come in under its name.
        return await anyio.to_thread.run_sync(
            _open, spool.arena_path(spoolhomes.of(self._directory, uid), checkpoint_id)
        )

    async def published(self, checkpoint_id: str) -> None:
        """Its bytes are durable under their final name: the arena becomes a hot copy, the image goes."""
        self._pool.published(checkpoint_id)
        await self.forget(checkpoint_id)

    async def drop(self, checkpoint_id: str) -> None:
        """Nobody needs the image any more."""
        self._pool.free_checkpoint(checkpoint_id)
        await self.forget(checkpoint_id)

    def keep(self, checkpoint_id: str) -> bool:
        """Hold the copy of a damaged checkpoint until it is written again; False when there is none. Safe to repeat."""
        arena = self._pool.of_checkpoint(checkpoint_id)
        if arena is not None:
            arena.kept_for = checkpoint_id
        return arena is not None

    def let_go(self, checkpoint_id: str) -> None:
        """Undo `keep`; safe to repeat."""
        for arena in self._pool.all():
            if arena.kept_for == checkpoint_id:
                arena.kept_for = ""
                self._pool.wake()

    def kept(self) -> list[str]:
        """Of which checkpoints copies are held."""
        return [arena.kept_for for arena in self._pool.all() if arena.kept_for]

    async def spill(self, arena: Arena) -> None:
        """Write a committed arena into the spool, durably: the daemon ends before it could be published."""
        await anyio.to_thread.run_sync(_spill, self._directory, arena)

    async def forget(self, checkpoint_id: str) -> None:
        """Remove the spooled image of a checkpoint, if there is one."""
        path = self._known.get(checkpoint_id)
        if path is None:
            return
        try:
            await anyio.to_thread.run_sync(_remove, path)
        except OSError as error:
            # The next look takes it in once more, finds its checkpoint past needing it, and comes here again.
            log.warning("spool.not_removed", cause="forget", checkpoint=checkpoint_id, error=str(error))
        else:
            failpoint.hit("spool.removed")
        self._known.pop(checkpoint_id, None)


def offer_of(request: Submit, uid: int) -> FileOffer:
    """Turn a submit request into the offer that admission takes."""
    return FileOffer(
        id=request.checkpoint,
        path=request.path,
        uid=uid,
        project=request.project,
        experiment=request.experiment,
        step=request.step,
        epoch=request.epoch,
        metrics={name: from_number(value) for name, value in request.metrics.items()},
        note=request.note,
        meta=request.meta,
        update_best=request.update_best,
    )


def _listing(directory: str) -> list[tuple[spool.Spooled, int | None]]:
    for home in spoolhomes.every(directory):
        for path in spool.abandoned(home.directory):
            _remove(path)
    return list(spoolhomes.entries(directory))


def _opened(path: str, of_uid: int | None) -> tuple[int, os.stat_result]:
    """Open a plain file of the spool: no symlink is followed, nothing that could block is opened, and in a
    user's own spool no file of anybody else's, which a hard link could be.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise BadRequest(f"{os.path.basename(path)} is a symlink") from error
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        os.close(fd)
        raise BadRequest(f"{os.path.basename(path)} is no plain file")
    if of_uid is not None and facts.st_uid != of_uid:
        os.close(fd)
        raise BadRequest(f"{os.path.basename(path)} is not its user's file")
    return fd, facts


def _read_image(path: str, of_uid: int | None) -> tuple[bytes, int, int]:
    fd, facts = _opened(path, of_uid)
    try:
        page = control.read(os.pread(fd, control.PAGE, 0).ljust(control.PAGE, b"\0"))
        if page is None or page.descriptor_offset + page.descriptor_size > facts.st_size:
            raise BadRequest(f"{os.path.basename(path)} is no image of a save")
        if page.descriptor_size > DESCRIPTOR_BYTES_MAX:
            raise BadRequest(f"{os.path.basename(path)} has a descriptor of over {DESCRIPTOR_BYTES_MAX} bytes")
        raw = os.pread(fd, page.descriptor_size, page.descriptor_offset)
        if not control.is_whole(page, raw):
            raise BadRequest(f"{os.path.basename(path)} was never committed")
        return raw, facts.st_size, facts.st_uid
    finally:
        os.close(fd)


def _read_offer(path: str, of_uid: int | None) -> tuple[Submit, int]:
    fd, facts = _opened(path, of_uid)
    try:
        if facts.st_size > spool.OFFER_BYTES_MAX:
            raise BadRequest(f"{os.path.basename(path)} is over {spool.OFFER_BYTES_MAX} bytes")
        body = os.pread(fd, spool.OFFER_BYTES_MAX, 0)
    finally:
        os.close(fd)
    try:
        request = msgspec.json.decode(body, type=dict[str, Any])
        check_keys(body)
        return msgspec.convert({**request, "id": 0, "op": "submit"}, Submit), facts.st_uid
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, FrameError) as error:
        raise BadRequest(f"{os.path.basename(path)}: {error}") from error


def _spill(directory: str, arena: Arena) -> None:
    page = control.read(arena.page)
    if page is None:
        raise BadRequest(f"arena {arena.id.hex()[:12]} has no control page")
    length = spool.image_bytes(page.descriptor_offset, page.descriptor_size)
    with mmap.mmap(arena.fd, min(length, arena.size_bytes), prot=mmap.PROT_READ) as image, memoryview(image) as view:
        spool.write_arena(directory, arena.checkpoint_id, view, owner_uid=arena.owner_uid)


def _open(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None


def _remove(path: str) -> None:
    """Remove one of our own small files and make that last, so that it is not taken in again.

    The directory is fsynced even when the file is gone: who removed it may have died right then.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: TID251 - the spool lies in the state directory, which workers don't serve
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
