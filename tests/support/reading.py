"""Readers of a daemon in this process: one that lives elsewhere, and what is kept for whom."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio

from ckptd.catalog import holds
from ckptd.pipeline import retain
from tests.support.in_process import Node, eventually


@contextmanager
def another_process(short_dir: Path, checkpoint: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that attached to a checkpoint, hung up, and lives."""
    code = (
        "import json,socket,sys\n"
        "s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "for i,m in enumerate([{'op':'hello','versions':[1]},{'op':'attach','selector':sys.argv[2],'read':'ab'*16}]):\n"
        "    s.sendall(json.dumps({'v':1,'id':i,**m}).encode()+b'\\n'); s.recv(1<<16)\n"
        "s.close(); print('closed', flush=True); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code, str(short_dir / "s"), checkpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


async def told(process: "subprocess.Popen[bytes]") -> None:
    """Wait until it has hung up."""
    assert process.stdout is not None
    await anyio.to_thread.run_sync(process.stdout.readline)


async def held(node: Node, checkpoint: str) -> list[str]:
    """Who reads it, as retention sees that."""
    now = node.parts.clock.now()
    return [hold.by for hold in await node.read(lambda conn: holds.of_checkpoint(conn, checkpoint, now))]


async def nobody_holds(node: Node, checkpoint: str) -> None:
    async def let_go() -> bool:
        return not await held(node, checkpoint)

    await eventually(let_go)


def readers(node: Node, checkpoint: str) -> int:
    arena = node.parts.pool.of_checkpoint(checkpoint)
    assert arena is not None
    return arena.readers


async def retire_all_but_one(node: Node, experiment: str) -> None:
    async def idle() -> bool:
        return not await node.parts.jobs.unfinished()

    await eventually(idle)
    rules = type(node.parts.settings.retention)(keep_last=1, trash_grace_s=0, brake_share=1)
    node.parts.admission.current = node.parts.settings.model_copy(update={"retention": rules})
    await retain.apply(node.parts.tools, experiment, rules)
    await eventually(idle)
