"""Built-in hooks that only look at the context: called in the daemon itself, where a call costs microseconds.

Nothing foreign ever runs here: accept.py admits only what lies below ckptd.hooks.builtin.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import anyio

from ckptd.errors import BadConfig
from ckptd.hooks.context import Context
from ckptd.hooks.declaration import BaseHook
from ckptd.hooks.registry import Registry
from ckptd.hooks.result import TEXT_CHARS_MAX, Outcome, Run, understand
from ckptd.hooks.spec import Kind, Spec


class Built:
    """The built-in hooks in use, each with its state. Made once, at the first call or by `build`."""

    def __init__(self) -> None:
        """Nothing is built."""
        self._calls: dict[str, tuple[Spec, Callable[[Context], Any]]] = {}

    def build(self, spec: Spec) -> Callable[[Context], Any]:
        """Return what to call. BadConfig when the entry's options don't fit."""
        known = self._calls.get(spec.name)
        if known is not None and _same(known[0], spec):
            return known[1]
        module, _, path = spec.target.partition(":")
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        call: Callable[[Context], Any]
        try:
            if isinstance(found, type) and issubclass(found, BaseHook):
                call = found(**spec.options).execute
            else:
                call = partial(found, **spec.options)
                inspect.signature(call).bind(None)
        except (TypeError, ValueError) as error:
            raise BadConfig(f"hook {spec.name!r}: options: {error}") from error
        self._calls[spec.name] = (spec, call)
        return call

    def keep(self, registry: Registry) -> None:
        """Forget the state of hooks that are gone or changed."""
        stays = {spec.name: spec for spec in registry if spec.kind is Kind.INPROCESS}
        for name, (spec, _) in list(self._calls.items()):
            if name not in stays or not _same(stays[name], spec):
                del self._calls[name]

    async def call(self, run: Run, context: Context, spec: Spec) -> Run:
        """Return the run as it ended. An async hook is cancelled at its timeout; a plain one must be quick by itself."""
        try:
            with anyio.fail_after(spec.timeout_s):
                returned = self.build(spec)(context)
                if inspect.isawaitable(returned):
                    returned = await returned
            answer = understand(returned)
        except TimeoutError:
            return replace(run, outcome=Outcome.TIMEOUT, error=f"cancelled after {spec.timeout_s:g} s")
        except BadConfig as error:
            return replace(run, outcome=Outcome.FAILED, error=error.message)
        except Exception as error:  # noqa: BLE001 - whatever a hook raises is the hook's failure, nobody else's
            return replace(run, outcome=Outcome.FAILED, error=f"{type(error).__name__}: {error}"[:TEXT_CHARS_MAX])
        if answer.veto is not None:
            return replace(run, outcome=Outcome.VETOED, error=answer.veto.why, findings=answer.findings)
        return replace(run, findings=answer.findings)


def _same(one: Spec, other: Spec) -> bool:
    return (one.target, one.options) == (other.target, other.options)
