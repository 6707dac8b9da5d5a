"""Peers of another user: one for handlers that are asked directly, and a process that really is somebody else."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptd.intake.listener import Peer

SOMEBODY = 65534
_ASK = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
peer = socket.socket(socket.AF_UNIX)
try:
    peer.connect(sys.argv[1])
except PermissionError:
    sys.exit("kept out by the kernel")
lines = peer.makefile("rw")
for frame in sys.stdin:
    lines.write(frame)
    lines.flush()
    print(lines.readline(), end="")
"""


class Stranger(Peer):
    """Whatever is pushed to it is a leak."""

    def __init__(self, uid: int) -> None:
        self.uid, self.pid, self.ticks, self.group = uid, 1, 1, None
        self.attached: dict[str, Any] = {}
        self.follows: dict[str, None] = {}

    def push(self, message: dict[str, Any]) -> None:
        raise AssertionError(f"told to another user: {message}")


def need_root() -> None:
    """Skip where nobody may become somebody else."""
    if os.getuid() != 0:
        pytest.skip("needs root to be somebody else for a moment")


def ask_as(uid: int, path: Path, *requests: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """What a process of another user gets for hello and for each request: a line of JSON each. Blocks."""
    frames = [{"op": "hello", "versions": [1]}, *requests]
    text = "".join(json.dumps({"v": 1, "id": n, **frame}) + "\n" for n, frame in enumerate(frames, 1))
    command = [sys.executable, "-I", "-c", _ASK, str(path), str(uid)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=30)
