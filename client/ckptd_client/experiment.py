"""What a training script holds: one experiment, its saves, loads and metrics."""

import atexit
import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, Dict, List, Optional, Sequence, Type, Union

from ckptd_client import arguments, capture
from ckptd_client.cadence import Cadence
from ckptd_client.errors import Refused, UnsupportedValue
from ckptd_client.handle import Handle
from ckptd_client.late import LateMetrics
from ckptd_client.loader import Loader, Wanted
from ckptd_client.metrics import checked as checked_metrics
from ckptd_client.overflow import SPOOL_BYTES_MAX
from ckptd_client.places import PlaceError, named_place
from ckptd_client.saver import Saver
from ckptd_client.session import OPEN_S, Session
from ckptd_client.spec import OVERLAP_WAIT_S, Spec

CLOSE_S = 30.0

PathLike = Union[str, "os.PathLike[str]"]


class Experiment:
    """One training execution. Thread-safe; after a fork the child has a session of its own.

        run = Experiment("resnet50", project="imagenet", config=cfg, tags=["baseline"], dir="runs")
        state = run.load("latest")
        ...
        run.log({"loss": loss}, step=step)
        run.save({"model": model, "optimizer": optimizer}, step=step, metrics={"val_loss": v})

    With no daemon, a stopped, a hung or a full one, training goes on: saves go to the spool, metrics
    are kept up to a limit, and `stats()` counts both. Only bad arguments raise, as ValueError.

    name, project    1 to 128 printable characters without "/", not beginning with "."
    config           dict, argparse.Namespace, dataclass, or path of a JSON, TOML or YAML file; secrets are masked
    dir              where checkpoints are published: <dir>/<project>/<name>/step_...
    parent           id of the experiment or checkpoint this one grew from
    resume           "allow"; "must" exist already; "never" (NotFound or Refused where a daemon says otherwise)
    on_overlap       an earlier save holds the arenas: "wait" for at most overlap_wait_s, "spool", "skip", or
                     "replace" the oldest save that is not yet being written
    format           "safetensors", or "torch" for states that only pickle can keep
    raise_errors     let errors of a save out of save()
    autostart        start a missing daemon (only at a user's own socket; CKPTD_AUTOSTART=0 forbids it)
    spool_bytes_max  what the spool may hold

    CKPTD_MODE=disabled makes every method a cheap no-op; "offline" never looks for a daemon.
    """

    def __init__(  # noqa: PLR0913 - what a person types once per script
        self,
        name: str,
        project: str = "default",
        config: Any = None,
        tags: Sequence[str] = (),
        dir: PathLike = "runs",  # noqa: A002 - the word that trainers use
        *,
        parent: Optional[str] = None,
        resume: str = "allow",
        on_overlap: str = "wait",
        overlap_wait_s: float = OVERLAP_WAIT_S,
        format: str = "safetensors",  # noqa: A002 - the word everybody uses
        raise_errors: bool = False,
        autostart: bool = True,
        socket: Optional[PathLike] = None,
        spool_bytes_max: int = SPOOL_BYTES_MAX,
    ) -> None:
        """Check the arguments and connect in the background; waits for a daemon only where `resume` asks something of it.

        ValueError         names the field, its value and the rule
        NotFound, Refused  the daemon's answer to resume="must" or "never"
        """
        mode = arguments.mode()
        spool_bytes = arguments.step("spool_bytes_max", spool_bytes_max)
        self._spec = Spec(
            experiment=os.urandom(16).hex(),
            name=arguments.name("name", name),
            project=arguments.name("project", project),
            directory=arguments.path("dir", dir),
            config=capture.config_of(config),
            tags=arguments.tags("tags", tags),
            parent=None if parent is None else arguments.note("parent", parent),
            resume=arguments.choice("resume", resume, arguments.RESUME),
            on_overlap=arguments.choice("on_overlap", on_overlap, arguments.ON_OVERLAP),
            overlap_wait_s=arguments.seconds("overlap_wait_s", overlap_wait_s),
            format=arguments.choice("format", format, arguments.FORMATS),
            raise_errors=arguments.flag("raise_errors", raise_errors),
            autostart=arguments.flag("autostart", autostart),
            socket=None if socket is None else named_place(os.fspath(socket)).path,
            spool_bytes_max=SPOOL_BYTES_MAX if spool_bytes is None else spool_bytes,
            offline=mode == "offline",
        )
        self._lock = threading.Lock()
        self._cadences: List[Cadence] = []
        self._closed = False
        self._disabled = mode == "disabled"
        self._pid = os.getpid()
        if self._disabled:
            return
        self._begin()
        atexit.register(self._at_exit)
        if resume != "allow":
            self._session.wait_open(OPEN_S)
            if self._session.refused is not None:
                atexit.unregister(self._at_exit)
                self._session.connection.close()
                raise self._session.refused

    def _begin(self) -> None:
        try:
            self._session = Session(self._spec)
        except PlaceError as error:  # the environment names a socket that can't be: the spool takes everything
            self._session = Session(self._spec._replace(offline=True))
            self._session.say("socket", "%s; no daemon is used", error)
        self._saver = Saver(self._session)
        self._loader = Loader(self._session)
        self._late = LateMetrics(self._session)

    def _live(self) -> Session:
        """Return this process's session; in a forked child, a new one.

        The parent's is left alone: its threads do not run here, its locks may be held by one of them,
        and its arenas are the parent's to write.
        """
        if self._pid != os.getpid():
            self._session.connection.close()  # only our copies of its descriptors
            self._lock = threading.Lock()
            self._pid = os.getpid()
            self._begin()
        return self._session

    @property
    def id(self) -> str:
        """The experiment's id: as the daemon knows it once it has answered, until then as proposed to it."""
        return self._spec.experiment if self._disabled else self._live().experiment

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._spec.name

    @property
    def project(self) -> str:
        """The project's name."""
        return self._spec.project

    def prepare(self, state: Any, *, wait_s: float = 0.0) -> bool:
        """Have arenas for states like this one leased and filled before the first save; return whether one is ready.

        With wait_s=0 it returns at once and the work is done in the background. Never raises for the
        daemon; UnsupportedValue tells early what a save could not keep.
        """
        if self._disabled:
            return False
        self._live()
        return self._saver.prepare(state, self._spec.format, arguments.seconds("wait_s", wait_s))

    def save(  # noqa: PLR0913 - what a person types once per script
        self,
        state: Any,
        step: Optional[int] = None,
        epoch: Optional[float] = None,
        metrics: Optional[Dict[str, Any]] = None,
        *,
        note: str = "",
        meta: Optional[Dict[str, Any]] = None,
        update_best: bool = True,
        format: Optional[str] = None,  # noqa: A002 - the word everybody uses
        on_overlap: Optional[str] = None,
    ) -> Handle:
        """Save a nested state of tensors, arrays and plain values; objects with state_dict() may be in it as they are.

        Returns when the state is copied: it may change again. Never raises for what can go wrong while
        saving (handle.error and the log say it) unless raise_errors is set, and waits at most
        overlap_wait_s beside the copy itself. A save without a step gets the one after the last.

        ValueError  names the bad argument
        """
        fields = arguments.save_fields(
            {
                "step": step,
                "epoch": epoch,
                "metrics": metrics,
                "note": note,
                "meta": meta,
                "update_best": update_best,
                "format": self._spec.format if format is None else format,
                "on_overlap": self._spec.on_overlap if on_overlap is None else on_overlap,
            }
        )
        checkpoint = os.urandom(16).hex()
        if self._disabled:
            return Handle(checkpoint, fields.step, state="disabled")
        if self._closed:
            return self._refused_after_close(checkpoint, fields.step)
        self._live()
        self._late.tend()
        return self._saver.save(state, fields, checkpoint)

    def submit(self, path: PathLike, step: Optional[int] = None, **fields: Any) -> Handle:
        """Hand over a finished file or directory of this experiment; it stays where it is. Returns at once.

        fields  epoch, metrics, note, meta, update_best as for save

        With 4096 on their way already it waits for room, for at most 5 s; then `handle.error` says "busy".

        ValueError  names the bad argument
        """
        checked = arguments.save_fields(arguments.known_fields({"step": step, **fields}))
        absolute = arguments.path("path", path)
        checkpoint = os.urandom(16).hex()
        if self._disabled:
            return Handle(checkpoint, checked.step, state="disabled")
        if self._closed:
            return self._refused_after_close(checkpoint, checked.step)
        session = self._live()
        session.note_step(checked.step)
        names: Dict[str, Optional[str]] = {"project": self._spec.project, "experiment": self._spec.name}
        return session.offers.add(absolute, checked, names, checkpoint)

    def log(self, metrics: Dict[str, Any], step: Optional[int] = None) -> None:
        """Record one point per metric. Takes microseconds, never waits; NaN and infinities are kept.

        ValueError  names the bad argument
        """
        if self._disabled:
            return
        if not isinstance(metrics, dict):
            raise arguments.bad("metrics", metrics, "must be a dict of numbers")
        whole = step if type(step) is int and step >= 0 else arguments.step("step", step)
        session = self._live()
        session.note_step(whole)
        if session.metrics.log(metrics, whole):
            session.poke()

    def measured(self, checkpoint: Union[Handle, str], metrics: Dict[str, Any]) -> None:
        """Say what was measured of a checkpoint after its save, such as when its validation has ended. Returns at once.

        What is best is decided again before any rule can retire it. With no daemon it waits for the next save,
        flush or close; what is left then is lost.

        checkpoint  the handle that save() returned, or an id

        ValueError  names the bad argument
        """
        found, values = arguments.checkpoint_id("checkpoint", checkpoint), checked_metrics(metrics)
        if values and not self._disabled:
            self._live()
            self._late.put(found, values)

    def load(
        self,
        selector: Union[str, int] = "latest",
        into: Any = None,
        keys: Optional[Sequence[str]] = None,
        *,
        fallback: bool = False,
        verify: bool = True,
    ) -> Any:
        """Load a checkpoint; None when the newest or best is asked for and there is none yet.

        selector  "latest" (newest verified), "best", "best:RULE", "best:METRIC", a step, or an id
        into      a state of the same structure to fill in place
        keys      only these top-level keys
        fallback  take the next good checkpoint when this one is damaged
        verify    compare every byte read with its recorded digest

        Blocks for the reading. Memory for the saves to come is prepared in the background.

        NotFound           a step or id that is not there       CorruptCheckpoint  damaged; `newest_good` is whole
        StateMismatch      `into` does not fit: nothing changed  Unavailable        only a daemon could answer
        Refused            a hook of the daemon forbids it ("vetoed"), or no rule says what is best ("unknown_rule")
        """
        wanted = Wanted(arguments.selector(selector), into, keys, fallback=fallback, verify=verify)
        if self._disabled:
            return None
        self._live()
        state = self._loader.load(wanted)
        if state is not None and keys is None:
            self._prepare_quietly(state)
        return state

    def path(self, selector: Union[str, int] = "latest") -> Optional[str]:
        """Return the directory of a checkpoint, None when there is none (yet). Blocks for one round trip."""
        checked = arguments.selector(selector)
        if self._disabled:
            return None
        self._live()
        return self._loader.path(checked)

    def tag(self, *tags: str, remove: Sequence[str] = ()) -> None:
        """Add tags to the experiment and remove some. Returns at once; logged when no daemon is there to note it."""
        add, gone = arguments.tags("tags", tags), arguments.tags("remove", remove)
        if self._disabled:
            return
        session = self._live()
        kept = [tag for tag in self._spec.tags if tag not in gone]
        self._spec = session.spec = self._spec._replace(tags=list(dict.fromkeys([*kept, *add])))
        if not session.tell("experiment.tag", add=add, remove=gone):
            session.say("tag", "no daemon is there to note a change of tags; the next save carries them")

    def capture(self, optimizer: Any) -> Dict[str, Any]:
        """Add an optimizer's class and hyper-parameters to the config that later saves carry; return them.

        ValueError  it has no param_groups
        """
        found = capture.optimizer_config(optimizer)
        if not self._disabled:
            session = self._live()
            config = {**self._spec.config, "optimizer": found}
            self._spec = session.spec = self._spec._replace(config=config)
        return found

    def every(
        self, *, steps: Optional[int] = None, seconds: Optional[float] = None, epochs: Optional[int] = None
    ) -> Cadence:
        """Return a Cadence that says when a save is due; what it lets pass is counted in `stats()`."""
        cadence = Cadence(steps=steps, seconds=seconds, epochs=epochs)
        self._cadences.append(cadence)
        return cadence

    def stats(self) -> Dict[str, Any]:
        """Return this process's counters: saves, staged, spooled, skipped, failed, in_flight, metrics_*, connected."""
        found: Dict[str, Any] = {"saves": 0} if self._disabled else self._live().stats()
        return {**found, "not_due": sum(cadence.skipped_count for cadence in self._cadences)}

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until everything handed over so far is with a daemon or in the spool.

        False when time ran out, when metrics wait for a daemon that is away, and when something was refused, or taken
        by neither, since the last flush: a save, or metrics that came faster than they could leave.
        Blocks for at most `timeout_s`, or for one write to the spool where no thread can be started for it.
        """
        if self._disabled:
            return True
        deadline_s = time.monotonic() + arguments.seconds("timeout_s", timeout_s)
        safe = self._live().flush(timeout_s)
        return self._late.settle(deadline_s) and safe

    def close(self, status: str = "completed", error: Optional[str] = None, *, timeout_s: float = CLOSE_S) -> None:
        """Flush and end the experiment as "completed" or "failed". Idempotent; later saves are refused.

        Blocks for at most `timeout_s`. Handles go on climbing, and can still be waited for.
        """
        arguments.choice("status", status, arguments.STATUSES)
        if self._disabled or self._was_closed():
            return
        session = self._live()
        atexit.unregister(self._at_exit)
        deadline_s = time.monotonic() + arguments.seconds("timeout_s", timeout_s)
        self._late.settle(deadline_s)
        session.end(status, error, max(0.0, deadline_s - time.monotonic()))

    def _was_closed(self) -> bool:
        """Close it for everybody but the first who asks."""
        with self._lock:
            before, self._closed = self._closed, True
            return before

    def __enter__(self) -> "Experiment":  # noqa: PYI034 - typing.Self came with Python 3.11
        """Return the experiment itself."""
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], _trace: Optional[TracebackType]
    ) -> None:
        """Close it: failed when an exception leaves the block."""
        if kind is None:
            self.close("completed")
        else:
            self.close("failed", f"{kind.__name__}: {error}"[:1000])

    def _at_exit(self) -> None:
        """The script ended without close(): bring everything to safety and say how it ended, as far as that is known."""
        if self._pid != os.getpid() or self._closed:
            return  # a forked child that never used it has nothing of its own to flush
        failure = getattr(sys, "last_value", None)
        if failure is None:
            self.close("completed")
        else:
            self.close("failed", f"{type(failure).__name__}: {failure}"[:1000])

    def _prepare_quietly(self, state: Any) -> None:
        try:
            self._saver.prepare(state, self._spec.format, 0.0)
        except (UnsupportedValue, ValueError) as error:
            self._session.say("prepare", "memory for saves could not be prepared from what was loaded: %s", error)

    def _refused_after_close(self, checkpoint: str, step: Optional[int]) -> Handle:
        handle = Handle(checkpoint, step)
        handle.fail(Refused("closed", f"experiment {self._spec.project}/{self._spec.name} is closed"))
        return handle
