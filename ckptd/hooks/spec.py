"""One hook as configured: what it is, when it runs, and under which limits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

from ckptd.hooks.points import HookEvent

NAME_CHARS_MAX = 100


class Priority(IntEnum):
    """Smaller runs earlier; any int between is fine. From BACKGROUND on nothing ever waits for the hook."""

    CRITICAL = 0
    HIGH = 10
    NORMAL = 50
    LOW = 90
    BACKGROUND = 100


class Kind(StrEnum):
    """Where and how it runs."""

    PYTHON = "python"  # module:object, in a child host
    INPROCESS = "inprocess"  # built-in, metadata only, awaited in the daemon
    EXEC = "exec"  # a program, JSON on its stdin
    WEBHOOK = "webhook"
    MAIL = "mail"


ASKABLE = frozenset({Kind.PYTHON, Kind.INPROCESS, Kind.EXEC})  # the others tell; they never answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A hook.

    name              unique
    target            python, inprocess: "module:object"; exec: the program's absolute path; webhook: its URL;
                      mail: "smtp://host:port" or "smtps://host:port"
    arguments         of the program
    events            where it runs; empty: not known yet, its own declaration says so (python only)
    priority          smaller earlier; ties in order of registration
    condition         safe expression (ckptd.hooks.condition); "" always
    timeout_s         of one run (webhook and mail: of one attempt)
    memory_bytes_max  python and exec: writable memory of each process, resident memory of all of them; 0 no limit
    options           python, inprocess: keyword arguments of the class or function; webhook, mail: their settings
    import_path       directories that go before sys.path in the child host
    environment       variables beside the cleaned environment
    given             names of the fields that the configuration set; the code's own declaration fills the others
    source            where it comes from: "configuration", "entry point", "built-in" or "registered"
    problem           why it can't run (its module does not import, ...); "" when it can
    """

    name: str
    kind: Kind
    target: str
    arguments: tuple[str, ...] = ()
    events: tuple[HookEvent, ...] = ()
    priority: int = Priority.NORMAL
    condition: str = ""
    timeout_s: float = 10.0
    memory_bytes_max: int = 0
    enabled: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    import_path: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    source: str = "configuration"
    problem: str = ""

    @property
    def in_background(self) -> bool:
        """Whether nothing ever waits for it."""
        return self.priority >= Priority.BACKGROUND


@dataclass(frozen=True, slots=True, kw_only=True)
class Builtin:
    """A hook that ckptd brings; `ckptd.hooks.builtin.BUILTINS` lists them by name.

    kind     INPROCESS: metadata only, in the daemon; PYTHON: it opens files, so it runs in a child host
    target   "module:object" below ckptd.hooks.builtin; a BaseHook class gets the entry's options as keyword arguments
    """

    name: str
    kind: Kind
    target: str
    events: tuple[HookEvent, ...]
    meaning: str
    priority: int = Priority.NORMAL
    timeout_s: float | None = None  # None: what [hooks_defaults] says
