"""A nursery of trainers: imports torch once, then forks a process for each connection, which does what it is told.

    python run_trainer.py SOCKET [--plain]      ends when its standard input does, and all its trainers with it

One JSON object per line each way. A trainer is a process of its own with its own session; nothing of ckptd
has run in the nursery before the fork. `die` kills a trainer by SIGKILL at a moment of save() that no
message from outside could hit.
"""

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

PLAIN = "--plain" in sys.argv

if not PLAIN:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[2]))

    from tests.support import payload

import ckptd_client  # noqa: E402 - torch comes first, as in a training script
from ckptd_client import arena as arenas  # noqa: E402
from ckptd_client import (  # noqa: E402
    commits,
    connection,
    control,
    experiment,
    finder,
    loader,
    overflow,
    saver,
    session,
    spool,
)

OPEN_S = 30.0  # a machine that does much else starts a daemon and its worker in more than the seconds of the product


class Trainer:
    """One forked process."""

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        self.runs: dict[str, Any] = {}
        self.handles: dict[str, Any] = {}
        self.pushes: dict[str, list[list[str]]] = {}
        self._watch_pushes()
        for module in (experiment, loader, saver, session):
            module.OPEN_S = float(os.environ.get("TRAINER_OPEN_S", OPEN_S))
        session.CLOSE_S = max(session.CLOSE_S, session.OPEN_S)

    def _watch_pushes(self) -> None:
        """Keep every level as the daemon says it: a handle itself would never show one that goes down."""
        apply = ckptd_client.Handle.apply

        def noted(handle: Any, push: dict[str, Any]) -> None:
            self.pushes.setdefault(handle.id, []).append([str(push.get("level")), str(push.get("state"))])
            apply(handle, push)

        ckptd_client.Handle.apply = noted

    def open(self, name: str, run: str = "", **given: Any) -> dict[str, Any]:
        self.runs[run] = ckptd_client.Experiment(name, **given)
        return {}

    def prepare(self, seed: int = 0, size_bytes: int = 0, run: str = "", wait_s: float = 60.0) -> dict[str, Any]:
        """Until there is memory: a first try to connect that fails is a no at once."""
        state, end_s = self._state(seed, size_bytes), time.monotonic() + wait_s
        while not (ready := self.runs[run].prepare(state, wait_s=20.0)) and time.monotonic() < end_s:
            time.sleep(0.1)
        return {"ready": ready}

    def _state(self, seed: int, size_bytes: int) -> dict[str, Any]:
        if PLAIN:
            return {"seed": seed, "text": "x" * size_bytes}
        made = payload.arrays(seed, size_bytes or payload.SMALL_BYTES)
        tensors = {stem: {name: torch.from_numpy(a) for name, a in of.items()} for stem, of in made.items()}
        return {**tensors, **payload.plain(seed)}

    def save(self, seed: int, size_bytes: int = 0, run: str = "", **given: Any) -> dict[str, Any]:
        """Save; `die` names the moment of death, `victims` who dies first, `scribble` writes over the state at once."""
        die, victims = given.pop("die", ""), given.pop("victims", [])
        scribble = given.pop("scribble", False)
        state = self._state(seed, size_bytes)
        if die:
            self._prepare_to_die(die, victims)
        begun_s = time.monotonic()
        handle = self.runs[run].save(state, **given)
        took_s = time.monotonic() - begun_s
        if die in {"after", "before_message"}:  # the latter when there was no message to send: it went into the spool
            self._die(victims)
        if scribble:
            for stem in ("model", "optimizer"):
                for tensor in state[stem].values():
                    tensor.fill_(-1)
        self.handles[handle.id] = handle
        return {"id": handle.id, "took_s": took_s, **self._told(handle)}

    def _prepare_to_die(self, moment: str, victims: list[int]) -> None:
        whole = control.commit

        def torn(page: Any, *given: Any) -> None:
            """All of a commit but the word itself."""
            whole(page, *given)
            control.set_state(page, control.WRITING)
            self._die(victims)

        def deadly(*_: Any, **__: Any) -> None:
            self._die(victims)

        seams: dict[str, tuple[Any, str, Any]] = {
            "mid_copy": (arenas, "_write_state", deadly),
            "before_flip": (control, "commit", deadly),
            "torn": (control, "commit", torn),
            "before_message": (commits.Commits, "add", deadly),
            "spooling": (spool.os, "rename", deadly),
            "spooled": (overflow.spool, "sync_directory", deadly),
        }
        if moment in seams:
            owner, name, replacement = seams[moment]
            assert hasattr(owner, name), f"{moment}: there is no {name} any more"
            setattr(owner, name, replacement)
        way = saver.Saver._into_spool

        def noted(*given: Any) -> None:
            self.in_arena = False
            way(*given)

        self.in_arena = True
        saver.Saver._into_spool = noted

    def _die(self, victims: list[int]) -> None:
        """Say whether the save went into an arena; then SIGKILL, the others first."""
        self.peer.sendall(json.dumps({"in_arena": self.in_arena}).encode() + b"\n")
        for pid in (*victims, os.getpid()):
            os.kill(pid, signal.SIGKILL)

    def _told(self, handle: Any) -> dict[str, Any]:
        error = handle.error
        return {
            "level": handle.level,
            "state": handle.state,
            "spooled": handle.spooled,
            "path": handle.path,
            "error": None if error is None else {"code": getattr(error, "code", ""), "message": str(error)},
            "pushes": self.pushes.get(handle.id, []),
        }

    def handle(self, id: str) -> dict[str, Any]:  # noqa: A002
        return self._told(self.handles[id])

    def wait(self, id: str, level: str = "verified", timeout: float = 60.0) -> dict[str, Any]:  # noqa: A002
        handle = self.handles[id]
        with contextlib.suppress(ckptd_client.CkptdClientError):
            handle.wait(level, timeout)
        return self._told(handle)

    def stream(self, threads: int, saves: int, project: str, directory: str, first: int) -> dict[str, Any]:
        """`threads` threads, each with an experiment of its own; all save as fast as they are let.

        A daemon that many ask at once may be silent for longer than the product bears; what goes into the spool
        for that comes after what was saved later.
        """
        connection.HANG_S = finder.HELLO_S = OPEN_S
        made: dict[str, list[list[Any]]] = {}
        ready = threading.Barrier(threads)

        def train(number: int) -> None:
            name = f"run-{first + number}"
            # What waits in vain for its overlap goes into the spool, and comes after what was saved later.
            run = ckptd_client.Experiment(name, project=project, dir=directory, overlap_wait_s=300.0)
            end_s = time.monotonic() + 120.0
            while not run.prepare({"seed": 0, "text": name}, wait_s=20.0) and time.monotonic() < end_s:
                time.sleep(0.1)
            ready.wait(180)
            for step in range(saves):
                handle = run.save({"seed": step, "text": name}, step=step)
                made.setdefault(name, []).append([handle.id, step, handle.state])
            run.close()

        workers = [threading.Thread(target=train, args=(number,)) for number in range(threads)]
        begun_s = time.monotonic()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return {"saves": made, "took_s": time.monotonic() - begun_s}

    def log(self, metrics: dict[str, float], step: int, run: str = "") -> dict[str, Any]:
        self.runs[run].log(metrics, step)
        return {}

    def stats(self, run: str = "") -> dict[str, Any]:
        return {**self.runs[run].stats(), "experiment": self.runs[run].id}

    def flush(self, run: str = "", timeout_s: float = 30.0) -> dict[str, Any]:
        return {"safe": self.runs[run].flush(timeout_s)}

    def close(self, run: str = "", **given: Any) -> dict[str, Any]:
        begun_s = time.monotonic()
        self.runs[run].close(**given)
        return {"took_s": time.monotonic() - begun_s}

    def load(self, selector: str = "latest", seed: int = 0, size_bytes: int = 0, run: str = "") -> dict[str, Any]:
        """Load and compare with the state of `seed`."""
        found = self.runs[run].load(selector)
        if found is None:
            return {"found": False}
        wanted = self._state(seed, size_bytes)
        same = found["seed"] == wanted["seed"] and found["text"] == wanted["text"]
        for stem in ("model", "optimizer"):
            if stem in wanted:
                same = same and all(torch.equal(found[stem][name], of) for name, of in wanted[stem].items())
        self.loaded = found
        return {"found": True, "same": same}

    def modules(self) -> dict[str, Any]:
        return {"loaded": sorted(name for name in ("torch", "numpy", "ckptd") if name in sys.modules)}


def serve(peer: socket.socket) -> None:
    with peer.makefile("r", encoding="utf-8") as lines:
        os.environ.update(json.loads(lines.readline()))
        peer.sendall(json.dumps({"pid": os.getpid()}).encode() + b"\n")
        trainer = Trainer(peer)
        for line in lines:
            order = json.loads(line)
            verb = order.pop("do")
            if verb == "quit":
                return  # as a script ends: its exit handlers run
            try:
                answer = getattr(trainer, verb)(**order)
            except Exception as error:  # noqa: BLE001 - told to whoever gave the order
                answer = {"raised": f"{type(error).__name__}: {error}"}
            peer.sendall(json.dumps(answer).encode() + b"\n")


def bind_to_parent() -> None:
    """Die with the nursery, whatever it dies of: nobody else knows this process."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def main() -> int:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(sys.argv[1])
    listening.listen(64)
    # Else Python's collector looks at all that torch brought, once, in the middle of some save() of each trainer, and
    # copies the pages that they share: 70 ms and more that no save() needs.
    gc.freeze()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for trainers: the kernel buries them
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return 0
        peer, _ = listening.accept()
        if os.fork() == 0:
            bind_to_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            serve(peer)
            return 0
        peer.close()


if __name__ == "__main__":
    sys.exit(main())
