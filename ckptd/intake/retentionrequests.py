"""Requests about keeping: plans, why, back from the trash, tags. Part of intake/requests.py."""

from typing import Annotated

import msgspec

from ckptd.intake.fields import Id, Request, Selecting, Tags


class Retention(Request, frozen=True, tag="retention"):
    """Plan what the rules drop; apply it when asked to."""

    project: str | None = None
    name: str | None = None
    apply: bool = False
    only: list[Id] | None = None
    plan: Annotated[str, msgspec.Meta(max_length=64)] | None = None


class Explain(Selecting, frozen=True, tag="retention.explain"):
    """Why does it stay, or go?"""


class Restore(Selecting, frozen=True, tag="restore"):
    """Bring back what is in the trash: a checkpoint, or what was taken out of one."""

    pin: bool = True


class Tag(Selecting, frozen=True, tag="checkpoint.tag"):
    """Add and remove its tags."""

    add: Tags = msgspec.field(default_factory=list)
    remove: Tags = msgspec.field(default_factory=list)


ALL: tuple[type[Request], ...] = (Retention, Explain, Restore, Tag)
