"""Figures of tensors, read from real files in real formats: the two arithmetics, samples, damaged files."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file

from ckptd.errors import BadPath, InvalidFormat
from ckptd.hooks.builtin import plain, vectors
from ckptd.hooks.builtin.arithmetic import PLAIN, arithmetic, figures
from ckptd.hooks.builtin.plain import FLOATS, SIZES, Tally
from ckptd.hooks.builtin.tensors import SAMPLE_BYTES, opened, stretches

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
BOTH = [PLAIN, arithmetic()]


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


@pytest.mark.parametrize("dtype", sorted(TORCH))
@pytest.mark.parametrize("by", BOTH, ids=lambda by: by.name)
def test_every_bit_pattern_means_what_torch_says(by, dtype):
    size = SIZES[dtype]
    raw = bytes(range(256)) if size == 1 else bytes(n & 255 for n in range(65536) for n in (n, n >> 8))
    tensor = torch.frombuffer(bytearray(raw), dtype=TORCH[dtype])
    wanted = torch.view_as_real(tensor).flatten() if tensor.is_complex() else tensor
    found = [float(number) for number in by.decode(dtype, raw)]
    assert len(found) == wanted.numel()
    assert all(same(one, other) for one, other in zip(found, wanted.double().tolist(), strict=True))


def test_every_float_of_safetensors_has_a_size():
    assert set(SIZES) == FLOATS


@settings(max_examples=150, deadline=None)
@given(arrays.arrays("float64", st.integers(0, 60), elements=st.floats(width=64)))
def test_both_arithmetics_agree(numbers):
    raw = numbers.tobytes()
    slow, fast = plain.tally(plain.decode("F64", raw)), vectors.tally(vectors.decode("F64", raw))
    assert slow[:5] == fast[:5]
    assert math.isclose(slow.norm, fast.norm, rel_tol=1e-9)
    finite = [number for number in numbers.tolist() if math.isfinite(number)]
    assert slow.nan + slow.inf == len(numbers) - len(finite)
    assert slow.largest == max(map(abs, finite), default=0.0)
    assert math.isclose(slow.norm, math.hypot(*finite), rel_tol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(width=32), max_size=5), max_size=6))
def test_parts_add_up_to_the_whole(parts):
    whole = Tally()
    for part in parts:
        whole = whole.plus(plain.tally(part))
    at_once = plain.tally([number for part in parts for number in part])
    assert whole[:5] == at_once[:5]
    assert math.isclose(whole.norm, at_once.norm, rel_tol=1e-9)


@pytest.mark.parametrize("by", BOTH, ids=lambda by: by.name)
def test_the_largest_numbers_do_not_overflow_their_norm(by):
    numbers = by.decode("F64", torch.tensor([1e300, 1e300], dtype=torch.float64).numpy().tobytes())
    assert math.isclose(by.tally(numbers).norm, math.sqrt(2) * 1e300)


@given(st.integers(0, 1 << 34), st.floats(0.0001, 1.5), st.sampled_from([1, 4, 16, 28, 56]))
def test_samples_lie_inside_on_rows_and_never_overlap(size_bytes, share, row):
    size_bytes = size_bytes // row * row
    found = list(stretches(size_bytes, share, row))[:5000]
    end = 0
    for offset, size in found:
        assert offset >= end
        assert offset % row == 0
        assert size > 0
        assert size % row == 0 or offset + size == size_bytes
        end = offset + size
    assert end <= size_bytes
    if size_bytes <= SAMPLE_BYTES or share >= 1:
        assert len(found) == 5000 or sum(size for _, size in found) == size_bytes


@pytest.fixture
def mixed() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    state = {name: torch.randn(70, 33).to(dtype) for name, dtype in TORCH.items() if not name.startswith(("F8", "C"))}
    return state | {"count": torch.tensor([3]), "flags": torch.ones(4, dtype=torch.bool)}


@pytest.mark.parametrize("by", BOTH, ids=lambda by: by.name)
@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_norms_of_real_files_are_those_of_the_tensors(tmp_path, mixed, by, form):
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    save_file(mixed, path) if form == "safetensors" else torch.save({"model": mixed}, path)
    with opened(str(path)) as tensors:
        found = figures(tensors, by)
    prefix = "" if form == "safetensors" else "model."
    assert found.tallies.keys() == {prefix + name for name in mixed if mixed[name].is_floating_point()}
    for name, tensor in mixed.items():
        if tensor.is_floating_point():
            assert found.tallies[prefix + name].elements == tensor.numel()
            assert math.isclose(found.tallies[prefix + name].norm, tensor.double().norm().item(), rel_tol=1e-9)
    assert found.share == 1.0


def test_the_files_of_a_directory_are_one_checkpoint(tmp_path):
    """Sharded weights: each tensor is named with its file."""
    for shard in (1, 2):
        save_file({"w": torch.full((8,), float(shard))}, tmp_path / f"model-0000{shard}-of-00002.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with opened(str(tmp_path)) as tensors:
        found = figures(tensors, PLAIN)
    assert {key: tally.largest for key, tally in found.tallies.items()} == {
        "model-00001-of-00002.safetensors:w": 1.0,
        "model-00002-of-00002.safetensors:w": 2.0,
    }


def test_a_large_file_is_sampled_and_says_so(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(4 << 20), "b": torch.ones(10)}, path)
    with opened(str(path)) as tensors:
        found = figures(tensors, arithmetic(), bytes_max=1 << 20)
        assert tensors.read_bytes <= 2 << 20
    assert 0.03 < found.share < 0.15
    assert found.tallies["b"].elements == 10
    assert math.isclose(found.tallies["w"].norm, 2048.0, rel_tol=1e-6)  # scaled up to the whole


def test_more_tensors_than_the_limit_allows_are_counted(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({f"w{n}": torch.ones(1000) for n in range(50)}, path)
    with opened(str(path)) as tensors:
        found = figures(tensors, PLAIN, bytes_max=10_000)
    assert len(found.tallies) + found.unread == 50
    assert 0 < found.unread < 50


@pytest.mark.parametrize("cut", [3, 40, 5000])
def test_a_truncated_file_is_an_error_that_names_what_is_missing(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2000)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InvalidFormat, match="truncated"), opened(str(path)):
        pass


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2000)}, path)
    with opened(str(path)) as tensors:
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(InvalidFormat, match="truncated"):
            figures(tensors, PLAIN)


def test_a_link_or_a_pipe_is_not_opened(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    os.symlink("pipe", tmp_path / "link.safetensors")
    with pytest.raises(BadPath), opened(str(tmp_path / "pipe")):
        pass
    with pytest.raises(OSError), opened(str(tmp_path / "link.safetensors")):
        pass


def test_a_pickle_is_described_and_never_executed(tmp_path):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(20), "evil": Evil()}, path)
    with opened(str(path)) as tensors:
        figures(tensors, PLAIN)
    assert not marker.exists()


def test_listing_the_builtins_loads_neither_numpy_nor_torch():
    """The daemon's process stays free of them."""
    code = (
        "import sys, ckptd.hooks.registry, ckptd.hooks.builtin.notices, ckptd.hooks.builtin.checks\n"
        "sys.exit(bool({'numpy', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
