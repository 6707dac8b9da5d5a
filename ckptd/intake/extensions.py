"""Hooks and what they live on, put together for the daemon: facts of the daemon itself, loads, thresholds.

Built first, because much else needs it; `loads` and `attend` come when there is what they look at.
"""

import os
from collections.abc import Callable
from functools import partial

import anyio

from ckptd import __version__
from ckptd.catalog import Catalog
from ckptd.clock import Clock
from ckptd.config import Settings
from ckptd.events import Bus, Event
from ckptd.intake.alarm import announce
from ckptd.intake.facts import Facts
from ckptd.intake.fields import Request
from ckptd.intake.hooking import Hooking
from ckptd.intake.loads import Loads
from ckptd.intake.thresholds import Thresholds
from ckptd.intake.training import Front, Handler
from ckptd.pipeline.hooked import Hooked
from ckptd.pipeline.tools import Tools


class Extensions:
    """Made once. `facts` takes what happens to the daemon, `hooked` has the hooks, `thresholds` looks at metrics."""

    def __init__(self, catalog: Catalog, bus: Bus, clock: Clock, settings: Settings) -> None:
        """Read which hooks there are. BadConfig lists what can't be."""
        self._settings: Callable[[], Settings] = lambda: settings
        self._clock = clock
        self.facts = Facts(catalog, partial(announce, bus))
        self.hooked = Hooked(catalog, bus, clock, settings)
        self.thresholds = Thresholds(self.current, clock)
        self.handlers: dict[type[Request], Handler] = {}

    def current(self) -> Settings:
        """Return the settings of now."""
        return self._settings()

    def follow(self, settings: Callable[[], Settings]) -> None:
        """Ask `settings` from now on, so that a reload reaches everything."""
        self._settings = settings

    def loads(self, tools: Tools) -> Loads:
        """Return the gate before loads, and answer what readers say."""
        found = Loads(tools)
        self.handlers |= found.handlers
        return found

    def attend(self, front: Front) -> None:
        """Answer requests about hooks."""
        self.handlers |= Hooking(front, self.hooked).handlers

    async def run(self) -> None:
        """Run hooks and commit facts until cancelled."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.facts.run)
            group.start_soon(self.hooked.run)

    def started(self) -> None:
        """Say that the daemon serves."""
        self.facts.tell(Event("daemon.started", self._clock.now(), data={"pid": os.getpid(), "version": __version__}))

    def stopping(self, drain_s: float) -> None:
        """Say that the daemon was told to stop."""
        self.facts.tell(Event("daemon.stopping", self._clock.now(), data={"pid": os.getpid(), "drain_s": drain_s}))
