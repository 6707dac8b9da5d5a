"""What a client writes into an arena about a save, checked before anything believes it."""

from datetime import datetime
from typing import Annotated, Any

import msgspec

from ckptd.errors import BadPath, BadRequest
from ckptd.intake.fields import Count, Id, Metrics, Name, PathText, Step, Tags, Text
from ckptd.intake.requests import check_depth
from ckptd_client import control, wire

FILES_MAX = 4096
NAME_CHARS_MAX = 128
NAME_BYTES_MAX = 240  # leaves room for our suffixes within the 255 bytes of a file name


Segment = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31))]


class FileAt(msgspec.Struct, frozen=True):
    """One file image in the arena."""

    path: str
    offset: Count
    size_bytes: Count


class ExperimentFacts(msgspec.Struct, frozen=True):
    """Enough of an experiment to make its row when no daemon was there to open it."""

    id: Id
    project: Name
    name: Name
    dir: PathText
    config: dict[str, Any] = {}
    tags: Tags = []
    parent: str | None = None
    facts: dict[str, Any] = {}


class Descriptor(msgspec.Struct, frozen=True):
    """One save. Unknown fields are allowed: a newer client may say more."""

    checkpoint: Id
    experiment: ExperimentFacts
    files: list[FileAt]
    v: int = 1
    created_at: datetime | None = None
    step: Step | None = None
    epoch: float | None = None
    metrics: Metrics = {}
    note: Text = ""
    meta: dict[str, Any] = {}
    parent: str | None = None
    update_best: bool = True
    segment: Segment | None = None
    format: Annotated[str, msgspec.Meta(min_length=1, max_length=32)] = "safetensors"
    sequence: Count = 0


def decode(raw: bytes, arena_bytes: int) -> Descriptor:
    """Check a descriptor against the arena it lies in. BadRequest or BadPath names what is wrong."""
    try:
        found = msgspec.json.decode(raw, type=Descriptor)
        wire.check_keys(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, wire.FrameError) as error:
        raise BadRequest(f"descriptor: {error}") from error
    if not 0 < len(found.files) <= FILES_MAX:
        raise BadRequest(f"descriptor: {len(found.files)} files, 1 to {FILES_MAX} are possible")
    for image in found.files:
        end = image.offset + image.size_bytes
        if image.offset % control.PAGE or not control.PAGE <= image.offset <= end <= arena_bytes:
            raise BadRequest(f"descriptor: file {image.path!r} lies outside its arena")
        check_file_name(image.path)
    if len({image.path for image in found.files}) != len(found.files):
        raise BadRequest("descriptor: two files have the same name")
    for what, free in (
        ("config", found.experiment.config),
        ("facts", found.experiment.facts),
        ("meta", found.meta),
    ):
        check_depth(f"descriptor: {what}", free)
    check_name("project", found.experiment.project)
    check_name("experiment", found.experiment.name)
    return found


def check_file_name(name: str) -> None:
    """BadPath unless `name` is one plain component that is not ours."""
    if "/" in name or not is_plain(name) or name in {"manifest.json", "late.json"}:
        raise BadPath(f"file name {name!r} is not possible in a checkpoint")


def check_name(what: str, name: str) -> None:
    """BadPath unless a project's or experiment's name can be a directory's name."""
    if "/" in name or not is_plain(name):
        raise BadPath(
            f"{what} {name!r} can't be a directory's name",
            hint='1 to 128 characters, no "/", no control characters, no leading "."',
        )


def is_plain(name: str) -> bool:
    """Whether a text may be one component of a path that we make."""
    return (
        0 < len(name) <= NAME_CHARS_MAX
        and not name.startswith(".")
        and name.isprintable()
        and len(name.encode()) <= NAME_BYTES_MAX
    )


def check_directory(path: str) -> str:
    """BadPath unless `path` is absolute, normal text; returns it without a trailing slash."""
    parts = path.split("/")
    if not path.startswith("/") or "\0" in path or ".." in parts or "." in parts or "" in parts[1:-1]:
        raise BadPath(f"{path!r} must be an absolute path without '.', '..' or '//'")
    return path.rstrip("/") or "/"
