"""Runs one case in a process of its own, within its time, and leaves nothing of it behind."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench import meter
from tests.bench.venv import REPOSITORY

PR_SET_CHILD_SUBREAPER = 36
GB = 1 << 30
BASE_LIMIT_S, LIMIT_S_PER_GB = 60.0, 120.0


@dataclass(frozen=True)
class Job:
    """One case to run. `size_mb` in MiB."""

    peer: str
    size_mb: int
    shape: str
    round: int
    warm_saves: int

    @property
    def label(self) -> str:
        """A name for files and for people."""
        return f"{self.size_mb}MB-{self.shape}-{self.peer}-{self.round}"

    @property
    def limit_s(self) -> float:
        """Wall time after which the case is ended."""
        return BASE_LIMIT_S + LIMIT_S_PER_GB * self.size_mb / 1024


@dataclass(frozen=True)
class Bench:
    """Where everything is: the peers' python, the scratch folder, the result file."""

    python: Path
    folder: Path
    results: Path


def adopt_orphans() -> None:
    """Make processes that a case leaves behind our own children, so that we can end them by pid."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end(pids: list[int]) -> None:
    """SIGKILL each of `pids` and reap those that are our children."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _sweep(run_id: str, scratch: Path) -> None:
    """Remove what peers leave outside of their folder, by names that only this case used."""
    for segment in Path("/dev/shm").glob(f"*{run_id}*"):
        segment.unlink(missing_ok=True)
    shutil.rmtree(f"/tmp/ckpt_sock/{run_id}", ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)


def run(job: Job, bench: Bench) -> str:
    """Run one case; returns "ok" or what went wrong. Its measurements are in bench.results."""
    run_id = f"ckptdbench{os.getpid()}x{time.monotonic_ns()}"
    scratch = bench.folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    loop_s = 2.0 + 6.0 * min(job.size_mb / 1024, 2.0)
    case = {
        "peer": job.peer,
        "size_bytes": job.size_mb << 20,
        "shape": job.shape,
        "folder": str(scratch),
        "out": str(bench.results),
        "round": job.round,
        "warm_saves": job.warm_saves,
        "loop_s": loop_s,
    }
    log = bench.folder / "logs" / f"{job.label}.log"
    log.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": run_id, "PYTHONPATH": str(REPOSITORY)}
    command = [str(bench.python), "-m", "tests.bench.case", json.dumps(case)]
    begun = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, cwd=REPOSITORY, env=environment)
        try:
            status = child.wait(job.limit_s)
            outcome = "ok" if status == 0 else f"ended with {status}: {_last_words(log)}"
        except subprocess.TimeoutExpired:
            outcome = f"took longer than {job.limit_s:.0f} s"
        finally:
            end([pid for pid in meter.tree(os.getpid()) if pid != os.getpid()])
            _sweep(run_id, scratch)
    with bench.results.open("a") as results:
        row = {**asdict(job), "size_bytes": job.size_mb << 20, "kind": "outcome", "outcome": outcome}
        results.write(json.dumps({**row, "wall_s": time.monotonic() - begun}) + "\n")
    return outcome


def _last_words(log: Path) -> str:
    """Return the line that says most about why a case died: its last before the interpreter's own clean-up."""
    said, _, _ = log.read_text(errors="replace").partition("Exception ignored in")
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"
