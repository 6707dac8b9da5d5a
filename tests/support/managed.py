"""A node without ckptd's own supervisor: the daemon is a service, started by the `ckptd` command as its unit says."""

import os
import signal
import sys
from dataclasses import dataclass, field, replace
from typing import Any, Self

from tests.support.node import PATIENCE_S, Node, children, eventually, is_alive
from tests.support.service_manager import ServiceManager, Unit
from tests.support.signals import kill


@dataclass
class Managed(Node):
    """with Managed(short_directory) as node: node.manager.stop()"""

    unit: dict[str, Any] = field(default_factory=dict)  # what differs from service_manager.Unit
    program: tuple[str, ...] = ("-P", "-m", "ckptd")
    armed: bool = True  # with fail points; a daemon that has them is never called well
    manager: ServiceManager = None  # type: ignore[assignment]  # made by start()

    def start(self, *flags: str, ready: bool = True) -> Self:
        """Start the service; the manager is made at the first time and keeps the store from then on."""
        self.configure()
        self.plan.touch()
        self.state.mkdir(mode=0o700, exist_ok=True)
        if self.manager is None:
            self.manager = ServiceManager(self.dir, self.socket, self.log, self.described(*flags))
        self.manager.start(ready=ready)
        if ready:
            self.status()
        return self

    def described(self, *flags: str) -> Unit:
        """Return the unit as it would be started now."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("CKPTD_", "XDG_"))}
        places = ["--config", str(self.dir / "toml"), "--state-dir", str(self.state), "--socket", str(self.socket)]
        command = [sys.executable, *self.program, *places, "--log-format", "json", *flags]
        points = {"CKPTD_FAIL": f"@{self.plan}"} if self.armed else {}
        return replace(Unit(command, {**clean, **points}), **self.unit)

    def family(self) -> list[int]:
        """The daemon and every process below it."""
        found = [self.manager.pid] if self.manager.pid else []
        for pid in found:
            found += children(pid)
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon."""
        self.manager.kill(number)

    def stop(self, patience_s: float = PATIENCE_S) -> int:
        """Stop it; 0 when it went within the time that the unit gives."""
        self.manager.stop(patience_s)
        return self.manager.journal.killed

    def clean_up(self) -> None:
        """End every process of this node, by pid."""
        if self.manager is None:
            return
        family = self.family()
        self.manager.close()
        kill(pid for pid in family if is_alive(pid) and self._is_ours(pid))
        eventually(lambda: not any(is_alive(p) and self._is_ours(p) for p in family), "every process to end")
        self.manager = None  # type: ignore[assignment]
