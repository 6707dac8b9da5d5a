"""What `ckpt cleanup` asks of the daemon, with real files: damaged bytes go to the trash and come back as they went."""

import os
import shutil
from pathlib import Path

import pytest

from ckptd.catalog import checkpoints
from ckptd.errors import Changed, Held, NotFound
from ckptd.model import Level, State
from tests.support.in_process import Training, a_tensor, daemon, eventually
from tests.support.watched import a_watched, rows_at

FILE = "model.safetensors"


async def row(node, checkpoint: str):
    return await node.read(lambda conn: checkpoints.get(conn, checkpoint))


async def damaged(node, line, step: int = 1) -> tuple[str, Path]:
    """Save a checkpoint whose memory is given back, and flip a bit of it."""
    training = await Training(line, str(node.runs)).open()
    one = await training.saved(step)
    await training.saved(step + 1)
    node.parts.pool.free_checkpoint(one)
    path = Path((await row(node, one)).path)
    body = bytearray((path / FILE).read_bytes())
    before = os.stat(path / FILE)
    body[200] ^= 1
    with open(path / FILE, "r+b") as file:
        file.write(body)
    # As the disk does it: nobody wrote, so no time changed.
    os.utime(path / FILE, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not (await line.ask("verify", selector=one))["results"][0]["ok"]
    return one, path


async def test_damaged_bytes_go_to_the_trash_and_come_back_damaged_never_verified(short_dir):
    """M082, M099: nothing is unlinked, nothing is forgotten about it; a reading alone makes it good again."""
    async with daemon(short_dir) as node, node.connect() as line:
        one, path = await damaged(node, line)
        dry = await line.ask("remove", selector=one, dry_run=True, state="corrupt")
        assert (dry["action"], path.exists()) == ("trash", True)
        assert (await line.ask("remove", selector=one, state="corrupt"))["action"] == "trash"
        assert not path.exists()
        assert (node.runs / ".ckptd-trash" / one / FILE).exists()
        back = await line.ask("restore", selector=one)
        assert (back["state"], back["restored"]) == ("corrupt", "checkpoint")
        after = await row(node, one)
        assert (after.state, after.level, after.is_whole) == (State.CORRUPT, Level.VERIFIED, False)
        assert after.error["damage"][0]["file"] == FILE
        with pytest.raises(NotFound):
            await line.ask("resolve", selector="step:1", project="demo", name="run")
        assert not (await line.ask("verify", selector=one))["results"][0]["ok"]
        body = bytearray((path / FILE).read_bytes())
        body[200] ^= 1
        (path / FILE).write_bytes(body)
        assert (await line.ask("verify", selector=one))["results"][0]["ok"]
        assert (await row(node, one)).is_good
        for dry_run in (True, False):
            with pytest.raises(Changed, match="live now, not corrupt"):
                await line.ask("remove", selector=one, dry_run=dry_run, state="corrupt")
        assert path.exists()


async def test_what_is_read_back_as_good_meanwhile_is_not_removed_as_damaged(short_dir, monkeypatch):
    """M082: what was shown is what is removed, up to the transaction that does it."""
    async with daemon(short_dir) as node, node.connect() as line:
        one, path = await damaged(node, line)
        from ckptd.intake import commands

        allowed = commands.Commands._allowed

        async def slow(self, *given, **more):
            await node.write(lambda tx: checkpoints.mark_verified(tx, one))
            await allowed(self, *given, **more)

        monkeypatch.setattr(commands.Commands, "_allowed", slow)
        with pytest.raises(Changed, match="live now, not corrupt"):
            await line.ask("remove", selector=one, state="corrupt")
        assert (await row(node, one)).state is State.LIVE
        assert path.exists()


async def test_a_missing_one_is_forgotten_only_while_nothing_lies_in_its_place(short_dir):
    """M082: forgotten with its files back on the disk it could never be found again."""
    async with daemon(short_dir, watching={"reconcile_s": 3600}) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        one = await training.saved(1)
        node.parts.pool.free_checkpoint(one)
        path = Path((await row(node, one)).path)
        path.rename(short_dir / "away")
        assert (await line.ask("verify", selector=one))["results"][0]["state"] == "missing"
        assert (await line.ask("remove", selector=one, dry_run=True, state="missing"))["action"] == "forget"
        (short_dir / "away").rename(path)
        for dry_run in (True, False):
            with pytest.raises(Held, match="something lies at") as caught:
                await line.ask("remove", selector=one, dry_run=dry_run)
            assert caught.value.details["holds"] == ["files"]
        assert (await line.ask("verify", selector=one))["results"][0]["ok"]
        shutil.rmtree(path)
        assert (await line.ask("verify", selector=one))["results"][0]["state"] == "missing"
        shutil.rmtree(node.runs)
        assert (await line.ask("remove", selector=one))["action"] == "forget", "its root is gone with it"


async def test_what_somebody_else_wrote_in_its_place_is_left_and_that_is_said(short_dir):
    """M082: neither moved nor forgotten: no act of ours makes it harder to find."""
    async with daemon(short_dir, watching={"reconcile_s": 3600}) as node, node.connect() as line:
        one, path = await damaged(node, line)
        (path / "manifest.json").unlink()
        (path / FILE).write_bytes(b"mine")
        with pytest.raises(Changed, match="is not what was recorded"):
            await line.ask("remove", selector=one, state="corrupt")
        assert (await row(node, one)).state is State.MISSING
        assert (path / FILE).read_bytes() == b"mine"
        with pytest.raises(Held, match="something lies at"):
            await line.ask("remove", selector=one, state="missing")


async def test_a_watched_file_that_failed_is_not_forgotten_while_the_next_scan_would_find_it(short_dir):
    tree, settings = a_watched(short_dir)
    path = tree / "run7/a.safetensors"
    path.write_bytes(a_tensor()[:-10])
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        [(one, _)] = await found(node, path)
        await node.write(lambda tx: checkpoints.mark_failed(tx, one, {"code": "invalid_format", "message": "cut"}))
        with pytest.raises(Held, match="something lies at"):
            await line.ask("remove", selector=one, dry_run=True)
        path.unlink()
        assert (await line.ask("remove", selector=one))["action"] == "forget"


async def found(node, path) -> list[tuple[str, str]]:
    """Wait until a path has a row."""

    async def rows() -> list[tuple[str, str]]:
        return await rows_at(node, path)

    return await eventually(rows)
