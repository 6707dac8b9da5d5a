"""Which hooks there are, and in which order they run.

Built from the configuration, from installed packages (entry point group `ckptd.hooks`) and from the
hooks that ckptd brings. No foreign module is imported here: what a Python hook says of itself is
learned from its child host, later, by `declare`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from ckptd.config import HookEntry, HooksDefaults, Settings
from ckptd.errors import BadConfig, NotFound
from ckptd.hooks import accept
from ckptd.hooks.builtin import BUILTINS
from ckptd.hooks.points import HookEvent
from ckptd.hooks.spec import Kind, Priority, Spec

GROUP = "ckptd.hooks"
HOOKS_MAX = 1000


class Registry:
    """The hooks. For the event loop's thread only."""

    def __init__(self, specs: Sequence[Spec] = (), *, enabled: bool = True) -> None:
        """Know `specs`, in this order. BadConfig for one that can't be."""
        self.enabled = enabled
        self._said: dict[str, bool] = {}
        self._specs: dict[str, Spec] = {}
        self._at: dict[str, tuple[Spec, ...]] = {}
        for spec in specs:
            self.add(spec)

    @classmethod
    def from_settings(cls, settings: Settings) -> "Registry":
        """Return the hooks of a configuration and of the installed packages it admits. BadConfig lists every error.

        Reads the metadata of installed packages: some milliseconds of file access, none of it under a storage root.
        """
        defaults = settings.hooks_defaults
        registry = cls(enabled=defaults.enabled)
        problems: list[str] = []
        for number, entry in enumerate(settings.hooks, 1):
            try:
                registry.add(_of_entry(entry, defaults))
            except BadConfig as error:
                problems.append(f"hooks[{number}]: {error.message}")
        for spec in _installed(defaults) if defaults.entry_points else ():
            try:
                registry.add(spec)
            except BadConfig as error:
                problems.append(error.message)
        if problems:
            raise BadConfig("; ".join(problems), problems=problems)
        return registry

    def add(self, spec: Spec) -> None:
        """Know one more, after those that are known. BadConfig for a name taken or a hook that can't be."""
        if spec.name in self._specs:
            other = self._specs[spec.name]
            message = (
                f"two hooks are named {spec.name!r}: {other.target} ({other.source}) and {spec.target} ({spec.source})"
            )
            raise BadConfig(message, hint="give each a name of its own")
        if len(self._specs) >= HOOKS_MAX:
            raise BadConfig(f"over {HOOKS_MAX} hooks")
        accept.check(spec)
        self._put({**self._specs, spec.name: spec})

    def __iter__(self) -> Iterator[Spec]:
        """Give every hook, in order of registration, those that don't run included."""
        return iter(tuple(self._specs.values()))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._specs)

    def get(self, name: str) -> Spec:
        """Return one. NotFound when there is none of this name."""
        try:
            return self._specs[name]
        except KeyError:
            raise NotFound(f"there is no hook named {name!r}", hint="`ckpt hooks list` names them") from None

    def of(self, event: str) -> tuple[Spec, ...]:
        """Return the hooks that run at a point, in order: by priority, then by registration. A dictionary look-up."""
        return self._at.get(event, ()) if self.enabled else ()

    def obey(self, said: Mapping[str, bool]) -> None:
        """Have these hooks run, or not, whatever the configuration says; also those that are declared later."""
        self._said |= said
        self._put(self._specs)

    def enable(self, name: str) -> Spec:
        """Let a hook run from now on. NotFound when there is none of this name."""
        return self._switch(name, enabled=True)

    def disable(self, name: str) -> Spec:
        """Let a hook rest until it is enabled; what runs now is not ended. NotFound when there is none of this name."""
        return self._switch(name, enabled=False)

    @property
    def undeclared(self) -> tuple[Spec, ...]:
        """The Python hooks that are to run and whose code was not asked yet what it is."""
        runs = [spec for spec in self if spec.enabled] if self.enabled else []
        return tuple(spec for spec in runs if spec.kind is Kind.PYTHON and "declared" not in spec.given)

    def fail(self, name: str, problem: str) -> Spec:
        """Record why a hook can't run. It stays listed. NotFound when there is none of this name."""
        spec = self.get(name)
        return self._change(name, problem=problem, given=spec.given | {"declared"})

    def mend(self, name: str) -> Spec:
        """Take a hook's problem away, to find out whether it is still there. NotFound when there is none of this name."""
        return self._change(name, problem="", given=self.get(name).given - {"declared"})

    def declare(self, name: str, found: Sequence[Mapping[str, Any]]) -> tuple[Spec, ...]:
        """Fill in what a Python hook's own code says: `Declared.to_wire()` of each hook it offers.

        A target of "module" alone may offer several: they take its place as "name.theirs". What the configuration
        set stays. A hook that can't be stays listed with its problem. NotFound when there is none of this name.
        """
        spec = self.get(name)
        told = tuple(_declared(spec, wire) for wire in found)
        checked = tuple(_checked(each) for each in told) or (replace(spec, problem="its module declares no hook"),)
        others = {key: value for key, value in self._specs.items() if key != name}
        order: dict[str, Spec] = {}
        for key, value in self._specs.items():
            if key != name:
                order[key] = value
                continue
            for each in checked:
                if each.name in others or each.name in order:
                    order[name] = replace(spec, problem=f"its hook {each.name!r} has a name that is taken")
                else:
                    order[each.name] = replace(each, given=each.given | {"declared"})
        self._put(order)
        return checked

    def _change(self, name: str, **changes: Any) -> Spec:
        changed = replace(self.get(name), **changes)
        self._put({**self._specs, name: changed})
        return changed

    def _switch(self, name: str, *, enabled: bool) -> Spec:
        self.get(name)
        self.obey({name: enabled})
        return self.get(name)

    def _put(self, specs: dict[str, Spec]) -> None:
        for name, said in self._said.items():
            if name in specs and specs[name].enabled is not said:
                specs = {**specs, name: replace(specs[name], enabled=said)}
        self._specs = specs
        runs = [spec for spec in specs.values() if spec.enabled and not spec.problem]
        ordered = sorted(runs, key=lambda spec: spec.priority)  # stable: ties stay in order of registration
        self._at = {event: tuple(spec for spec in ordered if event in spec.events) for event in HookEvent}


def _of_entry(entry: HookEntry, defaults: HooksDefaults) -> Spec:
    """Return the hook of one [[hooks]] entry. BadConfig where it names what there is not."""
    if entry.builtin:
        spec = _of_builtin(entry, defaults)
    else:
        kind, target = _target(entry)
        spec = Spec(
            name=entry.name or target,
            kind=kind,
            target=target,
            arguments=entry.exec[1:],
            timeout_s=defaults.timeout_s,
            memory_bytes_max=defaults.memory_bytes_max,
        )
    given = {key for key in ("events", "timeout_s", "memory_bytes_max") if getattr(entry, key)}
    changes: dict[str, Any] = {key: getattr(entry, key) for key in given if key != "events"}
    given |= spec.given
    if entry.memory_bytes_max == 0:
        changes["memory_bytes_max"] = 0
    if entry.events:
        changes["events"] = accept.events(entry.events, spec.name)
    if entry.priority is not None:
        given.add("priority")
        changes["priority"] = Priority[entry.priority.upper()] if isinstance(entry.priority, str) else entry.priority
    return replace(
        spec,
        **changes,
        condition=entry.when,
        enabled=entry.enabled,
        options=dict(entry.options),
        import_path=tuple(str(path) for path in entry.import_path),
        environment=dict(entry.environment),
        given=frozenset(given),
    )


def _target(entry: HookEntry) -> tuple[Kind, str]:
    if entry.python:
        return Kind.PYTHON, entry.python
    if entry.exec:
        return Kind.EXEC, entry.exec[0]
    return (Kind.WEBHOOK, entry.url) if entry.url else (Kind.MAIL, entry.mail)


def _of_builtin(entry: HookEntry, defaults: HooksDefaults) -> Spec:
    found = BUILTINS.get(entry.builtin)
    if found is None:
        known = ", ".join(sorted(BUILTINS)) or "none"
        raise BadConfig(f"there is no built-in hook {entry.builtin!r}; there are: {known}")
    return Spec(
        name=entry.name or found.name,
        kind=found.kind,
        target=found.target,
        events=found.events,
        priority=found.priority,
        timeout_s=found.timeout_s or defaults.timeout_s,
        memory_bytes_max=defaults.memory_bytes_max,
        source="built-in",
        given=frozenset({"priority"}),  # of the table: what its class says of itself is any hook's default
    )


def _installed(defaults: HooksDefaults) -> list[Spec]:
    """Return the hooks of installed packages, by name, so that their order does not depend on the file system."""
    return [
        Spec(
            name=point.name,
            kind=Kind.PYTHON,
            target=point.value,
            timeout_s=defaults.timeout_s,
            memory_bytes_max=defaults.memory_bytes_max,
            source="entry point",
        )
        for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    ]


def _declared(spec: Spec, wire: Mapping[str, Any]) -> Spec:
    """Return the hook with what its code says where the configuration says nothing."""
    changes: dict[str, Any] = {}
    if "events" not in spec.given and wire["events"]:
        changes["events"] = tuple(HookEvent(event) for event in wire["events"])
    for key in ("priority", "timeout_s"):
        if key not in spec.given and wire[key] is not None:
            changes[key] = wire[key]
    if ":" not in spec.target:
        changes |= {"name": f"{spec.name}.{wire['name']}", "target": f"{spec.target}:@{wire['name']}"}
    return replace(spec, **changes)


def _checked(spec: Spec) -> Spec:
    """Return the hook, with its problem when it can't be."""
    if not spec.events:
        return replace(spec, problem="neither its code nor the configuration says at which events it runs")
    try:
        accept.check(spec)
    except BadConfig as error:
        return replace(spec, problem=error.message)
    return spec
