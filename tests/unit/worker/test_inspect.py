"""The verb inspect and the parser children behind it: bounded, reused, and never the worker's end."""

import os
import signal
import struct
import subprocess
import sys
import threading
import zipfile

import pytest

from ckptd.errors import BadPath, Bug, Busy, TimedOut
from ckptd.worker import examine, inspect
from ckptd.worker.context import Cancelled, Context, Limits
from ckptd.worker.parser import Question
from ckptd.worker.protocol import Inspect
from tests.support.node import eventually

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file


@pytest.fixture
def small():
    """Children with little memory and time, ended with the test."""
    found = examine.Parsers(Limits(parser_bytes_max=192 << 20, parser_cpu_s=1.0))
    yield found
    found.close()


@pytest.fixture
def forgetful():
    """Children with little memory, and time enough for a slow machine to run out of it."""
    found = examine.Parsers(Limits(parser_bytes_max=192 << 20, parser_cpu_s=30.0))
    yield found
    found.close()


def ask(parsers, path, **more):
    return parsers.ask(Question(str(path.parent), str(path), **more), Context())


def test_inspect_answers_what_the_readers_read(tmp_path, context):
    """M003, M004: step from the name, tensors from the file."""
    path = tmp_path / "model_12.safetensors"
    save_file({"w": torch.ones(2, 3)}, path)
    found = inspect.run(Inspect(root=str(tmp_path), path=str(path)), context)
    assert (found.format, found.complete, found.step, found.tensors_total) == ("safetensors", True, 12, 1)
    assert inspect.run(Inspect(root=str(tmp_path), path=str(path), tensors_max=0), context).tensors == []


def test_a_step_directory_gives_its_step_to_a_file_without_one(tmp_path, context):
    (tmp_path / "step_70").mkdir()
    path = tmp_path / "step_70" / "model.safetensors"
    save_file({"w": torch.ones(2)}, path)
    assert inspect.run(Inspect(root=str(tmp_path), path=str(path)), context).step == 70


def test_a_state_gives_its_step_where_no_name_does(tmp_path, context):
    path = tmp_path / "last.ckpt"
    torch.save({"global_step": 99, "epoch": 4}, path)
    found = inspect.run(Inspect(root=str(tmp_path), path=str(path)), context)
    assert (found.step, found.epoch) == (99, 4.0)


def test_two_thousand_questions_start_one_child(tmp_path):
    """A burst of files must not be a burst of processes."""
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, path)
    parsers = examine.Parsers(Limits())
    try:
        for _ in range(2000):
            assert ask(parsers, path).found.complete is True
        assert parsers.started == 1
    finally:
        parsers.close()


def other_parser(monkeypatch, code):
    """Let children run `code` (after the import of the parser as `parser`) instead."""
    original = examine.command

    def command(limits):
        return [sys.executable, "-c", f"from ckptd.worker import parser; {code}", *original(limits)[-2:]]

    monkeypatch.setattr(examine, "command", command)


@pytest.mark.parametrize(
    "end", ["raise ImportError('libz.so.1: Too many open files')", "import os; os.kill(os.getpid(), 9)"]
)
def test_a_child_that_can_not_start_says_nothing_of_its_file(tmp_path, small, monkeypatch, end):
    """Out of memory or descriptors: the machine is to blame, and a good file is asked about again."""
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, path)
    with monkeypatch.context() as patch:
        other_parser(patch, end)
        with pytest.raises(Busy, match="no parser can be started now"):
            ask(small, path)
    assert ask(small, path).found.complete is True


def test_a_child_that_went_idle_is_replaced_without_a_word(tmp_path, small, monkeypatch):
    """It ends with status 0 between two questions; the second one is asked again."""
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, path)
    other_parser(monkeypatch, "parser.IDLE_S = 1.0; parser.main()")
    assert ask(small, path).found.complete is True
    before = small.started
    assert small._free[0]._process.wait() == 0
    assert ask(small, path).found.complete is True
    assert small.started > before


def test_a_child_that_is_slow_to_be_buried_is_not_taken_for_one_that_its_file_killed(tmp_path, small, monkeypatch):
    """It had gone idle; a machine that stands still for a second must not make a good file a broken one."""
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, path)
    other_parser(monkeypatch, "parser.IDLE_S = 1.0; parser.main()")
    assert ask(small, path).found.complete is True
    small._free[0]._process.wait()
    real, early = examine._Child.reaped, [False] * 8
    monkeypatch.setattr(examine._Child, "reaped", lambda child, wait_s: early.pop() if early else real(child, wait_s))
    assert ask(small, path).found.complete is True
    assert early == []


def test_a_child_that_is_never_buried_says_nothing_of_its_file(tmp_path, small, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, path)
    assert ask(small, path).found.complete is True
    small._free[0]._process.kill()
    small._free[0]._process.wait()
    with monkeypatch.context() as patch:
        patch.setattr(examine, "_BURIAL_S", 0.1)
        patch.setattr(examine._Child, "reaped", lambda _child, _wait_s: False)
        with pytest.raises(TimedOut, match="has not ended"):
            ask(small, path)
    assert ask(small, path).found.complete is True


def pickled(path, stream):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", stream)
    return path


def test_a_file_that_takes_too_much_memory_is_an_invalid_format(tmp_path, forgetful):
    """S18: 3 MB that describe 300 MB end as an answer, and the next question is answered."""
    bomb = pickled(tmp_path / "bomb.pt", b"\x80\x02" + b"(" * 3_000_000 + b".")
    assert ask(forgetful, bomb).found.problem.startswith("invalid_format: takes over")
    good = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, good)
    assert ask(forgetful, good).found.complete is True


def test_a_file_that_takes_too_much_time_is_an_invalid_format(tmp_path, small, monkeypatch):
    """S18: the kernel ends the child, the answer says why. No known file takes so long, so the reader is a loop."""
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, path)
    other_parser(monkeypatch, "parser.formats.read_file = lambda *_: all(True for _ in iter(int, 1)); parser.main()")
    assert ask(small, path).found.problem == "invalid_format: reading it takes over 1 s of CPU time"


def test_the_longest_stream_of_opcodes_is_read_within_the_default_limits(tmp_path):
    """Eight million opcodes are refused by their number before they are too slow: no honest file is near it."""
    path = pickled(tmp_path / "m.pt", b"\x80\x02" + b"\x880" * 4_100_000 + b"\x88.")
    parsers = examine.Parsers(Limits(parser_cpu_s=60.0))  # on some machines a second does a third of the work
    try:
        found = ask(parsers, path).found
    finally:
        parsers.close()
    assert (found.complete, "opcodes" in found.extra["unread"]) == (True, True)


def test_a_child_that_is_killed_is_no_end_of_the_worker(tmp_path, small):
    """S19, F24."""
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, path)
    assert ask(small, path).found.complete is True
    small._free[0]._process.kill()
    small._free[0]._process.wait()
    assert ask(small, path).found.problem == "invalid_format: it ended its parser with SIGKILL"
    assert ask(small, path).found.complete is True


def test_a_parser_that_fails_by_itself_is_a_bug_with_its_traceback(tmp_path, small, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, path)
    monkeypatch.setattr(examine.msgspec.json, "encode", lambda _: b"not a question")
    with pytest.raises(Bug) as caught:
        ask(small, path)
    assert "Traceback" in caught.value.details["traceback"]


def test_a_pickle_that_would_run_code_runs_none_in_the_child_either(tmp_path, context):
    """S17."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    path = tmp_path / "m.pt"
    torch.save({"bomb": Bomb(), "w": torch.ones(1)}, path)
    found = inspect.run(Inspect(root=str(tmp_path), path=str(path)), context)
    assert (found.complete, found.tensors_total) == (True, 1)
    assert not (tmp_path / "canary").exists()


def test_the_child_can_write_no_file(tmp_path):
    """Its file size limit is 0: even bytes that took it over could not leave any."""
    parsers = examine.Parsers(Limits())
    try:
        path = tmp_path / "m.safetensors"
        save_file({"w": torch.ones(2)}, path)
        ask(parsers, path)
        pid = parsers._free[0]._process.pid
        with open(f"/proc/{pid}/limits") as file:
            limits = {line[:26].strip(): line[26:].split()[0] for line in file}
        assert (limits["Max file size"], limits["Max core file size"]) == ("0", "0")
        assert limits["Max address space"] == str(512 << 20)
    finally:
        parsers.close()


def test_a_file_of_20_gb_is_inspected_by_less_than_a_megabyte(tmp_path, small):
    header = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (20 << 30, 20 << 30)
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + (20 << 30))
    answer = ask(small, path, tensors_max=10)
    assert answer.found.complete is True
    assert answer.read_bytes < 1 << 20


@pytest.mark.parametrize("kind", ["link", "fifo", "through a link", "outside"])
def test_what_is_no_plain_file_below_the_root_is_refused(tmp_path, context, kind):
    """S12, S14."""
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    target = root / "real" / "m.safetensors"
    save_file({"w": torch.ones(2)}, target)
    (root / "link.safetensors").symlink_to(target)
    (root / "around").symlink_to(root / "real")
    os.mkfifo(root / "fifo.safetensors")
    paths = {
        "link": "link.safetensors",
        "fifo": "fifo.safetensors",
        "through a link": "around/m.safetensors",
        "outside": "../root/real/m.safetensors",
    }
    with pytest.raises(BadPath):
        inspect.run(Inspect(root=str(root), path=f"{root}/{paths[kind]}"), context)


def test_what_is_gone_is_an_error_of_the_file_system(tmp_path, context):
    with pytest.raises(FileNotFoundError):
        inspect.run(Inspect(root=str(tmp_path), path=str(tmp_path / "m.pt")), context)


@pytest.fixture
def stopped(tmp_path, small):
    """A child that does not answer: stopped, as one that waits for a dead disk."""
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, path)
    ask(small, path)
    small._free[0]._process.send_signal(signal.SIGSTOP)
    return path


def test_a_disk_that_does_not_answer_is_given_up(stopped, small, monkeypatch):
    """F17: the child is killed, the worker's thread is free again."""
    monkeypatch.setattr(examine, "SILENCE_S", 0.5)
    with pytest.raises(TimedOut):
        ask(small, stopped)
    monkeypatch.setattr(examine, "SILENCE_S", 60.0)
    assert ask(small, stopped).found.complete is True


def test_a_cancelled_question_ends_at_once(stopped, small):
    context = Context()
    threading.Timer(0.3, context.cancelled.set).start()
    with pytest.raises(Cancelled):
        small.ask(Question(str(stopped.parent), str(stopped)), context)


def test_checksums_beat_while_they_are_read(tmp_path, small, monkeypatch):
    """The daemon hears of progress, so a slow read of hours is not taken for a hang."""
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/data/0", b"\1" * (5 << 20))
    other_parser(monkeypatch, "parser.BEAT_S = 0.0; parser.main()")
    sent = []
    context = Context(send=sent.append, limits=Limits(alive_every_s=0.0))
    answer = small.ask(Question(str(tmp_path), str(path), crc=True), context)
    assert answer.found.complete is True
    assert sent == [{"alive": True}] * 7  # its start, the stream, each MiB


def test_an_answer_without_end_is_not_buffered(tmp_path, small, monkeypatch):
    """What a parser says is bounded too."""
    monkeypatch.setattr(examine, "ANSWER_BYTES_MAX", 1 << 20)
    other_parser(monkeypatch, "import sys; sys.stdout.write('x' * (8 << 20))")
    with pytest.raises(Bug, match="answer is over"):
        ask(small, tmp_path / "m.pt")


def test_a_file_beside_the_worker_is_not_imported_by_its_parser(tmp_path, monkeypatch):
    """A json.py in somebody's working directory is data, never code."""
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    (tmp_path / "zlib.py").write_text("raise SystemExit(3)")
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, path)
    monkeypatch.chdir(tmp_path)
    parsers = examine.Parsers(Limits())
    try:
        assert ask(parsers, path).found.complete is True
    finally:
        parsers.close()


def test_the_worker_itself_has_no_reader_of_pickles():
    """S17: only the parser child loads one, and it executes nothing."""
    code = (
        "import sys\n"
        "from ckptd.worker import inspect, scan, settle, watch\n"
        "print([name for name in ('torch', 'pickletools', 'numpy', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "[]\n"


def test_children_that_ended_while_they_waited_are_buried(tmp_path, monkeypatch):
    """One that went idle kept three descriptors and a dead entry among the processes until the next question."""
    monkeypatch.setattr(examine, "TIDY_S", 0.1)
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(1)}, path)
    parsers = examine.Parsers(Limits())
    kept, gone = parsers._start(), parsers._start()
    for child in (kept, gone):
        parsers._give_back(child)
    gone._process.terminate()
    eventually(lambda: parsers._free == [kept], "the ended one to be forgotten", 20)
    pipes = (gone._stdin, gone._stdout, gone._stderr)
    eventually(lambda: all(pipe.closed for pipe in pipes), "its pipes to be closed", 20)
    assert not os.path.exists(f"/proc/{gone._process.pid}")
    kept._process.terminate()
    eventually(lambda: parsers._free == [], "the other one, at a later look", 20)
    assert ask(parsers, path).found.complete
    assert parsers.started == 3
    parsers.close()
