"""What fields of requests may hold, and what all requests carry."""

from typing import Annotated, Literal

import msgspec

from ckptd_client import wire

Id = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Text = Annotated[str, msgspec.Meta(max_length=65536)]
PathText = Annotated[str, msgspec.Meta(min_length=1, max_length=4095)]
Step = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
Whole = Annotated[int, msgspec.Meta(ge=-(1 << 62), le=(1 << 62))]  # also the step of a metric: some count down
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
UnixTime = Annotated[float, msgspec.Meta(ge=0, le=253_402_300_799)]  # up to the year 9999
Number = float | Literal["NaN", "Infinity", "-Infinity"]
Metrics = dict[Annotated[str, msgspec.Meta(max_length=256)], Number]
Tags = Annotated[list[Annotated[str, msgspec.Meta(min_length=1, max_length=128)]], msgspec.Meta(max_length=256)]
POINTS_MAX = 1000
PAGE_MAX = 500


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op"):
    """What every request carries."""

    id: Whole
    v: Whole = wire.VERSION


class Selecting(Request, frozen=True):
    """Name one checkpoint."""

    selector: Text = "latest"
    project: str | None = None
    name: str | None = None
    experiment: str | None = None
