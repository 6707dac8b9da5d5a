"""The verb settle against real writers, driven one step at a time: nothing is ever settled early."""

import itertools
import os
import signal
import time

import msgspec
import pytest

from ckptd.errors import BadPath, Bug, NotFound
from ckptd.worker import lease, settle
from ckptd.worker.context import Context
from ckptd.worker.lease import Writer
from ckptd.worker.protocol import Settle

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

pytestmark = pytest.mark.usefixtures("sigio_ignored", "nothing_remembered")

QUIET_S = 5.0  # as the asker asks


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model_7.safetensors"
    save_file({"a": torch.arange(1000.0), "b": torch.ones(500)}, path)
    return path


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.arange(1000.0), "global_step": 33}, path)
    return path


def test_a_whole_file_that_nobody_writes_is_settled_at_once(weights, state, asker_of):
    for path, form, step in ((weights, "safetensors", 7), (state, "torch-zip", 33)):
        found = asker_of(path).ask()
        assert (found.settled, found.reason, found.format, found.step) == (True, "structure", form, step)
        facts = path.stat()
        assert found.identity.ino == facts.st_ino
        assert found.identity.mtime_ns == facts.st_mtime_ns


def test_a_file_written_slowly_with_pauses_is_settled_only_when_it_is_closed(tmp_path, weights, puppet, asker_of):
    """Each step is as long as it likes: a pause far beyond quiet_s changes nothing."""
    raw = weights.read_bytes()
    path = tmp_path / "slow_8.safetensors"
    asker = asker_of(path)
    assert asker.ask().reason == "gone"
    puppet.do(f"f = open({str(path)!r}, 'wb', buffering=0)")
    for start in range(0, len(raw), 1500):
        puppet.do(f"f.write({raw[start : start + 1500]!r})")
        for _ in range(2):
            found = asker.ask(still_s=1000.0)
            assert (found.settled, found.reason) == (False, "writer")
    puppet.do("f.close()")
    assert asker.ask().settled


def test_a_file_written_by_open_and_close_for_each_chunk_is_never_settled_torn(tmp_path, weights, puppet, asker_of):
    """No writer has it open between the chunks, and it is quiet for longer than quiet_s: still torn."""
    raw = weights.read_bytes()
    path = tmp_path / "slow_8.safetensors"
    asker = asker_of(path)
    cuts = [0, 4, 8, 40, len(raw) // 2, len(raw) - 1, len(raw)]
    for start, end in itertools.pairwise(cuts):
        puppet.do(f"f = open({str(path)!r}, 'ab'); f.write({raw[start:end]!r}); f.close()")
        asker.ask()
        found = asker.ask(still_s=1000.0)
        assert found.settled is (end == len(raw))
        if not found.settled:
            assert found.reason.startswith("incomplete: truncated: ")


@pytest.mark.parametrize("form", ["weights", "state"])
def test_a_file_filled_through_a_mapping_is_settled_only_when_it_is_unmapped(tmp_path, request, puppet, form, asker_of):
    """It has its full size and its header while its tail is zeros, and its descriptor is closed."""
    whole = request.getfixturevalue(form)
    raw, path = whole.read_bytes(), tmp_path / f"mapped_9{whole.suffix}"
    puppet.do(f"""
        import mmap
        f = open({str(path)!r}, "w+b")
        f.truncate({len(raw)})
        m = mmap.mmap(f.fileno(), {len(raw)})
        f.close()
    """)
    asker = asker_of(path)
    half = len(raw) // 2
    for start, end in ((0, half), (half, len(raw))):
        puppet.do(f"m[{start}:{end}] = {raw[start:end]!r}")
        found = asker.ask(still_s=1000.0)
        assert (found.settled, found.reason) == (False, "writer")
    puppet.do("m.close()")
    assert asker.ask().settled


def test_a_file_rewritten_in_place_is_not_taken_for_the_older_one(weights, puppet, asker_of):
    """It is whole from the first byte to the last, all the while: structure alone proves nothing."""
    raw = weights.read_bytes()
    asker = asker_of(weights)
    assert asker.ask().settled
    puppet.do(f"f = open({str(weights)!r}, 'r+b', buffering=0)")
    puppet.do(f"f.seek({len(raw) - 100}); f.write(b'x' * 50)")
    found = asker.ask(still_s=1000.0)
    assert (found.settled, found.reason) == (False, "writer")
    puppet.do("f.close()")
    assert asker.ask().settled


def test_a_torch_file_half_rewritten_is_found_by_its_checksums(state, puppet, asker_of):
    """Open, write, close for each chunk: no writer is seen, the structure is whole, the bytes are not."""
    raw = state.read_bytes()
    at = raw.index(torch.arange(1000.0).numpy().tobytes())
    puppet.do(f"f = open({str(state)!r}, 'r+b'); f.seek({at}); f.write(b'new data'); f.close()")
    asker = asker_of(state)
    for still_s in (0.0, 1000.0):
        found = asker.ask(still_s)
        assert (found.settled, found.reason.split(":")[:2]) == (False, ["incomplete", " crc"])


def test_told_does_not_excuse_a_torn_file_or_an_open_writer(weights, puppet, asker_of):
    """The file hand-off says it is done; what says otherwise is believed."""
    asker = asker_of(weights, told=True)
    puppet.do(f"f = open({str(weights)!r}, 'r+b')")
    assert asker.ask().reason == "writer"
    puppet.do("f.close()")
    assert (asker.ask().settled, asker.ask().reason) == (True, "told")
    os.truncate(weights, weights.stat().st_size - 1)
    assert asker.ask().reason.startswith("incomplete: truncated")


def test_told_is_enough_for_a_format_that_cannot_tell(tmp_path, asker_of):
    path = tmp_path / "arrays.npz"
    path.write_bytes(b"anything")
    assert asker_of(path, told=True).ask().reason == "told"
    assert asker_of(path).ask().reason == "young"


def test_a_format_that_cannot_tell_waits_for_quiet_without_a_writer(tmp_path, puppet, asker_of):
    """np.save, Keras, HDF5: no writer, and quiet_s without a change since the last look."""
    path = tmp_path / "weights_5.npy"
    puppet.do("import numpy")
    puppet.do(f"f = open({str(path)!r}, 'wb'); numpy.save(f, numpy.ones(100))")
    asker = asker_of(path)
    assert asker.ask(1000.0).reason == "writer"
    puppet.do("f.close()")
    assert asker.ask().reason in {"young", "changing"}
    young = asker.ask(still_s=QUIET_S - 1)
    assert (young.settled, young.reason, young.retry_after_s) == (False, "young", 1.0)
    done = asker.ask(still_s=QUIET_S)
    assert (done.settled, done.reason, done.format, done.step) == (True, "lease", "opaque", 5)


def test_a_change_starts_the_quiet_time_again(tmp_path, asker_of):
    path = tmp_path / "model.h5"
    path.write_bytes(b"first")
    asker = asker_of(path)
    asker.ask()
    with path.open("ab") as file:
        file.write(b"more")
    found = asker.ask(still_s=1000.0)
    assert (found.settled, found.reason, found.retry_after_s) == (False, "changing", QUIET_S)
    assert asker.ask(still_s=QUIET_S).settled


def test_a_legacy_torch_file_waits_for_quiet(tmp_path, asker_of):
    """It has no end mark."""
    path = tmp_path / "old.pt"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    asker = asker_of(path)
    assert (asker.ask().settled, asker.ask(QUIET_S).reason) == (False, "lease")


def test_a_torn_file_is_asked_about_less_and_less_often(weights, asker_of):
    """It is never called complete, and costs ever less."""
    os.truncate(weights, 100)
    asker = asker_of(weights)
    pauses = [asker.ask(still_s).retry_after_s for still_s in (0.0, 10.0, 100.0, 1e6)]
    assert pauses == [1.0, 10.0, 100.0, settle.INCOMPLETE_RETRY_S[1]]


def test_a_torn_file_is_not_read_again_while_it_is_the_same(state, monkeypatch, asker_of):
    """A torn file of 20 GB in a watched root would otherwise be read for ever."""
    raw = bytearray(state.read_bytes())
    raw[raw.index(b"\0\0\x80?")] ^= 1
    state.write_bytes(raw)
    asked = []
    real = settle.examine
    monkeypatch.setattr(settle, "examine", lambda question, context: asked.append(question) or real(question, context))
    asker = asker_of(state)
    asker.ask()
    assert asker.ask(60.0).reason.startswith("incomplete: crc")
    known = len(asked)
    assert asker.ask(120.0).reason.startswith("incomplete: crc")
    assert len(asked) == known
    with state.open("r+b") as file:
        raw[raw.index(b"\1\0\x80?")] ^= 1
        file.write(raw)
    assert asker.ask().settled


def test_without_leases_a_torn_file_is_read_again_each_time(weights, asker_of, monkeypatch):
    """A shared mapping may fill it without touching its times, and nothing tells that it is there."""
    raw = weights.read_bytes()
    weights.write_bytes(b"\0" * len(raw))
    monkeypatch.setattr(settle, "probe", lambda _: Writer.UNKNOWN)
    asker = asker_of(weights)
    for _ in range(2):
        assert asker.ask(1000.0).reason.startswith("incomplete")
    facts = weights.stat()
    real = settle.identity
    monkeypatch.setattr(settle, "identity", lambda *_: asker.last)
    weights.write_bytes(raw)
    assert real(facts) == asker.last
    assert asker.ask(1000.0).settled


def test_without_leases_a_whole_file_waits_for_quiet(weights, monkeypatch, asker_of):
    """Another user's file, or a network file system: whole and quiet, and reported as that."""
    monkeypatch.setattr(settle, "probe", lambda _: Writer.UNKNOWN)
    asker = asker_of(weights)
    assert asker.ask().reason == "young"
    found = asker.ask(still_s=QUIET_S)
    assert (found.settled, found.reason, found.format) == (True, "quiet", "safetensors")


def test_on_a_network_file_system_no_lease_is_asked_for(weights, monkeypatch, asker_of):
    monkeypatch.setattr(settle, "_is_remote", lambda *_: True)
    monkeypatch.setattr(settle, "probe", lambda _: pytest.fail("a lease was asked for"))
    asker = asker_of(weights)
    assert [asker.ask().reason, asker.ask(QUIET_S).reason] == ["young", "quiet"]


def test_another_users_file_is_no_writer_and_no_error(tmp_path):
    """EACCES for one who is neither owner nor privileged: then quiet must do."""
    if os.getuid() != 0:
        pytest.skip("needs root to be somebody else for a moment")
    path = tmp_path / "m.h5"
    path.write_bytes(b"x")
    path.chmod(0o644)
    for above in (tmp_path, *tmp_path.parents):
        if above != above.parent:
            above.chmod(above.stat().st_mode | 0o011)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresuid(12345, 12345, 12345)
            fd = os.open(path, os.O_RDONLY)
            status = 0 if lease.probe(fd) is Writer.UNKNOWN else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_lease_is_never_taken_while_sigio_would_kill(weights):
    """The kernel sends it to the holder, and its default action is death."""
    before = signal.signal(signal.SIGIO, signal.SIG_DFL)
    try:
        with weights.open("rb") as file, pytest.raises(Bug):
            lease.probe(file.fileno())
    finally:
        signal.signal(signal.SIGIO, before)


def test_a_probe_leaves_no_lease_behind(weights, puppet):
    """A writer that comes right after it is not kept waiting (it would be for 45 s)."""
    with weights.open("rb") as file:
        assert lease.probe(file.fileno()) is Writer.NONE
        started_s = time.monotonic()
        puppet.do(f"f = open({str(weights)!r}, 'r+b')")
        assert time.monotonic() - started_s < 25
        assert lease.probe(file.fileno()) is Writer.OPEN


def test_nemos_marker_beside_a_file_keeps_it_unsettled(tmp_path, weights, asker_of):
    marked = weights.rename(tmp_path / "a.safetensors")
    marker = tmp_path / "a-unfinished"
    marker.touch()
    assert asker_of(marked).ask().reason == "incomplete: 'a-unfinished' marks it"
    marker.unlink()
    assert asker_of(marked).ask().settled


@pytest.mark.parametrize(
    ("name", "why"),
    [("m.pt.tmp", "name"), (".m.pt", "name"), (".ckptd-trash", "our own"), (".x.ckptd-tmp-ab-cd", "our own")],
)
def test_unfinished_names_are_refused(tmp_path, name, why, asker_of):
    (tmp_path / name).write_bytes(b"x")
    found = asker_of(tmp_path / name).ask()
    assert not found.settled
    assert found.reason.startswith("refused: ")
    assert why in found.reason


def test_an_unfinished_name_may_be_handed_over_by_its_writer(tmp_path, weights, asker_of):
    renamed = weights.rename(tmp_path / "best.safetensors.tmp")
    assert asker_of(renamed).ask().reason.startswith("refused")
    assert asker_of(renamed, told=True).ask().settled


def test_links_fifos_and_devices_are_refused_and_never_opened(tmp_path, weights, asker_of):
    """S12, S14."""
    (tmp_path / "link.safetensors").symlink_to(weights)
    os.mkfifo(tmp_path / "fifo.pt")
    assert asker_of(tmp_path / "link.safetensors").ask().reason == "refused: symlink"
    assert asker_of(tmp_path / "fifo.pt").ask().reason == "refused: neither a file nor a directory"
    (tmp_path / "around").symlink_to(tmp_path)
    request = Settle(root=str(tmp_path), path=f"{tmp_path}/around/{weights.name}", quiet_s=0.0)
    assert settle.run(request, Context()).reason.startswith("refused: ")


def test_what_is_not_below_the_root_is_an_error(tmp_path):
    with pytest.raises(BadPath):
        settle.run(Settle(root=str(tmp_path), path="/etc/passwd", quiet_s=0.0), Context())
    with pytest.raises(NotFound):
        settle.run(Settle(root=f"{tmp_path}/none", path=f"{tmp_path}/none/m.pt", quiet_s=0.0), Context())


def test_a_file_that_changes_between_two_looks_is_not_settled(weights, monkeypatch, asker_of):
    """F26: the identity is taken again after everything else."""
    real = settle.examine

    def examine(question, context):
        found = real(question, context)
        os.utime(weights)
        return found

    monkeypatch.setattr(settle, "examine", examine)
    found = asker_of(weights).ask()
    assert (found.settled, found.reason) == (False, "changing")


def test_a_file_that_is_replaced_between_two_looks_is_not_settled(weights, asker_of, monkeypatch):
    """F14: the descriptor still shows the old one, whole and unchanged but for its links."""
    real, other = settle.examine, weights.with_name("other.safetensors")
    other.write_bytes(b"torn")
    keep = os.open(weights, os.O_RDONLY)
    seen = settle.identity(os.fstat(keep))
    monkeypatch.setattr(settle, "identity", lambda *_: seen)

    def examine(question, context):
        found = real(question, context)
        other.replace(weights)
        return found

    monkeypatch.setattr(settle, "examine", examine)
    found = asker_of(weights).ask()
    os.close(keep)
    assert (found.settled, found.reason) == (False, "changing")


def test_a_writer_that_comes_between_two_looks_is_seen(weights, puppet, monkeypatch, asker_of):
    """The lease is asked for twice: at the first look nobody had it open."""
    real = settle.examine

    def examine(question, context):
        found = real(question, context)
        puppet.do(f"f = open({str(weights)!r}, 'r+b')")
        return found

    monkeypatch.setattr(settle, "examine", examine)
    found = asker_of(weights).ask()
    assert (found.settled, found.reason) == (False, "writer")


def test_an_answer_travels(weights, asker_of):
    """It is a frame later."""
    assert msgspec.json.decode(msgspec.json.encode(asker_of(weights).ask()))["settled"] is True
