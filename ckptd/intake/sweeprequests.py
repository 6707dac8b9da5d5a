"""Requests about how training goes: a sweep's grid, and how to go on after a bad end."""

from typing import Annotated

import msgspec

from ckptd.intake.fields import Id, Name, Request
from ckptd.query.grid import EXPERIMENTS_MAX

Metric = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Tag = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Reference = Annotated[str, msgspec.Meta(min_length=1, max_length=257)]


class Grid(Request, frozen=True, tag="grid"):
    """How are the experiments doing that have a tag, a parent or a project in common?"""

    project: Name | None = None
    tag: Tag | None = None
    parent: Reference | None = None
    metric: Metric | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=EXPERIMENTS_MAX)] = EXPERIMENTS_MAX


class Recovery(Request, frozen=True, tag="recovery"):
    """How can this experiment go on?"""

    experiment: Id | None = None
    project: Name | None = None
    name: Name | None = None
