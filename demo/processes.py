"""Starts the demo's processes, follows what they say, and ends them by pid."""

import json
import os
import queue
import signal
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

STOP_S = 20.0


class Process:
    """One child whose standard output is JSON lines (or text, for those that know no better)."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        """Start it; its standard error goes to the end of `log`."""
        self._log = log.open("ab")
        self._child = subprocess.Popen(
            arguments, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log
        )
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                said = {"event": "text", "text": line.decode(errors="replace").rstrip()}
            self._said.put(said)
        self._said.put(None)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def next(self, timeout_s: float) -> dict[str, Any] | None:
        """Return what it says next, or None once it has ended. queue.Empty after `timeout_s`."""
        return self._said.get(timeout=timeout_s)

    def wait(self, timeout_s: float) -> int:
        """Return its exit status; negative: the signal that ended it."""
        return self._child.wait(timeout_s)

    def stop(self) -> None:
        """Ask it to end, insist after STOP_S; nothing to do when it is gone."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._reader.join(STOP_S)
        self._log.close()


class Processes:
    """All children of the demo; leaving the block ends each of them, the youngest first."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        """Every child gets `environment` on top of our own."""
        self._environment = {**os.environ, **environment}
        self._log = log
        self._children: list[Process] = []

    def start(self, *arguments: str) -> Process:
        """Start a program that is stopped with us."""
        child = Process(list(arguments), self._environment, self._log)
        self._children.append(child)
        return child

    def call(self, *arguments: str, timeout_s: float = 90.0) -> str:
        """Run a program to its end and return what it printed. CalledProcessError on failure."""
        done = subprocess.run(
            arguments,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n")
            done.check_returncode()
        return done.stdout

    def __enter__(self) -> Self:
        """Nothing has started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what still runs."""
        for child in reversed(self._children):
            child.stop()
