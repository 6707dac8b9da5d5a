"""Hooks that misbehave in every way a child host must survive. Imported in child hosts only."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ckptd.hooks import BaseHook, Finding, HookEvent, Level, Veto, hook, register


def fine(context):
    return True


def told(context, *, path):
    with Path(path).open("a") as file:
        file.write(f"{context.event} {context.key} {context.experiment_id}\n")


def raises(context):
    message = "on purpose"
    raise LookupError(message)


def exits(context):
    sys.exit(3)


def exits_hard(context):
    os._exit(4)


def segfaults(context):
    ctypes.string_at(0)


def eats(context):
    hoard = []
    while True:
        hoard.append(bytearray(64 << 20))


def sleeps(context, seconds=60.0):
    time.sleep(seconds)


def sleeps_after_the_fact(context):
    if "before" not in context.event:
        time.sleep(60)


def is_stubborn(context):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(60)


def forks_twice(context, *, path):
    """Leave a grandchild in a session of its own behind, then hang."""
    _leave_grandchild(path)
    time.sleep(60)


def leaves(context, *, path):
    """The same, but return at once."""
    _leave_grandchild(path)


def _leave_grandchild(path):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path(path).write_text(str(os.getpid()))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
            os._exit(0)
        os._exit(0)
    os.wait()
    while not Path(path).exists() or not Path(path).read_text():
        time.sleep(0.01)


def forks_and_returns_twice(context):
    """The child returns from the hook as well, and first; it must not be heard."""
    pid = os.fork()
    if pid == 0:
        return Veto("the child speaks")
    os.waitpid(pid, 0)
    return None


def crowds(context):
    for _ in range(40):
        subprocess.Popen(["sleep", "60"])
    time.sleep(60)


def floods(context, megabytes=100):
    block = b"x" * (1 << 20)
    for _ in range(megabytes):
        sys.stdout.buffer.write(block)
    print("the end")


def stops_its_host(context):
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(60)


def kills_its_host(context):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def vetoes(context):
    return Veto(f"no {context.data.get('loss')}")


def refuses(context):
    return False


def finds(context):
    print("looked")
    return [Finding(Level.WARNING, "norm doubled", {"tensor": "w", "ratio": 2.0}), True]


def returns_nonsense(context):
    return {"continue": False}


async def waits(context):
    await asyncio.sleep(0.01)
    return Veto("asynchronously")


async def waits_forever(context):
    await asyncio.sleep(60)


def environment(context):
    return Finding(
        Level.INFO, os.getcwd(), {"environ": dict(os.environ), "nan": context.data["loss"] != context.data["loss"]}
    )


class Counting(BaseHook):
    events = (HookEvent.AFTER_CHECKPOINT_SAVE,)

    def __init__(self, start=0, priority=10):
        super().__init__(priority)
        self.count = start

    def execute(self, context):
        self.count += 1
        return Finding(Level.INFO, str(self.count))


@hook(
    events=[HookEvent.BEFORE_CHECKPOINT_SAVE],
    priority=5,
    timeout_s=20.0,
    when=lambda context: context.data.get("loss", 0) > 1,
)
def picky(context):
    return Veto("over one")


@hook(events=["checkpoint.published"], when="data.step == 7")
def seventh(context):
    return Finding(Level.INFO, "seventh")


register("logger", fine, [HookEvent.BEFORE_CHECKPOINT_SAVE])
register(Counting(start=10))
