"""Requests about what is best."""

from typing import Annotated

import msgspec

from ckptd.intake.fields import PAGE_MAX, Count, Name, Request

Rule = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Best(Request, frozen=True, tag="best"):
    """Which checkpoints are the best, by which rules?"""

    project: Name | None = None
    name: Name | None = None
    rule: Rule | None = None
    places: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = 1
    after: Count | None = None


class Recompute(Request, frozen=True, tag="best.recompute"):
    """Decide the best again from everything that is known."""

    project: Name | None = None
    name: Name | None = None
    dry_run: bool = False


ALL: tuple[type[Request], ...] = (Best, Recompute)
