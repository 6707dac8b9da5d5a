"""Hooks: other people's code at named points, where it can neither stop nor delay what it watches.

What writers of hooks need is importable from here. `registry.py` knows which hooks there are and in
which order, `runner.py` runs them, `host.py` is the child process that foreign code runs in.
"""

from ckptd.hooks.context import Context
from ckptd.hooks.declaration import BaseHook, hook, register
from ckptd.hooks.points import POINTS, HookEvent
from ckptd.hooks.result import Finding, Level, Veto
from ckptd.hooks.spec import Priority

__all__ = [
    "POINTS",
    "BaseHook",
    "Context",
    "Finding",
    "HookEvent",
    "Level",
    "Priority",
    "Veto",
    "hook",
    "register",
]
