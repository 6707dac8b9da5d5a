"""Every order of operations that promises something, as one thing to begin, to interrupt and to judge.

A protocol runs in whatever process asks for it: cut off by a power cut at any operation (power.py), or
killed there. `wrong()` says what must not be, with `done` when it had been answered; afterwards it must be
possible to ask again.
"""

import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from ckptd.intake import spooled
from ckptd.model import new_id
from ckptd.worker import amend, beneath, digest, link, publish, trash
from ckptd.worker.context import Context
from ckptd.worker.members import identity, members
from ckptd.worker.protocol import (
    Amend,
    Digest,
    FileImage,
    IdentityRecord,
    Link,
    Publish,
    Purge,
    Restore,
    Trash,
)
from ckptd_client import spool
from tests.support.arena import layout, sealed

BLOCK = 4096
_noise = Random(7)  # the same bytes in every process
SMALL, LARGE = b"{}", _noise.randbytes((1 << 20) + 77)  # the large one goes past the page cache
FILES = {"model.safetensors": LARGE, "deep/opt.safetensors": _noise.randbytes(5 * BLOCK + 9), "state.json": SMALL}


@dataclass
class Stage:
    """Where one run of a protocol happens: nothing else is under `root`."""

    root: Path
    fd: int = -1  # an arena with FILES
    images: list[FileImage] = field(default_factory=list)
    checkpoint: str = field(default_factory=new_id)
    identity: IdentityRecord | None = None

    @property
    def target(self) -> Path:
        """The final name."""
        return self.root / "p" / "e" / "step_0000000002"

    @property
    def earlier(self) -> Path:
        """The final name of the checkpoint before."""
        return self.root / "p" / "e" / "step_0000000001"

    @property
    def binned(self) -> Path:
        """Where it lies in the trash."""
        return self.root / ".ckptd-trash" / self.checkpoint

    @property
    def spool(self) -> Path:
        """The state directory's spool, on the same disk here."""
        return self.root.with_name(self.root.name + "-spool")

    def publish(self, target: Path, checkpoint: str, fd: int | None = None) -> None:
        """Write FILES under a final name."""
        request = Publish(
            root=str(self.root), target=str(target), files=self.images, manifest={"v": 1, "checkpoint": checkpoint}
        )
        publish.run(request, Context(fd=self.fd if fd is None else fd))


@dataclass(frozen=True)
class Protocol:
    """One order of operations: subclasses say what comes before, what is done, and what must then be."""

    @property
    def name(self) -> str:
        """As in reports."""
        return type(self).__name__.lower()

    def prepare(self, stage: Stage) -> None:
        """Make what is there, durably, before it begins."""

    def act(self, stage: Stage) -> None:
        """Do it; may be asked again after any interruption."""
        raise NotImplementedError

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        """Say what is not as promised; `done` when act() had returned."""
        raise NotImplementedError


def opened(root: Path) -> Stage:
    """A stage with an arena; `closed()` ends it."""
    fd, images = sealed(FILES)
    return Stage(root, fd, images)


def damage(directory: Path) -> Iterator[str]:
    """What of FILES is not under a name."""
    for name, data in FILES.items():
        try:
            found = (directory / name).read_bytes()
        except OSError as error:
            yield f"{directory.name}/{name}: {error.strerror}"
            continue
        if found != data:
            zeros = found.count(0) > len(data) // 2
            yield f"{directory.name}/{name}: {len(found)} of {len(data)} bytes{', zeros' if zeros else ', others'}"
    try:
        manifest = (directory / "manifest.json").read_bytes()
    except OSError as error:
        yield f"{directory.name}/manifest.json: {error.strerror}"
    else:
        if not manifest.endswith(b"]\n}\n"):
            yield f"{directory.name}/manifest.json is not whole"


class PublishNew(Protocol):
    """Arena to final name; root, project and experiment are new too."""

    def act(self, stage: Stage) -> None:
        stage.publish(stage.target, stage.checkpoint)

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        if stage.target.exists():
            yield from damage(stage.target)
        elif done:
            yield "was answered, and is not there"


class Replace(Protocol):
    """The next checkpoint, then the one before into the trash: never without one."""

    def prepare(self, stage: Stage) -> None:
        stage.publish(stage.earlier, stage.checkpoint)
        stage.identity = _identity(stage.root, stage.earlier)

    def act(self, stage: Stage) -> None:
        stage.publish(stage.target, "0" * 31 + "2")
        assert stage.identity is not None
        trash.trash(
            Trash(root=str(stage.root), path=str(stage.earlier), identity=stage.identity, trash=stage.checkpoint),
            Context(),
        )

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        there = [path for path in (stage.earlier, stage.target, stage.binned) if path.exists()]
        for path in there:
            yield from damage(path)
        if stage.earlier not in there and stage.target not in there:
            yield "no checkpoint is left under a final name"
        if stage.earlier not in there and stage.binned not in there:
            yield "the one before is neither at its name nor in the trash"
        if done and there != [stage.target, stage.binned]:
            yield f"was answered, and there is {[path.name for path in there]}"


class DigestNew(Protocol):
    """Files that somebody wrote without a single fsync, in directories as new as they are, become durable in place."""

    def act(self, stage: Stage) -> None:
        for name, data in FILES.items():
            path = stage.target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name("fresh-" + path.name)
            fresh.write_bytes(data)
            fresh.rename(path)
        digest.run(Digest(root=str(stage.root), path=str(stage.target)), Context())

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        if done:
            yield from (each for each in damage(stage.target) if "manifest" not in each)


class DigestOver(DigestNew):
    """The same where older files of those names were durable."""

    def prepare(self, stage: Stage) -> None:
        for name, data in FILES.items():
            path = stage.target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data[::-1])


class LinkNew(Protocol):
    """A link where there was none."""

    def prepare(self, stage: Stage) -> None:
        stage.target.mkdir(parents=True)

    def act(self, stage: Stage) -> None:
        link.run(
            Link(root=str(stage.root), name=str(stage.target.parent / "latest"), target=stage.target.name), Context()
        )

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        found = stage.target.parent / "latest"
        if not found.is_symlink():
            if done or found.exists():
                yield f"the link is not there (exists: {found.exists()})"
        elif os.readlink(found) != stage.target.name:
            yield f"the link leads to {os.readlink(found)!r}"


class LinkReplaced(LinkNew):
    """A link leads to the old or to the new one at every instant."""

    def prepare(self, stage: Stage) -> None:
        super().prepare(stage)
        (stage.target.parent / "latest").symlink_to(stage.earlier.name)

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        found = stage.target.parent / "latest"
        leads = os.readlink(found) if found.is_symlink() else "nowhere"
        if leads not in {stage.target.name} | (set() if done else {stage.earlier.name}):
            yield f"the link leads to {leads!r}"


class LinkRemoved(LinkReplaced):
    """A link that was removed stays away."""

    def act(self, stage: Stage) -> None:
        link.run(Link(root=str(stage.root), name=str(stage.target.parent / "latest"), target=""), Context())

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        if done and (stage.target.parent / "latest").is_symlink():
            yield "the link is back"


class Retire(Protocol):
    """Into the trash by rename."""

    def prepare(self, stage: Stage) -> None:
        stage.publish(stage.target, stage.checkpoint)
        stage.identity = _identity(stage.root, stage.target)

    def act(self, stage: Stage) -> None:
        assert stage.identity is not None
        trash.trash(
            Trash(root=str(stage.root), path=str(stage.target), identity=stage.identity, trash=stage.checkpoint),
            Context(),
        )

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        yield from _one_of(stage.target, stage.binned, stage.binned if done else None)


class Bring(Retire):
    """Back out of the trash."""

    def prepare(self, stage: Stage) -> None:
        super().prepare(stage)
        super().act(stage)

    def act(self, stage: Stage) -> None:
        assert stage.identity is not None
        trash.restore(
            Restore(
                root=str(stage.root),
                path=str(stage.target),
                identity=stage.identity,
                trash=stage.checkpoint,
                checkpoint=stage.checkpoint,
            ),
            Context(),
        )

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        yield from _one_of(stage.target, stage.binned, stage.target if done else None)


class PurgeTrash(Bring):
    """Gone for good; half of it never looks like a whole one."""

    def act(self, stage: Stage) -> None:
        trash.purge(Purge(root=str(stage.root), trash=stage.checkpoint), Context())

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        if done and stage.binned.exists():
            yield "what was purged is back"
        if (stage.binned / "manifest.json").exists():
            yield from damage(stage.binned)
        if stage.target.exists():
            yield "what was retired is back under its name"


class AmendLate(Protocol):
    """What becomes known after the publish replaces what was known before, beside a manifest that nobody touches."""

    def prepare(self, stage: Stage) -> None:
        stage.publish(stage.target, stage.checkpoint)
        self._say(stage, 0.5)

    def act(self, stage: Stage) -> None:
        self._say(stage, 0.25)

    def _say(self, stage: Stage, loss: float) -> None:
        said = Amend(root=str(stage.root), path=str(stage.target), checkpoint=stage.checkpoint, metrics={"loss": loss})
        amend.run(said, Context())

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        yield from damage(stage.target)
        try:
            found = json.loads((stage.target / "late.json").read_bytes())["metrics"]["loss"]
        except (OSError, ValueError, KeyError) as error:
            yield f"late.json: {error!r}"
            return
        if found != 0.25 and (done or found != 0.5):
            yield f"late.json says {found}"


class SpoolWrite(Protocol):
    """What a client does when there is no daemon."""

    def prepare(self, stage: Stage) -> None:
        stage.spool.mkdir(parents=True)

    def act(self, stage: Stage) -> None:
        # Mapped as a client has it, and so aligned: from other memory O_DIRECT fails first, unless that is by chance.
        with mmap.mmap(stage.fd, layout(FILES)[1], prot=mmap.PROT_READ) as image, memoryview(image) as whole:
            spool.write_arena(str(stage.spool), stage.checkpoint, whole)

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        path = Path(spool.arena_path(str(stage.spool), stage.checkpoint))
        if path.exists():
            if path.read_bytes() != _image(stage):
                yield f"the image has {path.stat().st_size} bytes, and not those that were written"
        elif done:
            yield "was answered, and is not there"


class SpoolAdopted(SpoolWrite):
    """From the spool to a final name; the image goes only when that is durable."""

    def prepare(self, stage: Stage) -> None:
        super().prepare(stage)
        super().act(stage)

    def act(self, stage: Stage) -> None:
        path = spool.arena_path(str(stage.spool), stage.checkpoint)
        fd = spooled._open(path)
        if fd is None:
            return  # an earlier try came to its end
        try:
            stage.publish(stage.target, stage.checkpoint, fd)
        finally:
            os.close(fd)
        spooled._remove(path)

    def wrong(self, stage: Stage, *, done: bool) -> Iterator[str]:
        path = Path(spool.arena_path(str(stage.spool), stage.checkpoint))
        if stage.target.exists():
            yield from damage(stage.target)
        elif not path.exists():
            yield "neither the image nor the checkpoint is there"
        if done and (path.exists() or not stage.target.exists()):
            yield f"was answered, and the image is {'there' if path.exists() else 'gone'}"
        if path.exists() and path.read_bytes() != _image(stage):
            yield "the image is damaged"


PROTOCOLS: tuple[Protocol, ...] = (
    PublishNew(), Replace(), DigestNew(), DigestOver(), LinkNew(), LinkReplaced(), LinkRemoved(),
    Retire(), Bring(), PurgeTrash(), AmendLate(), SpoolWrite(), SpoolAdopted(),
)  # fmt: skip


def _one_of(name: Path, binned: Path, must: Path | None) -> Iterator[str]:
    there = [path for path in (name, binned) if path.exists()]
    if len(there) != 1:
        yield f"{len(there)} names are left of it"
    for path in there:
        yield from damage(path)
    if must is not None and there != [must]:
        yield f"was answered, and is at {[str(path) for path in there]}"


def _identity(root: Path, path: Path) -> IdentityRecord:
    root_fd = beneath.open_root(str(root))
    try:
        fd = beneath.open_directory(root_fd, beneath.parts_below(str(root), str(path)))
        try:
            return identity(os.fstat(fd), members(fd))
        finally:
            os.close(fd)
    finally:
        os.close(root_fd)


def _image(stage: Stage) -> bytes:
    """The arena's bytes as the spool holds them."""
    return os.pread(stage.fd, layout(FILES)[1], 0)
