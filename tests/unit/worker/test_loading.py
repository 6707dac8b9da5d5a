"""What a worker loads, when, and what it does when it can't."""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ckptd.errors import Busy
from ckptd.worker.__main__ import VERBS, Verb, load
from ckptd.worker.protocol import Digest
from tests.support.worker_process import WorkerProcess


def test_a_verb_that_can_not_be_loaded_now_is_asked_for_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of descriptors, a library is an ImportError: it says nothing of the file that was asked about."""

    def fails(name: str) -> None:
        raise ImportError(f"{name}.so: cannot open shared object file: Too many open files")

    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(Busy, match="Too many open files"):
        load(Verb("usage"))


def test_a_worker_has_all_its_code_before_it_is_asked(tmp_path: Path) -> None:
    """Another version may lie there later. Only what watches is left out: its library brings a reader of pickles."""
    code = "import sys; from ckptd.worker import __main__ as it; it.preload(); print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    there = set(told.stdout.split())
    assert {f"ckptd.worker.{verb.module}" for verb in VERBS.values()} - there == {"ckptd.worker.watch"}
    assert "pickle" not in there


def test_a_worker_loads_it_when_it_starts() -> None:
    with WorkerProcess() as worker:
        worker.send_raw(b'{"id":1,"verb":"none"}\n')
        assert not worker.reply(1)["ok"]
        assert (
            "/_posixsubprocess." in Path(f"/proc/{worker.process.pid}/maps").read_text()
        )  # what asks parsers needs it


def test_a_worker_does_not_outlive_a_thread_that_ends(tmp_path: Path) -> None:
    """Its request would have no answer, and the next ones one thread less."""
    breaks = "import sys; from ckptd.worker import __main__ as it; it.Loop._fail = None; it.main()"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", breaks, "--fd", str(theirs.fileno())]
        worker = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stderr=subprocess.PIPE, text=True)
        request = {"id": 1, **msgspec.to_builtins(Digest(root=str(tmp_path), path=str(tmp_path / "none")))}
        ours.sendall(msgspec.json.encode(request) + b"\n")
        _, told = worker.communicate(timeout=40)
    assert worker.returncode == os.EX_SOFTWARE
    assert msgspec.json.decode(told.splitlines()[-1])["event"] == "worker.internal"
