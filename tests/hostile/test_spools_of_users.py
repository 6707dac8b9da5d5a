"""A shared daemon's spools, one for each user: what lies there is taken for its user's, or refused."""

import os
from pathlib import Path

import pytest

from ckptd.model import RootKind, new_id
from tests.support.in_process import Node, daemon
from tests.support.strangers import SOMEBODY, need_root
from tests.unit.intake.test_spooled import a_tensor, a_trainer, an_image

FILES = {"model.safetensors": a_tensor()}


def left(short_dir: Path, name: str, image: bytes, owner_uid: int = SOMEBODY) -> Path:
    """Let somebody leave an image in the spool of SOMEBODY."""
    directory = short_dir / "state" / "spool" / str(SOMEBODY)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.arena"
    path.write_bytes(image)
    os.chown(path, owner_uid, owner_uid)
    return path


def shared(short_dir: Path):
    (short_dir / "runs").mkdir(exist_ok=True)
    root = {"path": str(short_dir / "runs"), "kind": str(RootKind.MANAGED)}
    return daemon(short_dir, front=False, mode="system", roots=[root])


@pytest.fixture(autouse=True)
def root() -> None:
    need_root()


async def refused(node: Node) -> list[str]:
    await node.parts.spool.take_in()
    return list(node.parts.spool.refused.values())


async def test_a_file_of_somebody_else_in_a_users_spool_is_refused(short_dir: Path):
    """A hard link could be one."""
    checkpoint = new_id()
    image = an_image(a_trainer(short_dir), checkpoint, FILES, step=1)
    async with shared(short_dir) as node:
        left(short_dir, checkpoint, image, owner_uid=SOMEBODY - 1)
        (why,) = await refused(node)
        assert "not its user's file" in why


async def test_an_image_under_the_name_of_another_checkpoint_is_refused(short_dir: Path):
    checkpoint, other = new_id(), new_id()
    image = an_image(a_trainer(short_dir), checkpoint, FILES, step=1)
    async with shared(short_dir) as node:
        left(short_dir, other, image)
        (why,) = await refused(node)
        assert checkpoint in why


async def test_an_image_is_found_again_in_its_users_spool_before_anybody_has_looked(short_dir: Path):
    """A job goes on as soon as the next daemon runs; without its bytes it would end, and the save be lost."""
    checkpoint = new_id()
    image = an_image(a_trainer(short_dir), checkpoint, FILES, step=1)
    async with shared(short_dir) as node:
        left(short_dir, checkpoint, image)
        assert await refused(node) == []
        node.parts.spool._known.clear()
        fd = await node.parts.spool.open(checkpoint)
        assert fd is not None
        assert os.fstat(fd).st_uid == SOMEBODY
        os.close(fd)
