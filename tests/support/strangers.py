"""A peer of another user, for handlers that are asked directly: no test can connect as somebody else."""

from typing import Any

from ckptd.intake.listener import Peer


class Stranger(Peer):
    """Whatever is pushed to it is a leak."""

    def __init__(self, uid: int) -> None:
        self.uid, self.pid, self.group = uid, 1, None
        self.attached: dict[str, Any] = {}
        self.follows: dict[str, None] = {}

    def push(self, message: dict[str, Any]) -> None:
        raise AssertionError(f"told to another user: {message}")
