"""The hooks of a running daemon, put together: which there are, what runs them, what brings them facts."""

import anyio

from ckptd.catalog import Catalog
from ckptd.clock import Clock
from ckptd.config import Settings
from ckptd.events import Bus
from ckptd.hooks import verbs
from ckptd.hooks.registry import Registry
from ckptd.hooks.runner import Runner
from ckptd.hooks.spec import Spec
from ckptd.pipeline.delivery import Delivery


class Hooked:
    """Registry, runner and delivery of one daemon, and the verbs of its plug-ins."""

    def __init__(self, catalog: Catalog, bus: Bus, clock: Clock, settings: Settings) -> None:
        """Read what is configured and installed; run nothing yet. BadConfig lists what can't be."""
        self.registry = Registry.from_settings(settings)
        self.verbs = verbs.from_settings(settings)
        self.delivery = Delivery(catalog, bus, self.registry, clock)
        self.runner = Runner(self.registry, clock, self.delivery.report, settings.hooks_defaults)
        self.delivery.deliverer = self.runner

    async def run(self) -> None:
        """Run until cancelled; then no process of any hook is left."""
        async with anyio.create_task_group() as group:
            await group.start(self.runner.run)
            group.start_soon(self.delivery.run)

    def prepare(self, settings: Settings) -> tuple[Registry, dict[str, Spec]]:
        """Read the hooks of another configuration; nothing changes yet. BadConfig lists what can't be."""
        return Registry.from_settings(settings), verbs.from_settings(settings)

    def adopt(self, prepared: tuple[Registry, dict[str, Spec]]) -> None:
        """Go on with what `prepare` has read. What runs ends as it would have."""
        self.registry, self.verbs = prepared
        self.delivery.follow(self.registry)
        self.runner.adopt(self.registry)
