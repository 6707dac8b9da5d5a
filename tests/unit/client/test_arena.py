"""The copy into an arena: right bytes, right order of the control page, nothing built twice."""

import hashlib
import json
import os
from typing import Any

import numpy as np
import pytest
import torch

from ckptd_client import arena as arena_module
from ckptd_client import control
from ckptd_client.arena import MappedArena, commit_image, copy_state
from ckptd_client.control import PAGE
from ckptd_client.errors import Refused
from ckptd_client.flatten import flatten
from ckptd_client.plan import PlanCache, build_plan
from ckptd_client.restore import map_checkpoint
from tests.unit.client.exact import assert_same, bits, memory_file


def leased(size_bytes: int) -> MappedArena:
    arena = MappedArena.anonymous(size_bytes, b"a" * 16)
    control.write_lease(arena.buffer, b"a" * 16, 7, os.getpid())
    return arena


def stored(arena: MappedArena, files: list[dict[str, Any]], **options: Any) -> Any:
    return map_checkpoint(memory_file(arena), files, **options)


def test_an_image_is_committed_only_when_all_of_it_is_there() -> None:
    """The word goes LEASED, WRITING, COMMITTED: a writer that dies in between left no checkpoint."""
    state = {"model": {"w": torch.rand(10)}, "step": 3}
    plan = build_plan(state)
    arena = leased(plan.arena_bytes)
    image = copy_state(plan, state, arena)
    assert control.read(arena.buffer).state == control.WRITING
    commit_image(arena, {"v": 1, "checkpoint": "c"}, image)
    page = control.read(arena.buffer)
    assert (page.state, page.descriptor_offset) == (control.COMMITTED, image.end_offset)
    raw = bytes(arena.buffer[page.descriptor_offset :][: page.descriptor_size])
    assert control.is_whole(page, raw)
    descriptor = json.loads(raw)
    assert descriptor["files"] == image.files
    assert [file["path"] for file in image.files] == ["model.safetensors", "state.json"]
    assert all(file["offset"] % PAGE == 0 for file in image.files)


def test_a_descriptor_may_come_as_bytes() -> None:
    plan = build_plan({"step": 1})
    arena = leased(plan.arena_bytes)
    commit_image(arena, b'{"v":1}', copy_state(plan, {"step": 1}, arena))
    assert control.read(arena.buffer).descriptor_sha256 == hashlib.sha256(b'{"v":1}').digest()


def test_an_arena_that_is_not_leased_is_not_written_to() -> None:
    """A committed arena belongs to the daemon: writing into it would tear a checkpoint."""
    state = {"w": torch.rand(4)}
    plan = build_plan(state)
    arena = leased(plan.arena_bytes)
    commit_image(arena, {}, copy_state(plan, state, arena))
    before = bytes(arena.buffer)
    with pytest.raises(Refused) as caught:
        copy_state(plan, {"w": torch.rand(4)}, arena)
    assert caught.value.code == "arena_not_leased"
    assert bytes(arena.buffer) == before


def test_an_arena_that_is_too_small_is_refused() -> None:
    plan = build_plan({"w": torch.rand(4)})
    with pytest.raises(Refused) as caught:
        copy_state(plan, {"w": torch.rand(4)}, leased(plan.arena_bytes - PAGE))
    assert caught.value.code == "arena_too_small"


def test_a_descriptor_that_does_not_fit_is_refused_and_nothing_is_committed() -> None:
    plan = build_plan({"w": torch.rand(4)})
    arena = leased(plan.arena_bytes)
    image = copy_state(plan, {"w": torch.rand(4)}, arena)
    with pytest.raises(Refused) as caught:
        commit_image(arena, {"note": "x" * plan.arena_bytes}, image)
    assert caught.value.code == "descriptor_too_large"
    assert control.read(arena.buffer).state == control.WRITING


def test_a_state_of_another_structure_is_refused() -> None:
    plan = build_plan({"w": torch.rand(4)})
    with pytest.raises(ValueError, match="structure"):
        copy_state(plan, {"w": torch.rand(4), "v": torch.rand(4)}, leased(plan.arena_bytes))
    with pytest.raises(ValueError, match="structure"):
        copy_state(plan, {"w": torch.rand(5)}, leased(plan.arena_bytes))


def test_a_second_save_into_the_same_arena_leaves_nothing_of_the_first() -> None:
    cache, arena = PlanCache(4), MappedArena.anonymous(1 << 20)
    for round_number in range(3):
        state = {"model": {f"t{n}": torch.rand(50) for n in range(20)}, "note": "x" * (50 - 20 * round_number)}
        flat = flatten(state)
        files = copy_state(cache.get(flat), flat, arena).files
        assert_same(stored(arena, files), state)


def test_strided_and_lazy_tensors_are_packed() -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    wave = torch.tensor([[1 + 2j, 3 - 4j]])
    state = {
        "transposed": base.permute(2, 0, 1),
        "sliced": base[:, ::2],
        "expanded": torch.tensor([1.5]).expand(5),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugated": wave.conj(),
        "negated": wave[:, :1].conj().imag,
        "array": np.arange(12).reshape(3, 4)[::-1, ::2],
        "grad": torch.rand(3, 3, requires_grad=True).t(),
    }
    flat = flatten(state)
    plan = build_plan(flat)
    arena = MappedArena.anonymous(plan.arena_bytes)
    all_found = stored(arena, copy_state(plan, flat, arena).files)
    for name, wanted in state.items():
        found = all_found[name]
        same = bits(found) == bits(wanted) if isinstance(wanted, torch.Tensor) else np.array_equal(found, wanted)
        assert same, name


def test_tied_tensors_are_stored_once_and_other_views_are_not_mixed_up() -> None:
    weight = torch.rand(100, 100)
    state = {
        "a": {"embed": weight, "head": weight.detach()},
        "b": {"head": weight, "part": weight[:50], "t": weight.t()},
    }
    plan = build_plan(state)
    assert plan.data_bytes == weight.nbytes * 2 + weight.nbytes // 2
    arena = MappedArena.anonymous(plan.arena_bytes)
    found = stored(arena, copy_state(plan, state, arena).files)
    assert found["a"]["embed"].data_ptr() == found["a"]["head"].data_ptr() == found["b"]["head"].data_ptr()
    found["a"]["embed"][0, 0] = 5.0
    assert found["b"]["head"][0, 0] == 5.0
    assert found["b"]["part"].equal(weight[:50])
    assert found["b"]["t"].equal(weight.t())


def test_large_tensors_are_copied_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "CHUNK_BYTES", 1 << 20)
    state = {"w": torch.rand((5 << 18) + 3), "b": torch.rand(7)}
    plan = build_plan(state)
    arena = MappedArena.anonymous(plan.arena_bytes)
    assert_same(stored(arena, copy_state(plan, state, arena).files), state)


def test_a_tensor_that_got_other_memory_after_the_walk_is_copied_from_there() -> None:
    """Lazy saves copy later; reading the address of the walk would read freed memory."""
    parameter = torch.nn.Parameter(torch.zeros(10))
    flat = flatten({"p": parameter})
    plan = build_plan(flat)
    arena = MappedArena.anonymous(plan.arena_bytes)
    parameter.data = torch.ones(10)
    assert stored(arena, copy_state(plan, flat, arena).files)["p"].sum() == 10
    parameter.data = torch.ones(11)
    with pytest.raises(ValueError, match="shape"):
        copy_state(plan, flat, arena)


@pytest.mark.parametrize("count", [4, 11])
def test_a_tensor_that_got_less_or_more_of_the_very_same_memory_is_no_longer_what_was_walked(count: int) -> None:
    """What it had is free when it is given other memory, so that this may well begin where that did."""
    room = torch.arange(16.0)
    parameter = torch.nn.Parameter(room[:10])
    flat = flatten({"p": parameter})
    plan = build_plan(flat)
    arena = MappedArena.anonymous(plan.arena_bytes)
    parameter.data = room[:count]
    assert parameter.data_ptr() == flat.addresses[0]
    with pytest.raises(ValueError, match="shape"):
        copy_state(plan, flat, arena)


def test_plain_values_are_those_of_the_walk() -> None:
    state = {"w": torch.rand(3), "log": [1, 2], "step": 1}
    flat = flatten(state)
    state["log"].append(3)
    state["step"] = 2
    plan = build_plan(flat)
    arena = MappedArena.anonymous(plan.arena_bytes)
    found = stored(arena, copy_state(plan, flat, arena).files)
    assert (found["log"], found["step"]) == ([1, 2], 1)


def test_the_torch_format_holds_what_pickle_holds() -> None:
    """The way out for what has no typed form; loaded with weights_only unless told otherwise."""
    model = torch.nn.Linear(2, 2)
    state = {"model": model, "nested": [model, {"x": complex(1, 2)}], "step": 5}
    plan = build_plan(state, "torch")
    arena = leased(plan.arena_bytes)
    image = copy_state(plan, state, arena)
    assert [file["path"] for file in image.files] == ["checkpoint.pt"]
    commit_image(arena, {"v": 1}, image)
    page = control.read(arena.buffer)
    assert json.loads(bytes(arena.buffer[page.descriptor_offset :][: page.descriptor_size]))["format"] == "torch"
    found = stored(arena, image.files)
    assert_same(dict(found["model"]), dict(model.state_dict()))
    assert found["step"] == 5
    assert_same(found["nested"][1], state["nested"][1])


def test_a_torch_state_that_grew_after_its_plan_does_not_run_over_its_room() -> None:
    plan = build_plan({"w": torch.rand(10)}, "torch")
    arena = leased(plan.arena_bytes)
    after = bytes(arena.buffer[plan.state_offset :])
    with pytest.raises(ValueError, match="measured"):
        copy_state(plan, {"w": torch.rand(10_000)}, arena)
    assert bytes(arena.buffer[plan.state_offset :]) == after


def test_populate_touches_every_page_and_keeps_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.memfd_create("arena")
    os.ftruncate(fd, 8 * PAGE)
    os.pwrite(fd, b"kept", 5 * PAGE)
    before = os.fstat(fd).st_blocks
    for advice in (arena_module._MADV_POPULATE_WRITE, 1 << 20):  # the second: a kernel that doesn't know it
        monkeypatch.setattr(arena_module, "_MADV_POPULATE_WRITE", advice)
        with MappedArena(fd, 8 * PAGE, b"i" * 16) as arena:
            arena.populate()
            assert bytes(arena.buffer[5 * PAGE :][:4]) == b"kept"
    assert os.fstat(fd).st_blocks * 512 == 8 * PAGE > before * 512
    os.close(fd)


def test_a_mapped_arena_that_is_closed_under_a_view_lives_as_long_as_the_view() -> None:
    """A tensor that still lies in it, or the traceback of a copy that failed, is no reason to raise into training."""
    fd = os.memfd_create("arena")
    os.ftruncate(fd, PAGE)
    os.pwrite(fd, b"seen", 0)
    arena = MappedArena(fd, PAGE, b"i" * 16)
    view = arena.buffer[:4]
    arena.close()
    arena.close()
    os.close(fd)
    assert bytes(view) == b"seen"


def test_a_mapped_arena_shares_its_memory_and_closes_twice() -> None:
    fd = os.memfd_create("arena")
    os.ftruncate(fd, PAGE)
    arena = MappedArena(fd, PAGE, b"i" * 16)
    arena.buffer[0:4] = b"seen"
    assert os.pread(fd, 4, 0) == b"seen"
    read_only = MappedArena(fd, PAGE, b"i" * 16, writable=False)
    assert read_only.buffer.readonly
    assert bytes(read_only.buffer[:4]) == b"seen"
    read_only.close()
    arena.close()
    arena.close()
    os.close(fd)
