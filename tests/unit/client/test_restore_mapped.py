"""A checkpoint that is loaded by mapping the arena it lies in: no byte is read, and the arena is let go in time."""

import gc
import os

import pytest
import torch

from ckptd_client.errors import MissingPart
from ckptd_client.restore import map_checkpoint
from tests.unit.client.exact import assert_same, image, memory_file
from tests.unit.client.test_restore import small_state


def test_a_mapped_checkpoint_is_private_and_tells_when_it_is_let_go() -> None:
    """Writing to a loaded tensor must not change the arena, and the daemon must learn when it is free."""
    arena, files = image(small_state())
    fd = memory_file(arena)
    released: list[int] = []
    found = map_checkpoint(fd, files, on_release=lambda: released.append(1))
    found["model"]["w"][:] = 9.0
    assert_same(map_checkpoint(fd, files), small_state())
    last = found["model"]["b"][2:4]
    del found
    gc.collect()
    assert released == []
    del last
    gc.collect()
    assert released == [1]
    os.close(fd)


def test_a_mapped_checkpoint_put_into_a_model_and_its_optimizer_lets_the_arena_go() -> None:
    """An optimizer keeps the tensors that it loads; they must not be those of the arena."""
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    arena, files = image({"model": model, "optimizer": optimizer})
    other = torch.nn.Linear(3, 3)
    other_optimizer = torch.optim.Adam(other.parameters())
    released: list[int] = []
    fd = memory_file(arena)
    into = {"model": other, "optimizer": other_optimizer}
    map_checkpoint(fd, files, into=into, on_release=lambda: released.append(1))
    gc.collect()
    assert released == [1]
    assert_same(dict(other.state_dict()), wanted)
    assert_same(other_optimizer.state_dict(), optimizer.state_dict())
    os.close(fd)


def test_release_is_told_when_the_load_fails() -> None:
    arena, files = image(small_state())
    fd = memory_file(arena)
    released: list[int] = []
    with pytest.raises(MissingPart):
        map_checkpoint(fd, files, keys=["nothing"], on_release=lambda: released.append(1))
    gc.collect()
    assert released == [1]
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        map_checkpoint(fd, files, on_release=lambda: released.append(2))
    assert released == [1, 2]
