"""torch.save's files, written by torch, and zips and pickles that lie. Nothing in them is ever called."""

import contextlib
import io
import os
import pickle
import pickletools
import struct
import zipfile
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import InvalidFormat
from ckptd.worker import formats
from ckptd.worker.formats import opcodes, torch_state, zip_directory
from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.source import Source

torch = pytest.importorskip("torch")

BIG = 10_000


def training_state():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    base = torch.arange(24, dtype=torch.int64).reshape(4, 6)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": torch.nn.Parameter(torch.zeros(2, 2)),
        "view": base[1:3, ::2],
        "tied": base,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "eight": torch.ones(4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "meta": torch.empty(5, 5, device="meta"),
        "epoch": 3,
        "global_step": 170,
        "rng": [1, 2, ("x", None)],
    }


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(training_state(), path)
    return path


def flat(value, prefix=""):
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))


def test_every_tensor_of_a_real_state_is_listed_as_torch_sees_it(saved, look):
    """M003: names, shapes and dtypes, with no torch in the reader."""
    found = look(saved)
    assert (found.format, found.complete, found.problem) == ("torch-zip", True, "")
    assert (found.step, found.epoch) == (170, 3.0)
    assert found.extra["keys"][:3] == ["model", "optimizer", "parameter"]
    expected = {
        name: (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in flat(torch.load(saved, weights_only=True))
    }
    translated = {"float32": "F32", "int64": "I64", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
    assert {t.name: (t.shape, t.dtype) for t in found.tensors} == {
        name: (shape, translated[dtype]) for name, (shape, dtype) in expected.items()
    }
    assert found.tensors_total == len(expected)


def test_the_bytes_at_a_tensors_place_are_the_tensors(saved, look):
    state, raw = torch.load(saved, weights_only=True), saved.read_bytes()
    by_name = {tensor.name: tensor for tensor in look(saved).tensors}
    for name, tensor in (("model.0.weight", state["model"]["0.weight"]), ("tied", state["tied"])):
        assert raw[by_name[name].start : by_name[name].end] == tensor.numpy().tobytes()
    assert by_name["view"].end - by_name["view"].start < by_name["tied"].end - by_name["tied"].start
    assert by_name["meta"].start is None


def test_a_file_cut_at_any_byte_is_never_whole(tmp_path, look):
    """M003, S19: the directory of a zip is its last part."""
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(3), "step": 5}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert look(path).complete is False, length


def test_a_changed_byte_of_any_entry_is_found_by_its_checksum(tmp_path, look):
    """S19: wrong CRC, named by entry; every single byte of data in turn."""
    path = tmp_path / "model.pt"
    torch.save({"w": torch.arange(8.0), "step": 5}, path)
    whole = path.read_bytes()
    with path.open("rb") as file:
        entries = zip_directory.read(Source(file.fileno()))
    for entry in entries:
        for at in range(entry.start, entry.end):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
            found = look(path)
            assert found.complete is False
            assert found.problem.startswith(f"crc: entry {entry.name!r}")


def test_a_writer_that_writes_no_checksums_is_neither_torn_nor_proven(tmp_path, look):
    """torch.serialization.set_crc32_options(False) leaves zeros: only quiet tells then."""
    path = tmp_path / "model.pt"
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save({"w": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    found = look(path)
    assert (found.complete, found.extra["checksums"], found.tensors_total) == (None, False, 1)


def test_the_legacy_format_is_recognised_and_left_alone(tmp_path, look):
    path = tmp_path / "model.pt"
    torch.save(training_state(), path, _use_new_zipfile_serialization=False)
    found = look(path)
    assert (found.format, found.complete, found.tensors) == ("torch-legacy", None, [])


@pytest.mark.parametrize("content", [b"", b"\0" * BIG])
def test_a_torch_file_that_was_never_written_is_not_whole(tmp_path, look, content):
    """What a power cut leaves of an unsynced file: nothing, or zeros in full size."""
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert look(path).problem.startswith("truncated: ")


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_runs_none(tmp_path, look, zipped):
    """S17: and the tensors beside the payload are still listed."""
    path, canary = tmp_path / "model.pt", tmp_path / "canary"
    torch.save({"bomb": Bomb(canary), "w": torch.ones(2), "step": 9}, path, _use_new_zipfile_serialization=zipped)
    found = look(path)
    assert not canary.exists()
    if zipped:
        assert ([tensor.name for tensor in found.tensors], found.step) == (["w"], 9)
    torch.load(path, weights_only=False)
    assert canary.exists()  # the bomb was a real one


def zip_of(path, entries, *, method=zipfile.ZIP_STORED, comment=b""):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
        archive.comment = comment
    return path


GOOD = [("m/data.pkl", b"\x80\x02}."), ("m/data/0", b"\1" * 64)]


def test_a_plain_zip_of_the_right_shape_passes(tmp_path, look):
    """The ground that the lies below stand on."""
    assert look(zip_of(tmp_path / "m.pt", GOOD)).complete is True


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([*GOOD, ("../evil", b"x")], "leaves its folder"),
        ([*GOOD, ("/evil", b"x")], "leaves its folder"),
        ([*GOOD, ("m/../../evil", b"x")], "leaves its folder"),
        ([*GOOD, ("other/file", b"x")], "no single folder"),
        ([("m/data/0", b"x")], "no single folder"),
    ],
)
def test_a_zip_of_another_shape_is_refused(tmp_path, look, entries, says):
    """S19: nothing is extracted anywhere, and a name that would leave its folder is refused all the same."""
    found = look(zip_of(tmp_path / "m.pt", entries))
    assert found.complete is False
    assert found.problem.startswith("invalid_format: ")
    assert says in found.problem
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_compressed_data_is_refused_unread(tmp_path, look):
    """S19: 10 MB that would be 10 GB are never inflated."""
    bomb = zip_of(tmp_path / "m.pt", [*GOOD, ("m/data/1", b"\0" * (32 << 20))], method=zipfile.ZIP_DEFLATED)
    assert "compressed" in look(bomb).problem
    mild = zip_of(tmp_path / "n.pt", GOOD, method=zipfile.ZIP_DEFLATED)
    assert "compressed" in look(mild).problem


def test_a_scripted_model_may_compress_its_sources(tmp_path, look):
    """TorchScript does, and only those."""
    path = tmp_path / "scripted.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in GOOD:
            archive.writestr(name, data)
        archive.writestr("m/code/__torch__.py", b"pass\n" * 20, zipfile.ZIP_DEFLATED)
    assert look(path).complete is True


def test_two_entries_of_one_name_are_refused(tmp_path, look):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = zip_of(tmp_path / "m.pt", [*GOOD, GOOD[1]])
    assert "one name" in look(path).problem


def test_an_end_record_in_a_comment_is_not_believed(tmp_path, look):
    """S19: two readers would see two different zips."""
    inner = zip_of(tmp_path / "inner.zip", [("m/data.pkl", b"\x80\x02].")]).read_bytes()
    outer = zip_of(tmp_path / "m.pt", GOOD, comment=inner)
    found = look(outer)
    assert (found.complete, found.tensors) == (False, [])


def patched(path, offset_from_end, fmt, *values):
    raw = bytearray(path.read_bytes())
    struct.pack_into(fmt, raw, len(raw) - offset_from_end, *values)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("offset_from_end", "fmt", "value"),
    [
        (14, "<H", 3),  # entries on this disk
        (12, "<H", 60_000),  # entries
        (10, "<I", 0xFFFFFF),  # directory size
        (6, "<I", 0),  # directory start
        (6, "<I", 0xFFFFFF),
        (18, "<H", 1),  # disk number
    ],
)
def test_an_end_record_that_lies_is_refused(tmp_path, look, offset_from_end, fmt, value):
    """S19."""
    path = patched(zip_of(tmp_path / "m.pt", GOOD), offset_from_end, fmt, value)
    assert look(path).complete is False


@pytest.mark.parametrize(
    ("offset_from_end", "fmt", "value"),
    [
        (22 + 20 - 8, "<Q", 0),  # locator: where the wide end record is
        (22 + 20 - 8, "<Q", 1 << 63),
        (22 + 20 - 16, "<I", 7),  # locator: how many disks
        (22 + 20 + 56 - 24, "<Q", 1),  # wide record: entries on this disk
        (22 + 20 + 56 - 32, "<Q", 1 << 62),  # wide record: entries
        (22 + 20 + 56 - 40, "<Q", 1 << 62),  # wide record: directory size
        (22 + 20 + 56 - 48, "<Q", 1 << 62),  # wide record: directory start
        (22 + 20 + 56 - 4, "<Q", 1 << 40),  # wide record: its own size
    ],
)
def test_a_zip64_record_that_lies_is_refused(tmp_path, look, offset_from_end, fmt, value):
    """S19: torch writes the wide records always, so they are read from its own file."""
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(2)}, path)
    assert look(path).complete is True
    assert look(patched(path, offset_from_end, fmt, value)).complete is False


def test_entries_that_share_bytes_are_refused(tmp_path, look):
    """S19: the trick of the densest zip bombs. Sizes and checksum agree everywhere; the place does not."""
    path = zip_of(tmp_path / "m.pt", [*GOOD, ("m/data/1", b"\2" * 64)])
    raw = bytearray(path.read_bytes())
    header = raw.index(b"m/data/0") - 30
    start = header + 30 + len("m/data/0")
    size = raw.index(b"m/data/1") + len("m/data/1") + 64 - start
    facts = (zlib.crc32(raw[start : start + size]), size, size)
    struct.pack_into("<III", raw, header + 14, *facts)
    struct.pack_into("<III", raw, raw.rindex(b"m/data/0") - 46 + 16, *facts)
    path.write_bytes(raw)
    found = look(path)
    assert (found.complete, "overlaps" in found.problem) == (False, True)


def test_bytes_between_the_directory_and_its_end_record_are_refused(tmp_path, look):
    """S19: room for a second directory, which another reader might find first."""
    path = zip_of(tmp_path / "m.pt", GOOD)
    raw = path.read_bytes()
    path.write_bytes(raw[:-22] + b"room" + raw[-22:])
    assert "does not end at" in look(path).problem


def test_two_end_records_that_disagree_are_refused(tmp_path, look):
    """S19: an old reader would believe the plain one, a new one the wide one."""
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(2)}, path)
    patched(path, 14, "<HH", 3, 3)
    assert "disagree" in look(path).problem


def test_too_many_entries_are_refused_by_their_count(tmp_path, look):
    """S19: a million entries are not read to be refused."""
    count = zip_directory.ENTRIES_MAX + 1
    wide = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, 46 * count, 0)
    locator = struct.pack("<IIQI", 0x07064B50, 0, 46 * count, 1)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = tmp_path / "m.pt"
    path.write_bytes(b"PK\3\4" + b"\0" * (46 * count - 4) + wide + locator + end)
    assert "too many" in look(path).problem


@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_damage_to_a_zip_raises_anything_but_its_own_error(tmp_path_factory, changes):
    """S19, fuzzed over a real file: whole, unproven, or told as broken."""
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(3), "step": 1}, buffer)
    raw = bytearray(buffer.getvalue())
    for at, value in changes:
        raw[at % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    path.write_bytes(raw)
    with path.open("rb") as file, contextlib.suppress(InvalidFormat):
        found = formats.read_file(Source(file.fileno()), path.name, Ask(tensors_max=10, crc=True))
        assert (found.complete is False) == (found.problem != "")


@given(st.binary(max_size=200), st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=5))
def test_no_pickle_stream_raises_anything_but_its_own_error(noise, changes):
    """S17, fuzzed: noise, and a real stream with bytes changed."""
    real = bytearray(pickle.dumps({"a": [1, (2.5, None)], "b": {"c": {1, 2}}, "d": pickle.PickleBuffer(b"x")}, 5))
    for at, value in changes:
        real[at % len(real)] = value
    for stream in (noise, bytes(real)):
        try:
            root = opcodes.describe(stream)
        except InvalidFormat:
            continue
        list(torch_state.tensors(root))
        torch_state.top_level(root)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_pickle_protocol_is_described(protocol):
    value = {"a": [1, -2, 2.5, "text", b"raw", None, True], "b": ({}, (), [1 << 70]), "step": 7}
    root = opcodes.describe(pickle.dumps(value, protocol))
    assert torch_state.top_level(root) == (["a", "b", "step"], 7, None)


def test_a_stream_that_describes_a_billion_nodes_is_walked_in_bounds():
    """A tuple of itself twice, doubled 100 times: the walk passes each container once."""
    doubled = b"".join(bytes([0x68, n, 0x68, n, 0x86, 0x71, n + 1, 0x30]) for n in range(100))
    root = opcodes.describe(b"\x80\x02)q\x00" + doubled + b"h\x64.")
    assert list(torch_state.tensors(root)) == []


def test_a_shared_container_is_walked_once():
    """Forty doublings of one container are one container, not a trillion."""
    storage = opcodes.Stored(("storage", opcodes.Name("torch", "FloatStorage"), "0", "cpu", 1))
    tensor = opcodes.Made(opcodes.Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, (1,), (1,), False, None))
    value = (tensor,)
    for _ in range(40):
        value = (value, value)
    assert len(list(torch_state.tensors(value))) == 1


def test_a_very_deep_stream_is_described_and_dropped():
    """A million nested lists neither recurse in the reader nor when they are freed."""
    depth = 1_000_000
    root = opcodes.describe(b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
    assert list(torch_state.tensors(root)) == []
    del root


def test_every_opcode_of_pickle_is_known():
    """A new Python's pickles stay readable: this fails when an opcode is added."""
    known = set(opcodes._STEPS) | opcodes._PLAIN | set(opcodes._CONSTANTS) | {"PROTO", "FRAME", "STOP"}
    assert {opcode.name for opcode in pickletools.opcodes} - known == {"NEXT_BUFFER", "READONLY_BUFFER"}
