"""A whole life: saves wait in the spool, a daemon takes them in, publishes, links, retires and purges them.

The daemon's own parts run here with a real catalog, one stage after the other; only the I/O workers'
verbs are called in this process, so that every call they make is recorded. Each commit of the catalog
is noted with the rows it left: from then on they bind.
"""

import json
import mmap
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import anyio

from ckptd.catalog import checkpoints
from ckptd.pipeline import STAGES, trash
from ckptd.pipeline.tools import Ended
from ckptd.worker import Workers
from ckptd.worker.__main__ import VERBS
from ckptd.worker.context import Context
from ckptd.worker.protocol import Request
from ckptd_client import control, spool
from tests.model.explore import Says, Tree
from tests.model.invariants import MANIFEST, damage, said, target_of, whole_or_absent
from tests.model.log import Say
from tests.model.recorder import Killed, Recorder
from tests.model.scenario import Edge, Scenario
from tests.support.in_process import Lease, Node, Training, daemon, size_for

RUN, BIN = "runs/demo/run", "runs/.ckptd-trash"
SAVES = {f"{number}" * 32: {"model.safetensors": bytes([number]) * 600, "state.json": b"{}"} for number in (1, 2)}
_EXPERIMENT = "e" * 32
RULES = {"keep_last": 1, "trash_grace_s": 0}
_ROUNDS_MAX = 50
_DURABLE = {"durable", "verified", "tiered"}


def lived() -> Scenario:
    """Two saves, of which one is kept."""
    edges = (
        Edge("fsync spool.sync_directory", "says spooled"),
        Edge("fsync durable.publish", "says rows live"),
        Edge("says rows live", f"Drop {next(iter(SAVES))}.arena"),
        Edge("says rows trashed live", "Move"),
        Edge("fsync durable.move", f"Drop {MANIFEST}"),
        Edge(f"Drop {MANIFEST}", "Drop"),
        Edge("fsync durable.remove_tree", "says rows dropped live"),
    )
    return Scenario("a whole life", run, check, prepare=prepare, edges=edges, fails=False)


def prepare(root: Path) -> None:
    (root / "runs").mkdir()
    (root / "spool").mkdir()


def run(recorder: Recorder) -> None:
    """Go on from wherever the disk and the catalog are."""
    recorder.aside.mkdir(exist_ok=True)
    for number, (checkpoint, files) in enumerate(SAVES.items(), 1):
        image = an_image(recorder.root / "runs", checkpoint, files, number)
        if checkpoint not in {op.fact for op in recorder.ops if isinstance(op, Say) and op.what == "spooled"}:
            spool.write_arena(str(recorder.root / "spool"), checkpoint, image)
            recorder.say("spooled", checkpoint)
        if anyio.run(_serve, recorder):
            raise Killed


def an_image(directory: Path, checkpoint: str, files: dict[str, bytes], step: int) -> memoryview:
    """A committed image, as a client makes it."""
    size_bytes = size_for(files)
    fd = os.memfd_create("image")
    os.ftruncate(fd, size_bytes)
    with mmap.mmap(fd, size_bytes) as page:
        control.write_lease(page, b"\0" * 16, 1, os.getpid())
    trainer = Training(None, str(directory), experiment=_EXPERIMENT)  # type: ignore[arg-type]
    trainer.write(Lease("0" * 32, 1, size_bytes, fd), checkpoint, files, step=step)
    image = mmap.mmap(fd, size_bytes)
    os.close(fd)
    found = control.read(image)
    assert found is not None
    return memoryview(image)[: spool.image_bytes(found.descriptor_offset, found.descriptor_size)]


async def _serve(recorder: Recorder) -> bool:
    """Run a daemon until nothing is left to do; say whether it was killed."""
    killed = False
    async with _daemon(recorder) as node:
        try:
            await _work(recorder, node)
        except* Killed:  # from inside a task group, as some acts have one
            killed = True
    return killed


async def _work(recorder: Recorder, node: Node) -> None:
    parts = node.parts
    await trash.resume(parts.tools)
    await parts.spool.take_in()
    for _ in range(_ROUNDS_MAX):
        claimed = await parts.jobs.claim()
        if not claimed:
            break
        job = claimed[0]
        while not isinstance(outcome := await STAGES[job.stage](job, parts.tools), Ended):
            job = outcome.job
    else:
        raise AssertionError("its jobs never end")
    rows = await _rows(node, recorder.root)
    recorder.say("purging", [checkpoint for checkpoint, row in rows.items() if row[0] == "trashed"])
    await trash.purge(parts.tools)


@asynccontextmanager
async def _daemon(recorder: Recorder) -> AsyncIterator[Node]:
    async def call(_: Workers, request: Request, *, arena_fd: int | None = None) -> Any:
        verb = VERBS[type(request)]
        act = getattr(import_module(f"ckptd.worker.{verb.module}"), verb.function)
        return act(request, Context(fd=arena_fd))

    with mock.patch.object(Workers, "call", call):
        async with daemon(recorder.aside, front=False, retention=RULES) as node:
            node.parts.spool._directory = str(recorder.root / "spool")
            commit = node.parts.catalog.write

            async def write(fn: Any) -> Any:
                done = await commit(fn)
                await _say_rows(recorder, node)
                return done

            await _say_rows(recorder, node)
            with mock.patch.object(node.parts.catalog, "write", write):
                yield node


async def _say_rows(recorder: Recorder, node: Node) -> None:
    rows = await _rows(node, recorder.root)
    recorder.say(" ".join(["rows", *(row[0] for row in rows.values())]), rows)


async def _rows(node: Node, root: Path) -> dict[str, tuple[str, str, str]]:
    found = await node.read(lambda conn: checkpoints.get_many(conn, list(SAVES)))
    return {
        row.id: (str(row.state), str(row.level), os.path.relpath(row.path, root) if row.path else "")
        for row in (found[one] for one in SAVES if one in found)
    }


def check(tree: Tree, says: Says) -> str:
    """I1 to I4, I11: what a row says is so on the disk, and what was acknowledged is in the spool or in a row."""
    rows: dict[str, tuple[str, str, str]] = next(
        (say.fact for say in reversed(says) if say.what.startswith("rows")), {}
    )
    if broken := whole_or_absent(tree, RUN):
        return broken
    for name in ("latest", "best"):
        target = target_of(tree, f"{RUN}/{name}")
        if target and (why := damage(tree, f"{RUN}/{target}")):
            return f"I3: {name} leads to what is not whole: {why}"
    for checkpoint in said(says, "spooled"):
        state, level, path = rows.get(checkpoint, ("pending", "staged", ""))
        if why := _broken(
            tree, checkpoint, (state, level, path), purging=any(checkpoint in begun for begun in said(says, "purging"))
        ):
            return why
    if says and any(row[0] == "live" for row in rows.values()) and not _has_one(tree):
        return "I3: there is none left"
    return ""


def _broken(tree: Tree, checkpoint: str, row: tuple[str, str, str], *, purging: bool) -> str:
    state, level, path = row
    binned = f"{BIN}/{checkpoint}"
    match state:
        case "pending":
            if not _spooled_whole(tree, checkpoint):
                return f"I1: {checkpoint[:4]} is staged and its image is gone"
        case "live":
            if level not in _DURABLE or (why := damage(tree, path)):
                return f"I1: {checkpoint[:4]} is live and {why}"
        case "trashed":
            there = path in tree or not damage(tree, binned)
            if not there and not purging:
                return f"I4: {checkpoint[:4]} is trashed and whole nowhere"
            if f"{binned}/{MANIFEST}" in tree and damage(tree, binned):
                return "I2: half of it still looks like a checkpoint"
        case "dropped":
            if path in tree or binned in tree:
                return f"I11: {checkpoint[:4]} is back"
        case _:
            return f"{checkpoint[:4]} is {state}"
    return ""


def _spooled_whole(tree: Tree, checkpoint: str) -> bool:
    image = tree.get(f"spool/{checkpoint}.arena")
    if not isinstance(image, bytes):
        return False
    page = control.read(image)
    if page is None:
        return False
    raw = image[page.descriptor_offset : page.descriptor_offset + page.descriptor_size]
    if not control.is_whole(page, raw):
        return False
    files = {
        each["path"]: image[each["offset"] : each["offset"] + each["size_bytes"]] for each in json.loads(raw)["files"]
    }
    return files == SAVES[checkpoint]


def _has_one(tree: Tree) -> bool:
    return any(
        not damage(tree, path.removesuffix(f"/{MANIFEST}"))
        for path in tree
        if path.startswith(f"{RUN}/step") and path.endswith(MANIFEST)
    )
