"""Real training processes for tests: forked by run_trainer.py, told what to do over a socket of their own."""

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SCRIPT = Path(__file__).with_name("run_trainer.py")
START_S = 180.0
ANSWER_S = 100.0


class TrainerDied(Exception):
    """The process ended before it answered."""


class Trainer:
    """One training process. Orders are methods of run_trainer.Trainer, by name: trainer.save(seed=1, step=1)."""

    def __init__(self, nursery: Path, environ: dict[str, str]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_S)
        self._socket.connect(str(nursery))
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self._tell(environ)
        self.pid = int(self._hear()["pid"])
        self._pidfd = os.pidfd_open(self.pid)

    def __getattr__(self, order: str) -> Any:
        if order.startswith("_"):
            raise AttributeError(order)
        return lambda **given: self.ask(order, **given)

    def ask(self, order: str, **given: Any) -> dict[str, Any]:
        """Give an order and return the answer. TrainerDied when it died of it; AssertionError when it raised."""
        self.begin(order, **given)
        return self.answer()

    def begin(self, order: str, **given: Any) -> None:
        """Give an order; `answer()` returns what came of it."""
        self._tell({"do": order, **given})

    def answer(self, patience_s: float = ANSWER_S) -> dict[str, Any]:
        """Return the answer to the order that was begun."""
        self._socket.settimeout(patience_s)
        found = self._hear()
        self._socket.settimeout(ANSWER_S)
        assert "raised" not in found, found["raised"]
        return found

    def dies_of(self, order: str, **given: Any) -> dict[str, Any]:
        """Give an order that must be its last; return its last words."""
        words = self.ask(order, **given)
        try:
            answer = self._hear()
        except TrainerDied:
            self.wait_dead()
            return words
        raise AssertionError(f"{order} was answered: {answer}")

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.wait_dead()

    def quit(self) -> None:
        """Let the script end as scripts do; returns when the process is gone."""
        self._tell({"do": "quit"})
        self.wait_dead()

    def wait_dead(self) -> None:
        """Return once the process is gone."""
        assert select.select([self._pidfd], [], [], ANSWER_S)[0], f"trainer {self.pid} does not end"

    def end(self) -> None:
        """End the process, whatever it does."""
        if self._pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        os.close(self._pidfd)
        self._pidfd = -1
        self._lines.close()
        self._socket.close()

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError) as error:
            raise TrainerDied from error

    def _hear(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            line = ""
        if not line:
            raise TrainerDied
        found: dict[str, Any] = json.loads(line)
        return found


class Nursery:
    """with Nursery(directory) as nursery: nursery.trainer(environ)"""

    def __init__(self, directory: Path, *, plain: bool = False, prefix: tuple[str, ...] = ()) -> None:
        self._socket = directory / ("plain.sock" if plain else "torch.sock")
        flags = ["--plain"] if plain else []
        with (directory / "trainers.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, str(SCRIPT), str(self._socket), *flags],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={key: value for key, value in os.environ.items() if not key.startswith("CKPTD_")},
            )
        said: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        stdout = self._process.stdout
        assert stdout is not None
        threading.Thread(target=lambda: said.put(stdout.readline()), daemon=True).start()
        assert said.get(timeout=START_S) == b"ready\n", (directory / "trainers.log").read_text()
        self._trainers: list[Trainer] = []

    @property
    def pid(self) -> int:
        """The nursery's own process."""
        return self._process.pid

    def trainer(self, environ: dict[str, str]) -> Trainer:
        """Start a trainer whose environment has these on top."""
        made = Trainer(self._socket, environ)
        self._trainers.append(made)
        return made

    def clear(self) -> None:
        """End every trainer."""
        while self._trainers:
            self._trainers.pop().end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clear()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=START_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
