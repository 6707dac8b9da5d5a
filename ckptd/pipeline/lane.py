"""One hook's way through the event log: how far it is, and what came of its runs that is not written down yet."""

from collections import deque
from dataclasses import dataclass, field

import anyio

from ckptd.catalog import hookruns
from ckptd.catalog.hookruns import Found, Progress, Ran
from ckptd.hooks.context import Context
from ckptd.hooks.result import Run

LIVE_MAX = 256  # unlogged events that wait for one hook; the oldest go first
DETAIL_CHARS_MAX = 4000
ABOUT_HOOKS = "hook."  # what a hook finds about a finding is kept and not told: two of them could go on for ever
OPENED_MAX = 16  # rests of one hook that wait to be told


@dataclass(eq=False, slots=True)
class Lane:
    """One hook's way through the log."""

    name: str
    no: int
    read: int  # everything up to here was looked at
    written: int  # and up to here it is committed
    more: anyio.Event = field(default_factory=anyio.Event)
    live: deque[Context] = field(default_factory=lambda: deque(maxlen=LIVE_MAX))
    runs: list[Ran] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    changed: bool = False
    busy: bool = True  # until it has looked: what happened while no daemon ran may wait for it
    asking: bool = False  # its code is being asked where it runs; until then nothing passes
    relays: bool = False  # it is the built-in that may tell of findings, and never looks at its own
    behind: bool = False  # `_recent` lacks what it wants: nobody knew that it is wanted
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    def note(self, run: Run, context: Context) -> None:
        """Keep what came of a run until it is written down; the oldest give way when that takes long."""
        self.counts[run.outcome] = self.counts.get(run.outcome, 0) + 1
        self.changed = True
        detail = run.error if not run.output else f"{run.error}\n{run.output}".strip()
        self.runs.append(
            Ran(
                at=run.at,
                event=context.event,
                key=context.key,
                outcome=str(run.outcome),
                ms=round(run.duration_s * 1000, 3),
                experiment_id=context.experiment_id,
                checkpoint_id=context.checkpoint_id,
                detail=detail[:DETAIL_CHARS_MAX],
            )
        )
        del self.runs[: -hookruns.RUNS_KEPT_MAX]
        if run.opened:
            self.opened = [*self.opened, run.error][-OPENED_MAX:]
        silent = context.event.startswith(ABOUT_HOOKS) and not self.relays
        about = {"experiment_id": context.experiment_id, "checkpoint_id": context.checkpoint_id, "silent": silent}
        self.found += [
            Found(at=run.at, level=str(one.level), text=one.text, facts=dict(one.facts), **about)  # type: ignore[arg-type]
            for one in run.findings
        ]
        del self.found[: -hookruns.RUNS_KEPT_MAX]

    def progress(self, cursor: int | None) -> Progress:
        """Return what is to be written down; `cursor` None: it stays where it is."""
        return Progress(
            no=self.no,
            name=self.name,
            cursor=cursor,
            counts=dict(self.counts),
            runs=self.runs,
            opened=self.opened,
            findings=self.found,
        )
