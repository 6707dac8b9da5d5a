"""The process that a Python hook's code runs in: imports it once, then calls it for each line it is sent.

Forked by host.py, which watches it, kills it and forks another. One question a line on the channel, one
answer a line. Whatever the code does to this process is its own loss.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from ckptd.hooks import condition, declaration, foreign
from ckptd.hooks.context import Context
from ckptd.hooks.declaration import MARK, BaseHook, Declared
from ckptd.hooks.result import TEXT_CHARS_MAX, understand

ANSWER_BYTES_MAX = 256 << 10


def live(channel: socket.socket, setup: Mapping[str, Any]) -> NoReturn:
    """Import, say what there is, answer until the channel ends; the process ends with it."""
    me = os.getpid()
    try:
        offered = load(setup)
        ready: dict[str, Any] = {"ready": [declared.to_wire() for declared in offered]}
    except BaseException as error:  # noqa: BLE001, ASYNC103 - sys.exit at import is the module's problem as any other
        traceback.print_exc()
        offered, ready = (), {"problem": _told(error)}
    _say(channel, ready)
    with channel.makefile("rb") as questions:
        for line in questions:
            answer = _answer(offered, json.loads(line)) if len(offered) == 1 else {"error": "which hook is not said"}
            if os.getpid() != me:  # the code forked, and this is its child, which must not answer
                os._exit(0)
            _say(channel, answer)
            if answer.get("spent"):
                break
    os._exit(0)


def load(setup: Mapping[str, Any]) -> tuple[Declared, ...]:
    """Import the module of the target; return the hooks it means. Any exception at all."""
    sys.path[:0] = setup["import_path"]
    module, _, path = str(setup["target"]).partition(":")
    _check_source(module, setup["import_path"])
    before = {declared.name for declared in declaration.registered()}
    imported = importlib.import_module(module)
    every = [declared for declared in declaration.registered() if declared.name not in before]
    options = dict(setup["options"])
    if not path:
        return tuple(_whole(declared, options) for declared in every)
    if path.startswith("@"):
        found = [declared for declared in every if declared.name == path[1:]]
        if not found:
            message = f"{module} registers no hook named {path[1:]!r}"
            raise LookupError(message)
        return (_whole(found[0], options),)
    target: Any = imported
    for part in path.split("."):
        target = getattr(target, part)
    return (_of_object(target, path, options),)


def _check_source(module: str, import_path: list[str]) -> None:
    """PermissionError when others could change what is about to be imported."""
    found = importlib.util.find_spec(module.partition(".")[0])
    origin = found.origin if found is not None else None
    for place in [*import_path, *([origin] if origin and os.path.isabs(origin) else [])]:
        why = foreign.why_not(place)
        if why:
            raise PermissionError(why)


def _of_object(target: Any, name: str, options: dict[str, Any]) -> Declared:
    """Return the declaration of what a target names: a hook class or instance, or something to call."""
    marked = target.__dict__.get(MARK) if hasattr(target, "__dict__") else None
    if isinstance(marked, Declared):
        return _whole(marked, options)
    if isinstance(target, BaseHook):
        return declaration.of_instance(target)
    if isinstance(target, type) and issubclass(target, BaseHook):
        return declaration.of_instance(target(**options))
    if callable(target):
        return _whole(Declared(name, target), options)
    message = f"{name} is a {type(target).__name__}: a hook is a function, or a class or instance of BaseHook"
    raise TypeError(message)


def _whole(declared: Declared, options: dict[str, Any]) -> Declared:
    """Return a declaration with something to call in it: a class made, options bound."""
    call, priority = declared.call, declared.priority
    if isinstance(call, type) and issubclass(call, BaseHook):
        made = call(**options)
        call, priority = made.execute, made.priority if priority is None else priority
    elif options:
        call = partial(call, **options)
    return Declared(declared.name, call, declared.events, priority, declared.timeout_s, declared.when)


def _answer(offered: tuple[Declared, ...], question: Mapping[str, Any]) -> dict[str, Any]:
    (declared,) = offered
    context = Context.from_wire(question)
    try:
        when = declared.when
        if when is not None and not (condition.parse(when) if isinstance(when, str) else when)(context):
            return {"skipped": True}
        returned = declared.call(context)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_awaited(returned))
        answer: dict[str, Any] = {"answer": understand(returned).to_wire()}
        if len(json.dumps(answer)) > ANSWER_BYTES_MAX:
            answer = {"error": f"its findings take over {ANSWER_BYTES_MAX} bytes"}
    except BaseException as error:  # noqa: BLE001, ASYNC103 - sys.exit ends the call; nothing here is cancelled
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        answer = {"error": _told(error), "spent": isinstance(error, MemoryError)}
    return answer


async def _awaited(returned: Any) -> Any:
    return await returned


def _told(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r})"
    return f"{type(error).__name__}: {error}"[:TEXT_CHARS_MAX]


def _say(channel: socket.socket, answer: Mapping[str, Any]) -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    channel.sendall(json.dumps(answer).encode() + b"\n")
