"""How much load: as the targets name it, or a hundredth of it to see that everything runs."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of one run; `folder` holds what is made for it (None: the system's place for temporary files)."""

    folder: Path | None = None
    seconds: float = 12.0  # of each load that goes on for a while
    idle: int = 1000  # connections
    checkpoints: int = 1_000_000
    files_each: int = 10
    looks: int = 100  # of each kind of question
    jobs: int = 10_000
    saves: int = 100_000
    refused: int = 100_000
    known: int = 100_000  # files
    burst: int = 20_000  # files
    verify_bytes: int = 1 << 30
    interval_s: float = 660.0  # the longest interval of the scan that finds what events missed, and a little


SMALL = Scale(
    seconds=1.0, idle=20, checkpoints=5_000, looks=10, jobs=200, saves=2_000, refused=1_000, known=1_000, burst=200, verify_bytes=32 << 20, interval_s=3.0,
)  # fmt: skip
