"""The JSON examples of docs/reference/wire-control.md: what tests say to and hear from the command line."""

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs/reference/wire-control.md"


def documented() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return (requests, replies) by operation: the JSON examples of docs/reference/wire-control.md."""
    requests: dict[str, dict[str, Any]] = {}
    replies: dict[str, dict[str, Any]] = {}
    checkpoint: dict[str, Any] = {}
    op = ""
    for block in re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL):
        body = json.loads(block)
        if "op" in body:
            op = body["op"]
            requests[op] = body
        elif op == "hello":
            checkpoint = body
        elif "push" not in body:
            replies.setdefault(op, body)
    replies["unpin"] = replies["unveto"] = replies["pin"]
    replies["list"] = {"checkpoints": [checkpoint], "next": None}
    replies["show"]["checkpoint"] = checkpoint
    replies["show"]["experiment"] = replies["experiments"]["experiments"][0]
    return requests, replies
