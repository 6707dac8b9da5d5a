"""A load is exact or an error: never a damaged file, never a part in silence."""

import collections
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd_client import readback
from ckptd_client.errors import CorruptCheckpoint, MissingPart, NotFound, Refused, StateMismatch, Unavailable
from ckptd_client.find import newest_intact
from ckptd_client.readback import Order, is_intact
from ckptd_client.restore import find_checkpoint, map_checkpoint, read_checkpoint
from tests.unit.client.exact import assert_same, image, memory_file, write_checkpoint
from tests.unit.client.test_plan import golden_state


def small_state(value: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((300, 1000), value), "b": torch.full((10,), value)},
        "optimizer": {"state": {0: {"m": torch.full((5,), value)}}, "param_groups": [{"lr": 0.1}]},
        "step": int(value),
    }


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint16]
DTYPES += [torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))).to(dtype)
    how = draw(st.sampled_from(["plain", "transposed", "parameter", "frozen"]))
    if how == "transposed" and len(shape) > 1:
        return tensor.transpose(0, 1)
    if how in ("parameter", "frozen"):
        return torch.nn.Parameter(tensor, requires_grad=how == "parameter" and (tensor.is_floating_point()))
    return tensor


ARRAYS = st.builds(
    lambda shape, dtype: np.arange(math.prod(shape)).reshape(shape).astype(dtype),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(["<f8", "<f2", ">i4", "|u1", "|b1", "<c16", "<M8[s]", "<U3", "|S2"]),
)
PLAIN = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=9)),
    st.complex_numbers(),
    st.sampled_from([torch.bfloat16, torch.device("cpu"), torch.Size([1, 2]), np.float16(0.1), np.int64(-3)]),
)
KEYS = st.one_of(st.text(max_size=5), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()))
STATES = st.recursive(
    st.one_of(PLAIN, tensors(), ARRAYS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4).map(collections.OrderedDict),
        st.dictionaries(st.text(max_size=4), inner, max_size=4).map(lambda d: collections.defaultdict(list, d)),
        st.lists(inner, max_size=3).map(lambda items: collections.deque(items, 7)),
        st.sets(st.one_of(st.integers(), st.text()), max_size=3),
    ),
    max_leaves=20,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(STATES)
def test_any_state_comes_back_exactly(state: Any) -> None:
    """M003, M031: random nested states of torch, NumPy and plain values, bit for bit."""
    arena, files = image(state)
    fd = memory_file(arena)
    found = map_checkpoint(fd, files)
    os.close(fd)
    assert_same(found, state)


def test_every_kind_of_value_comes_back_from_the_disk(tmp_path: Path) -> None:
    state = golden_state()
    found = read_checkpoint(str(write_checkpoint(tmp_path / "c", state)))
    assert_same(found, state)
    assert found["tied"]["again"].data_ptr() == found["model"]["weight"].data_ptr()


def test_a_model_and_its_optimizer_train_on_as_if_nothing_happened(tmp_path: Path) -> None:
    """M003, M026: model, optimizer and scheduler in and out."""

    def build() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def train(model: Any, optimizer: Any, scheduler: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.rand(16, 4)).sum().backward()
            optimizer.step()
            scheduler.step()

    parts = build()
    train(*parts, 3)
    state = dict(zip(("model", "optimizer", "scheduler"), parts, strict=True)) | {"rng": torch.get_rng_state()}
    path = write_checkpoint(tmp_path / "c", state)
    train(*parts, 3)
    again = build()
    loaded = read_checkpoint(str(path), into=dict(zip(("model", "optimizer", "scheduler"), again, strict=True)))
    assert loaded["model"] is again[0]
    torch.set_rng_state(read_checkpoint(str(path), keys=["rng"])["rng"])
    train(*again, 3)
    assert_same(dict(again[0].state_dict()), dict(parts[0].state_dict()))
    assert_same(again[1].state_dict(), parts[1].state_dict())


# -- what is asked for ------------------------------------------------------------------------------


def test_only_the_files_of_the_keys_that_are_asked_for_are_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", small_state())
    (path / "optimizer.safetensors").unlink()
    assert_same(read_checkpoint(str(path), keys=["model", "step"]), {k: small_state()[k] for k in ("model", "step")})
    with pytest.raises(MissingPart) as caught:
        read_checkpoint(str(path))
    assert caught.value.part == "optimizer.safetensors"


def test_a_key_tied_into_another_file_brings_that_file(tmp_path: Path) -> None:
    weight = torch.rand(4)
    path = write_checkpoint(tmp_path / "c", {"model": {"w": weight}, "ema": {"w": weight}, "rest": torch.rand(2)})
    assert_same(read_checkpoint(str(path), keys=["ema"]), {"ema": {"w": weight}})


def test_asking_for_a_part_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """M026: not silence."""
    path = write_checkpoint(tmp_path / "c", small_state())
    with pytest.raises(MissingPart, match="ema"):
        read_checkpoint(str(path), keys=["ema"])
    with pytest.raises(MissingPart, match="ema"):
        read_checkpoint(str(path), into={"ema": {}})
    with pytest.raises(MissingPart, match=r"manifest\.json"):
        read_checkpoint(str(tmp_path / "nowhere"))


def test_into_fills_tensors_in_place_and_replaces_plain_values(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", small_state(2.0) | {"array": np.arange(3), "list": [1, torch.ones(2)]})
    into = small_state(0.0) | {"array": np.zeros(3, int), "list": [0, torch.zeros(2)]}
    inner = into["model"]["w"], into["array"], into["list"][1]
    assert read_checkpoint(str(path), into=into) is into
    assert into["model"]["w"] is inner[0]
    assert_same(into, small_state(2.0) | {"array": np.arange(3), "list": [1, torch.ones(2)]})


@pytest.mark.parametrize(
    ("model", "error", "where"),
    [
        ({"w": torch.zeros(300, 1000)}, StateMismatch, 'state["model"]["b"]'),
        ({"w": torch.zeros(300, 1000), "b": torch.zeros(10), "x": torch.zeros(1)}, MissingPart, 'state["model"]["x"]'),
        ({"w": torch.zeros(300, 1000), "b": torch.zeros(11)}, StateMismatch, 'state["model"]["b"]'),
        ({"w": torch.zeros(300, 1000), "b": torch.zeros(10).half()}, StateMismatch, 'state["model"]["b"]'),
        ({"w": torch.zeros(300, 1000), "b": np.zeros(10, "f4")}, StateMismatch, 'state["model"]["b"]'),
    ],
)
def test_into_that_does_not_fit_is_refused_before_anything_changes(
    tmp_path: Path, model: Any, error: type[Exception], where: str
) -> None:
    path = write_checkpoint(tmp_path / "c", small_state(2.0))
    with pytest.raises(error) as caught:
        read_checkpoint(str(path), into={"step": 0, "model": model})
    assert where in str(caught.value)
    assert model["w"].sum() == 0


def test_a_module_that_does_not_fit_is_not_half_loaded(tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path / "c", {"model": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 3))}
    )
    other = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 4))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(StateMismatch) as caught:
        read_checkpoint(str(path), into={"model": other})
    assert caught.value.where == 'state["model"]["1.weight"]'
    assert_same(dict(other.state_dict()), before)


# -- damage -----------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("use_mmap", [False, True])
def test_a_flipped_byte_makes_the_load_fail_and_offers_the_newest_good_one(tmp_path: Path, *, use_mmap: bool) -> None:
    """M011, M069: names the file, the MiB and the tensor."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"step_{step}", small_state(step), step=step, checkpoint=str(step) * 32)
    flip(tmp_path / "step_3" / "model.safetensors", (1 << 20) + 77)
    flip(tmp_path / "step_2" / "state.json", 5)
    with pytest.raises(CorruptCheckpoint) as caught:
        read_checkpoint(str(tmp_path / "step_3"), mmap=use_mmap)
    error = caught.value
    assert (error.file, error.path) == ("model.safetensors", str(tmp_path / "step_3"))
    assert "MiB 1 (w)" in error.detail
    assert error.newest_good == str(tmp_path / "step_1")
    assert_same(read_checkpoint(error.newest_good), small_state(1))


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """No byte of any file is left out of the digest: headers, padding and the last partial page too."""
    path = write_checkpoint(tmp_path / "c", {"model": {"w": torch.rand(1030)}, "step": 1})
    chance = random.Random(0)
    for name in ("model.safetensors", "state.json"):
        size = (path / name).stat().st_size
        for at in (0, size - 1, *(chance.randrange(size) for _ in range(10))):
            flip(path / name, at)
            with pytest.raises(CorruptCheckpoint) as caught:
                read_checkpoint(str(path))
            assert caught.value.file == name
            flip(path / name, at)
    read_checkpoint(str(path))


def test_a_truncated_file_is_reported_with_the_tensors_it_lost(tmp_path: Path) -> None:
    """M004."""
    path = write_checkpoint(tmp_path / "c", small_state())
    os.truncate(path / "model.safetensors", 1 << 20)
    with pytest.raises(CorruptCheckpoint) as caught:
        read_checkpoint(str(path), verify=False)
    assert "1048576 bytes instead of" in caught.value.detail
    assert "cut off: w, b" in caught.value.detail


def test_a_file_without_a_digest_is_not_called_verified(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", small_state())
    files = [{"path": p.name, "size_bytes": p.stat().st_size} for p in path.iterdir() if p.name != "manifest.json"]
    with pytest.raises(MissingPart, match="no digest"):
        read_checkpoint(str(path), files)
    assert_same(read_checkpoint(str(path), files, verify=False), small_state())


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/../../b", ""])
def test_a_file_name_that_leads_out_of_the_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptCheckpoint, match="leads out"):
        readback.read_files(Order(str(tmp_path), [{"path": name, "size_bytes": 1, "sha256": "0"}]))


def test_a_file_system_without_direct_reads_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "c", small_state())
    real_open, real_read = os.open, os.preadv
    refused = []

    def refuse_open(name: str, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            refused.append(name)
            raise OSError(22, "no O_DIRECT here")
        return real_open(name, flags, *rest)

    monkeypatch.setattr(os, "open", refuse_open)
    assert_same(read_checkpoint(str(path)), small_state())
    assert refused
    monkeypatch.setattr(os, "open", real_open)

    def refuse_read(fd: int, buffers: Any, offset: int) -> int:
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append("read")
            raise OSError(22, "opened, but reads so are refused")
        return real_read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse_read)
    assert_same(read_checkpoint(str(path)), small_state())
    assert "read" in refused


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "c", small_state())
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][: 1 << 16]], at))
    monkeypatch.setattr(readback, "_O_DIRECT", 0)
    assert_same(read_checkpoint(str(path)), small_state())


# -- other writers' files, and finding without a daemon ---------------------------------------------


def test_files_of_other_writers_load_by_their_format(tmp_path: Path) -> None:
    weights = {"w": torch.rand(3, 3)}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    torch.save({"step": 5, **weights}, tmp_path / "trainer.pt")
    files = [
        {"path": name, "size_bytes": (tmp_path / name).stat().st_size} for name in ("model.safetensors", "trainer.pt")
    ]
    assert_same(read_checkpoint(str(tmp_path), files[:1], verify=False), weights)
    both = read_checkpoint(str(tmp_path), files, verify=False)
    assert_same(both, {"model.safetensors": weights, "trainer.pt": {"step": 5, **weights}})
    with pytest.raises(MissingPart, match="no file that this client can read"):
        read_checkpoint(str(tmp_path), [], verify=False)


def test_finding_goes_by_step_and_revision_and_passes_garbage_over(tmp_path: Path) -> None:
    """M010, M027: 999,999 comes before 1,000,000; what is not whole is not found."""
    root = tmp_path / "runs"
    write_checkpoint(root / "step_0000999999", small_state(), step=999_999, checkpoint="aaaaaaaa" * 4)
    write_checkpoint(root / "step_0001000000", small_state(), step=1_000_000, checkpoint="bbbbbbbb" * 4)
    write_checkpoint(root / "step_0001000000_r2", small_state(), step=1_000_000, revision=1, checkpoint="bbbbbbcc" * 4)
    cut = write_checkpoint(root / "step_0002000000", small_state(), step=2_000_000, checkpoint="dddddddd" * 4)
    os.truncate(cut / "model.safetensors", 100)
    write_checkpoint(root / ".step_3.ckptd-tmp-x", small_state(), step=3_000_000)
    (root / "latest").symlink_to(cut)
    twice = b'{"files":[],"step":4,"step":4000000,"checkpoint":"%s"}' % (b"e" * 32)
    garbages = [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"files":[{"path":3}]}', twice]
    for index, garbage in enumerate(garbages):
        (root / f"bad{index}").mkdir()
        (root / f"bad{index}" / "manifest.json").write_bytes(garbage)
    assert find_checkpoint(str(root)).path == str(root / "step_0001000000_r2")
    assert find_checkpoint(str(root), "step:999999").step == 999_999
    assert find_checkpoint(str(root), 1_000_000).checkpoint == "bbbbbbcc" * 4
    assert find_checkpoint(str(root), "aaaaaa").step == 999_999
    for selector in ("step:5", "cccccccc", "dddddddd", "aaa", "nonsense"):
        with pytest.raises(NotFound):
            find_checkpoint(str(root), selector)
    with pytest.raises(NotFound, match="several"):
        find_checkpoint(str(root), "bbbbbb")
    with pytest.raises(Unavailable):
        find_checkpoint(str(root), "best:val_loss")
    with pytest.raises(NotFound):
        find_checkpoint(str(tmp_path / "nowhere"))


def test_what_a_hook_vetoed_is_not_the_latest_and_is_found_when_it_is_named(tmp_path: Path) -> None:
    """M057, with no daemon to ask: all of them vetoed is an error, and never a run that begins anew."""
    older = write_checkpoint(tmp_path / "step_1", small_state(), step=1, checkpoint="aa" * 16)
    newer = write_checkpoint(tmp_path / "step_2", small_state(), step=2, checkpoint="bb" * 16)
    note = {"v": 1, "checkpoint": "bb" * 16, "metrics": {}, "veto": "hook 'gate': odd"}
    (newer / "late.json").write_text(json.dumps(note))
    assert find_checkpoint(str(tmp_path)).path == str(older)
    assert find_checkpoint(str(tmp_path), 2).path == find_checkpoint(str(tmp_path), "bbbbbb").path == str(newer)
    assert newest_intact(str(tmp_path), str(older)) is None
    for harmless in ({**note, "checkpoint": "cc" * 16}, {**note, "veto": None}, [], {"veto": "of nobody"}):
        (newer / "late.json").write_text(json.dumps(harmless))
        assert find_checkpoint(str(tmp_path)).path == str(newer)
    for path, checkpoint in ((older, "aa" * 16), (newer, "bb" * 16)):
        (path / "late.json").write_text(json.dumps({**note, "checkpoint": checkpoint}))
    with pytest.raises(Refused, match="vetoed, the newest by hook 'gate': odd"):
        find_checkpoint(str(tmp_path))


def test_intact_means_read_back_with_the_same_digest(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "step_1", small_state())
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert is_intact(Order(str(path), files))
    assert newest_intact(str(tmp_path), str(tmp_path / "step_2")) == str(path)
    flip(path / "model.safetensors", 5000)
    assert not is_intact(Order(str(path), files))
    assert newest_intact(str(tmp_path), str(tmp_path / "step_2")) is None
