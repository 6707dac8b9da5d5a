"""Foreign bytes in front of their readers: never executed, never believed, never the worker's end (S17, S18, S19)."""

import io
import json
import os
import pickle
import random
import struct
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from ckptd.errors import InvalidFormat
from ckptd.worker import examine, formats
from ckptd.worker.context import Context, Limits
from ckptd.worker.formats import opcodes
from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.source import Source
from ckptd.worker.parser import Question

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.numpy").save_file

EVERYTHING = Ask(tensors_max=1000, crc=True)
SLOW_S = 10.0  # of the processor: what is not linear takes hours
ANSWER_S = 400.0  # a file that costs the child all the processor time it may have, on a machine that is busy

pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def parsers():
    """Children under the default limits."""
    with pytest.MonkeyPatch.context() as patient:
        patient.setattr(examine, "SILENCE_S", ANSWER_S)
        yield from made(Limits())


def made(limits: Limits):
    """Children that are dead and buried when they are given back: none is left to a later test."""
    found = examine.Parsers(limits)
    yield found
    free = list(found._free)
    found.close()
    assert all(child.reaped(60) for child in free)


@pytest.fixture(scope="module")
def patient_parsers():
    """Children that may use more of the processor: on some machines a second of it does a third of the work."""
    yield from made(Limits(parser_cpu_s=200.0))


def ask(parsers, path: Path):
    return parsers.ask(Question(str(path.parent), str(path), tensors_max=100, crc=True), Context()).found


# -- nothing is executed: S17 ---------------------------------------------------------------------


def bombs(canary: Path) -> dict[str, bytes]:
    """Streams that make a directory named `canary` in whoever unpickles them, each in another way."""
    name = os.fsencode(canary)
    text = b"X" + struct.pack("<I", len(name)) + name

    class Reduce:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    class Twice:
        def __reduce__(self):
            return eval, (f"__import__('os').mkdir({str(canary)!r})",)

    return {
        "reduce": pickle.dumps(Reduce(), 2),
        "reduce, protocol 5": pickle.dumps({"state_dict": Reduce()}, 5),
        "eval": pickle.dumps([1, Twice()], 4),
        "global and reduce": b"\x80\x02cposix\nmkdir\n" + text + b"\x85R.",
        "inst": b"(" + text + b"iposix\nmkdir\n.",
        "obj": b"(cposix\nmkdir\n" + text + b"o.",
        "newobj": b"\x80\x02cposix\nmkdir\n" + text + b"\x85\x81.",
        "newobj with names": b"\x80\x04cposix\nmkdir\n" + text + b"\x85}\x92.",
        "stack global": b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93" + text + b"\x85R.",
        "build": b"\x80\x02cbuiltins\nobject\n)R}X\x01\x00\x00\x00acposix\nmkdir\n" + text + b"\x85Rsb.",
        "through getattr": b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\n"
        b"X\x05\x00\x00\x00posix\x85RX\x05\x00\x00\x00mkdir\x86R" + text + b"\x85R.",
        "after a whole state": b"\x80\x02}q\x00." + pickle.dumps(Reduce(), 2),
        "a torch name in front": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\ncposix\nmkdir\n" + text + b"\x85R\x85R.",
    }


def in_a_zip(stream: bytes) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("m/data.pkl", stream)
        archive.writestr("m/version", b"3")
    return body.getvalue()


def legacy(stream: bytes) -> bytes:
    return pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + stream


@pytest.mark.parametrize("kind", sorted(bombs(Path("/nowhere"))))
def test_a_stream_that_would_run_code_runs_none_wherever_it_lies(tmp_path, parsers, kind):
    """S17: in torch's zip, in its old format, in a DCP directory's .metadata, in a file that has only the name."""
    canary = tmp_path / "canary"
    stream = bombs(canary)[kind]
    (tmp_path / "zip.pt").write_bytes(in_a_zip(stream))
    (tmp_path / "old.pth").write_bytes(legacy(stream))
    (tmp_path / "plain.ckpt").write_bytes(stream + bytes(range(99)))
    (tmp_path / "step_5").mkdir()
    (tmp_path / "step_5" / "__0_0.distcp").write_bytes(b"x")
    (tmp_path / "step_5" / ".metadata").write_bytes(stream)
    for name in ("zip.pt", "old.pth", "plain.ckpt", "step_5"):
        assert ask(parsers, tmp_path / name).format
    assert not canary.exists()


def test_the_bombs_above_do_run_code_in_an_unpickler(tmp_path):
    """A bomb that would never go off shows nothing."""
    went_off = 0
    for kind, stream in bombs(tmp_path / "canary").items():
        # Some only name what they would call: an unpickler stops there of its own accord.
        with suppress(pickle.UnpicklingError, AttributeError, TypeError):
            pickle.loads(stream)
        if (tmp_path / "canary").is_dir():
            (tmp_path / "canary").rmdir()
            went_off += 1
        else:
            assert kind in {"newobj", "newobj with names", "after a whole state"}
    assert went_off >= 10


def test_the_parser_child_has_no_library_that_could_load_a_state(tmp_path, parsers):
    """S17: torch, numpy and safetensors are not in its memory; the readers are ckptd's own."""
    (tmp_path / "zip.pt").write_bytes(in_a_zip(pickle.dumps({}, 2)))
    ask(parsers, tmp_path / "zip.pt")
    maps = Path(f"/proc/{parsers._free[0]._process.pid}/maps").read_text()
    assert "ckptd" in maps or "python" in maps
    for library in ("torch", "numpy", "safetensors"):
        assert library not in maps


# -- bombs under limits: S18, S19 -----------------------------------------------------------------


def tensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def deflated(entries: dict[str, bytes]) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return body.getvalue()


def many_entries(count: int) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        for number in range(count):
            archive.writestr(f"m/data/{number}", b"")
    return body.getvalue()


ENTRY = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
BOMBS = {
    "brackets.safetensors": lambda: tensors(b'{"a":' + b"[" * 100_000),
    "objects.safetensors": lambda: tensors(b'{"a":[' + b"{}," * 5_000_000 + b"{}]}"),
    "keys.safetensors": lambda: tensors(b"{" + b",".join(b'"%d":0' % n for n in range(1_300_000)) + b"}"),
    "one key.safetensors": lambda: tensors(b"{" + b",".join(b'"a":0' for n in range(2_000_000)) + b"}"),
    "too long.safetensors": lambda: tensors(b"{" + b" " * 100, 1 << 63),
    "negative.safetensors": lambda: tensors(b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,-1]}}'),
    "overlap.safetensors": lambda: (
        tensors(
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}'
        )
        + bytes(6)
    ),
    "huge shape.safetensors": lambda: tensors(
        b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % (b",".join([b"9223372036854775807"] * 64))
    ),
    "digits.safetensors": lambda: tensors(b'{"a":{"dtype":"U8","shape":[' + b"9" * 1_000_000 + b"]}}"),
    "deflated.pt": lambda: deflated({"m/data.pkl": b"\x80\x02" + b"]" * 100_000_000 + b"."}),
    "code.pt": lambda: deflated({"m/data.pkl": b"\x80\x02}.", "m/code/a.py": bytes(200_000_000)}),
    "outside.pt": lambda: deflated({"../../etc/passwd": b"x", "m/data.pkl": b"\x80\x02}."}),
    "memo.pt": lambda: in_a_zip(b"\x80\x02]q\x00" + b"h\x00h\x00\x86q\x00" * 400_000 + b"."),
    "marks.pt": lambda: in_a_zip(b"\x80\x02" + b"(" * 6_000_000 + b"."),
    "doubling.pt": lambda: in_a_zip(b"\x80\x02]" + b"2\x86" * 500_000 + b"."),
    "long.pt": lambda: in_a_zip(b"\x80\x02\x8b" + struct.pack("<i", 30_000_000) + b"\x7f" * 30_000_000 + b"."),
    "decimal.pt": lambda: in_a_zip(b"L" + b"9" * 3_000_000 + b"L\n."),
    "short.pt": lambda: in_a_zip(b"\x80\x04\x8d" + struct.pack("<Q", (1 << 63) - 1) + b"x."),
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_bomb_ends_as_an_answer_within_the_childs_limits(tmp_path, parsers, name):
    """S18, S19: it is not called whole with something in it, and the next file is read."""
    (tmp_path / name).write_bytes(BOMBS[name]())
    good = tmp_path / "good.safetensors"
    save_file({"w": np.ones(3, np.float32)}, good)
    began_s = time.monotonic()
    found = ask(parsers, tmp_path / name)
    assert time.monotonic() - began_s < ANSWER_S
    if name.endswith(".safetensors"):
        assert found.problem.startswith("invalid_format"), found.problem
    assert found.complete is not True or found.extra.get("unread") or not found.tensors, found
    assert ask(parsers, good).complete is True


@pytest.mark.parametrize("name", ["many.pt", "many.safetensors"])
def test_a_file_of_very_many_parts_is_read_in_bounds(tmp_path, patient_parsers, name):
    """S18, S19: twenty thousand entries, a quarter of a million tensors: large, lawful, and read. The bound is memory's."""
    path = tmp_path / name
    header = b"{" + b",".join(ENTRY % n for n in range(250_000)) + b"}"
    path.write_bytes(many_entries(20_000) if name.endswith(".pt") else tensors(header))
    assert ask(patient_parsers, path).complete is True


# -- real files, damaged --------------------------------------------------------------------------


def real_files(directory: Path) -> dict[str, bytes]:
    weights = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.int64)}
    save_file(weights, directory / "m.safetensors", metadata={"step": "12"})
    state = {"model": {"w": torch.ones(3, 4), "v": torch.arange(6)[::2]}, "epoch": 3, "step": 7}
    torch.save(state, directory / "m.pt")
    torch.save(state, directory / "old.pth", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def mutated(rng: random.Random, raw: bytes) -> bytes:
    body = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 6))):
        at = rng.randrange(len(body))
        match rng.randrange(6):
            case 0:
                body[at] ^= 1 << rng.randrange(8)
            case 1:
                body[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, (1 << 64) - 1, 1 << 63, rng.getrandbits(64))))
            case 2:
                del body[at : at + rng.randrange(1, 64)]
            case 3:
                body[at:at] = body[at : at + rng.randrange(1, 200)]
            case 4:
                body[at : at + 4] = struct.pack("<I", rng.choice((0, 0xFFFFFFFF, rng.getrandbits(32))))
            case 5:
                body[at:] = b""
        if not body:
            return b""
    return bytes(body)


def read_mutants(directory: Path, count: int) -> None:
    """Damage real files in their structure; every reader answers or says InvalidFormat, quickly."""
    seed = random.SystemRandom().randrange(1 << 32)
    rng, files = random.Random(seed), real_files(directory)
    names = sorted(files)
    fd, refused = os.memfd_create("mutant"), 0
    with zipfile.ZipFile(directory / "m.pt") as archive:
        pickled = archive.read("m/data.pkl")
    for number in range(count):
        name = names[number % len(names)]
        body = mutated(rng, files[name])
        os.ftruncate(fd, 0)
        os.pwrite(fd, body, 0)
        began_s = time.thread_time()
        try:
            found = formats.read_file(Source(fd), name, EVERYTHING)
            json.dumps([found.problem, found.format, found.tensors_total])
        except InvalidFormat:
            refused += 1
        try:
            opcodes.describe(mutated(rng, pickled))
        except InvalidFormat:
            refused += 1
        assert time.thread_time() - began_s < SLOW_S, f"seed {seed}, {name}"
    os.close(fd)
    assert 0 < refused < 2 * count, f"seed {seed}"


def test_an_odd_escape_in_a_text_is_no_warning_of_ours():
    """S17: warnings may be errors where the parser runs."""
    assert opcodes.describe(b"S'\\q'\n.") == "\\q"


def test_a_thousand_damaged_files_are_answered_or_refused(tmp_path):
    """S18, S19, short form."""
    read_mutants(tmp_path, 1200)


@pytest.mark.faults
@pytest.mark.timeout(280)
def test_a_hundred_thousand_damaged_files_are_answered_or_refused(tmp_path):
    """S18, S19, long form."""
    read_mutants(tmp_path, 100_000)
