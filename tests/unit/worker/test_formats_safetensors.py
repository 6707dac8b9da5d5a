"""safetensors files, written by the real library, and lies about them."""

import contextlib
import json
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import InvalidFormat
from ckptd.worker import formats
from ckptd.worker.formats import safetensors
from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.source import Source

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file


@pytest.fixture
def saved(tmp_path):
    """Three tensors; the library sorts them by alignment, then name."""
    path = tmp_path / "model_7.safetensors"
    tensors = {
        "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
    }
    save_file(tensors, path, metadata={"format": "pt", "step": "41"})
    return path


def handmade(path, header, data=b"", *, length=None):
    """Write a file whose header says whatever the test wants."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def test_a_real_file_is_whole_and_its_tensors_are_where_the_answer_says(saved, look):
    """M004: bytes cut out by the reported offsets are the tensor's bytes."""
    found = look(saved)
    assert (found.format, found.complete, found.problem) == ("safetensors", True, "")
    assert (found.step, found.extra) == (41, {"metadata": {"format": "pt", "step": "41"}})
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert {name: (t.dtype, t.shape) for name, t in by_name.items()} == {
        "a.weight": ("F32", [3, 4]),
        "b": ("BF16", [5]),
        "empty": ("F32", [0, 3]),
    }
    raw = saved.read_bytes()[by_name["a.weight"].start : by_name["a.weight"].end]
    assert raw == torch.arange(12, dtype=torch.float32).numpy().tobytes()


def test_a_file_cut_at_any_byte_is_never_whole(saved, look):
    """M004, S18: every length shorter than the whole one."""
    whole = saved.read_bytes()
    for length in range(len(whole)):
        saved.write_bytes(whole[:length])
        found = look(saved)
        assert found.complete is False, length
        assert found.problem.startswith("truncated: "), (length, found.problem)


def test_the_tensor_in_which_a_cut_file_ends_is_named(saved, look):
    """M004."""
    whole, tensors = saved.read_bytes(), {tensor.name: tensor for tensor in look(saved).tensors}
    for name in ("a.weight", "b"):
        for length in (tensors[name].start, tensors[name].end - 1):
            saved.write_bytes(whole[:length])
            assert f"in tensor '{name}', which ends at {tensors[name].end}" in look(saved).problem


def test_bytes_after_the_last_tensor_are_told(saved, look):
    saved.write_bytes(saved.read_bytes() + b"x")
    found = look(saved)
    assert found.complete is False
    assert found.problem == "invalid_format: 1 bytes after the last tensor 'b'"


_F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": _F32, "b": {**_F32, "data_offsets": [4, 12]}}, "overlaps"),
        ({"a": _F32, "b": {**_F32, "data_offsets": [12, 20]}}, "leaves a hole"),
        ({"a": {**_F32, "data_offsets": [4, 12]}}, "leaves a hole"),
        ({"a": {**_F32, "data_offsets": [-8, 0]}}, "bad data_offsets"),
        ({"a": {**_F32, "data_offsets": [8, 0]}}, "bad data_offsets"),
        ({"a": {**_F32, "data_offsets": [0, 8, 16]}}, "bad data_offsets"),
        ({"a": {**_F32, "data_offsets": [0, 1 << 64]}}, "bad data_offsets"),
        ({"a": {**_F32, "data_offsets": [0.0, 8.0]}}, "bad data_offsets"),
        ({"a": {**_F32, "data_offsets": [False, True]}}, "bad data_offsets"),
        ({"a": {**_F32, "shape": [3]}}, "does not take"),
        ({"a": {**_F32, "shape": [-2, -1]}}, "bad shape"),
        ({"a": {**_F32, "shape": [1] * 65}}, "bad shape"),
        ({"a": {**_F32, "shape": [1 << 62] * 64}}, "does not take"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "lacks"),
        ({"a": 7}, "lacks"),
        ({"__metadata__": 7}, "no object"),
        (b'{"a":' + json.dumps(_F32).encode() + b',"a":' + json.dumps(_F32).encode() + b"}", "twice"),
        (b"{" + b"[" * 100_000, "not JSON"),
        (b'{"a":' + b"[" * 100_000, "not JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", "not JSON"),
        (b'{"a": \xff}', "not JSON"),
        (b"[]", "does not start"),
        (b" {}", "does not start"),
        (b"{", "holds nothing"),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused_by_name(tmp_path, look, header, says):
    """S18: overlap, hole, negative, duplicate keys, depth, sizes that lie."""
    found = look(handmade(tmp_path / "x.safetensors", header, b"\0" * 20))
    assert found.complete is False
    assert found.problem.startswith("invalid_format: "), found.problem
    assert says in found.problem


@pytest.mark.parametrize("length", [17 << 20, 100_000_000, 100_000_001, 1 << 63, (1 << 64) - 1])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path, length):
    """S18: the file is sparse and as large as it says; less than a page of it is read."""
    path = handmade(tmp_path / "x.safetensors", b"{}", length=length)
    os.truncate(path, min(length, 1 << 33) + 8)
    with path.open("rb") as file:
        source = Source(file.fileno())
        with pytest.raises(InvalidFormat, match="invalid_format: header of"):
            formats.read_file(source, path.name, Ask())
        assert source.read_bytes < 4096


def test_a_file_of_20_gb_is_inspected_by_less_than_a_megabyte(tmp_path):
    """The header says all; the data is never touched."""
    path = handmade(
        tmp_path / "x.safetensors", {"a": {"dtype": "U8", "shape": [20 << 30], "data_offsets": [0, 20 << 30]}}
    )
    os.truncate(path, path.stat().st_size + (20 << 30))
    with path.open("rb") as file:
        source = Source(file.fileno())
        assert formats.read_file(source, path.name, Ask(tensors_max=10)).complete is True
        assert source.read_bytes < 1 << 20


def test_an_unknown_dtype_is_passed_through(tmp_path, look):
    """A newer library's dtype is no damage; only its size can't be checked against its shape."""
    header = {"a": {"dtype": "F2_NEW", "shape": [32], "data_offsets": [0, 8]}}
    found = look(handmade(tmp_path / "x.safetensors", header, b"\0" * 8))
    assert (found.complete, found.tensors[0].dtype) == (True, "F2_NEW")


@given(st.data())
def test_no_damage_to_a_header_raises_anything_but_its_own_error(tmp_path_factory, data):
    """S18, fuzzed: mutated headers are whole, told as broken, or truncated; nothing else comes out."""
    header = json.dumps({"a": _F32, "b": {**_F32, "data_offsets": [8, 16]}, "__metadata__": {"k": "v"}}).encode()
    raw = bytearray(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=6)):
        raw[at] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(raw)
    with path.open("rb") as file, contextlib.suppress(InvalidFormat):
        found = safetensors.read(Source(file.fileno()), Ask(tensors_max=10))
        assert found.complete == (found.problem == "")
