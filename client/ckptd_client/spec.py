"""What a session is made with."""

import os
from typing import Any, Dict, List, NamedTuple, Optional

from ckptd_client import arguments
from ckptd_client.overflow import SPOOL_BYTES_MAX

OVERLAP_WAIT_S = 30.0


class Spec(NamedTuple):
    """What an Experiment was made with, checked."""

    experiment: str
    name: str
    project: str
    directory: str
    config: Dict[str, Any]
    tags: List[str]
    parent: Optional[str]
    resume: str
    on_overlap: str
    overlap_wait_s: float
    format: str
    raise_errors: bool
    autostart: bool
    socket: Optional[str]
    spool_bytes_max: int
    offline: bool


def plain_spec() -> Spec:
    """Return the spec of a session without an experiment, for module-level submits."""
    return Spec(
        experiment=os.urandom(16).hex(), name="", project="", directory="", config={}, tags=[], parent=None,
        resume="allow", on_overlap="wait", overlap_wait_s=OVERLAP_WAIT_S, format="safetensors", raise_errors=False,
        autostart=True, socket=None, spool_bytes_max=SPOOL_BYTES_MAX, offline=arguments.mode() == "offline",
    )  # fmt: skip
