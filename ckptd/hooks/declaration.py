"""How code says that it is a hook: `@hook`, `register`, `BaseHook`.

Imported by whoever writes hooks; needs nothing of the daemon. What is declared while a module is
imported in a child host is what that module offers.
"""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from ckptd.hooks.context import Context
from ckptd.hooks.points import HookEvent
from ckptd.hooks.spec import Priority

Condition = Callable[[Context], bool]
Function = Callable[..., Any]
F = TypeVar("F", bound=Callable[..., Any])

MARK = "__ckptd_hook__"


class BaseHook:
    """A hook with state: override `execute`, sync or async. One instance lives as long as its host.

    `events` and `name` may be given to the constructor, set on the class, or left to the configuration.
    """

    events: tuple[HookEvent, ...] = ()
    name: str = ""

    def __init__(self, priority: int = Priority.NORMAL, *, events: Iterable[str] = (), name: str = "") -> None:
        """Set what the class does not."""
        self.priority = int(priority)
        self.events = tuple(HookEvent(event) for event in events) or tuple(self.events)
        self.name = name or self.name or type(self).__name__

    def execute(self, context: Context) -> object | Awaitable[object]:
        """Look at the context; return what `ckptd.hooks.result` lists."""
        message = f"{type(self).__name__} does not override execute(self, context)"
        raise NotImplementedError(message)


@dataclass(frozen=True, slots=True)
class Declared:
    """One hook as code declares it. None: left to the configuration."""

    name: str
    call: Callable[..., Any]
    events: tuple[HookEvent, ...] = ()
    priority: int | None = None
    timeout_s: float | None = None
    when: Condition | str | None = None

    def to_wire(self) -> dict[str, Any]:
        """Return what the daemon is told of it."""
        return {
            "name": self.name,
            "events": [str(event) for event in self.events],
            "priority": self.priority,
            "timeout_s": self.timeout_s,
        }


_registered: dict[str, Declared] = {}


def hook(
    *,
    events: Iterable[str],
    name: str = "",
    priority: int | None = None,
    timeout_s: float | None = None,
    when: Condition | str | None = None,
) -> Callable[[F], F]:
    """Declare a function, sync or async, that takes a Context as a hook. ValueError for an unknown event or a name taken.

    `when` is a callable that takes the context, or the text of a safe expression; it is evaluated where the hook runs.
    """
    at = tuple(HookEvent(event) for event in events)

    def declare(function: F) -> F:
        declared = Declared(name or function.__name__, function, at, priority, timeout_s, when)
        _add(declared)
        setattr(function, MARK, declared)
        return function

    return declare


def register(hook_or_name: BaseHook | str, function: Function | None = None, events: Iterable[str] = ()) -> None:
    """Declare `register("name", function, [events])` or `register(SomeHook(...))`.

    ValueError for an unknown event or a name taken, TypeError for anything else.
    """
    at = tuple(HookEvent(event) for event in events)
    if isinstance(hook_or_name, BaseHook):
        _add(of_instance(hook_or_name, at))
    elif isinstance(hook_or_name, str) and callable(function):
        _add(Declared(hook_or_name, function, at))
    else:
        message = 'register takes ("name", function, [events]) or an instance of BaseHook'
        raise TypeError(message)


def registered() -> tuple[Declared, ...]:
    """Everything that was declared in this process, in order."""
    return tuple(_registered.values())


def of_instance(instance: BaseHook, events: tuple[HookEvent, ...] = ()) -> Declared:
    """Return the declaration of an instance. A constructor that forgot `super().__init__()` is forgiven."""
    return Declared(
        name=instance.name or type(instance).__name__,
        call=instance.execute,
        events=events or tuple(HookEvent(event) for event in instance.events),
        priority=getattr(instance, "priority", None),
    )


def _add(declared: Declared) -> None:
    if not declared.name or declared.name in _registered:
        message = f"a hook named {declared.name!r} is registered already; names are unique"
        raise ValueError(message)
    _registered[declared.name] = declared
