"""A foreign writer for tests: run_writer.py in a process of its own, driven through pipes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SCRIPT = Path(__file__).with_name("run_writer.py")
END_S = 20.0


class Writer:
    """with Writer() as writer: writer.torch_save(path=..., seed=1). Each order returns once it is carried out."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={key: value for key, value in os.environ.items() if not key.startswith("CKPTD_")},
            text=True,
        )
        assert self._hear() == {"ready": True}

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def __getattr__(self, order: str) -> Any:
        if order.startswith("_"):
            raise AttributeError(order)
        return lambda **given: self._ask(order, given)

    def _ask(self, order: str, given: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        plain = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in given.items()}
        self._process.stdin.write(json.dumps({"do": order, **plain}) + "\n")
        self._process.stdin.flush()
        answer = self._hear()
        assert "raised" not in answer, answer["raised"]
        return answer

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the writer died"
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
