"""A small daemon for tests of the client: a real Unix socket, real memfd arenas, real SCM_RIGHTS, scripted troubles.

    with FakeDaemon(path) as daemon:
        daemon.mute = True                      # accepts, reads, never answers: a stopped daemon
        daemon.refuse["lease"] = "no_arena"     # answers with this error code
        daemon.hang_up_on.add("commit")         # closes the connection instead of answering
        daemon.raw["status"] = b"..."           # answers with these bytes

It publishes what is committed only when told to (`publish`), or at once with `auto_publish`.
"""

import hashlib
import json
import mmap
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ckptd_client import control, wire

Message = dict[str, Any]
WAIT_S = 30.0


@dataclass
class Arena:
    """One memfd and what the daemon thinks of it: "free", "leased", "busy", "hot"."""

    id: bytes
    fd: int
    size_bytes: int
    page: mmap.mmap
    use: str = "free"
    holder: socket.socket | None = None  # the connection that it was lent over
    generation: int = 0
    checkpoint: str = ""

    def image(self) -> bytes:
        return os.pread(self.fd, self.size_bytes, 0)


@dataclass
class FakeDaemon:
    path: Path
    arenas_max: int = 2
    auto_publish: bool = False
    mute: bool = False
    refuse: dict[str, str] = field(default_factory=dict)
    hang_up_on: set[str] = field(default_factory=set)
    silent_on: set[str] = field(default_factory=set)
    raw: dict[str, bytes] = field(default_factory=dict)
    spool_dir: str = ""
    experiment: str | None = None
    attach_reply: Message | None = None

    def __post_init__(self) -> None:
        self.requests: list[Message] = []
        self.arenas: dict[str, Arena] = {}
        self.images: dict[str, bytes] = {}
        self.levels: dict[str, Message] = {}
        self._changed = threading.Condition()
        self._peers: dict[socket.socket, int] = {}
        self._waiting: list[tuple[socket.socket, Message, float]] = []
        self._open = False

    # life -----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.lose_arenas()

    def start(self) -> None:
        """Listen; arenas of an earlier life are kept, as by a service manager's store."""
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listening.bind(str(self.path))
        self._listening.listen(64)
        self._open = True
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()
        threading.Thread(target=self._expire, daemon=True).start()

    def stop(self) -> None:
        """Die: every connection breaks, the socket's name goes."""
        with self._changed:
            self._open = False
            peers, self._peers = list(self._peers), {}
            self._waiting.clear()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.path.unlink(missing_ok=True)
        for peer in peers:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    def lose_arenas(self) -> None:
        """Forget all arenas, as a daemon does that nobody keeps descriptors for."""
        with self._changed:
            for arena in self.arenas.values():
                arena.page.close()
                os.close(arena.fd)
            self.arenas.clear()

    # what a test looks at ---------------------------------------------------------------------

    def of(self, op: str) -> list[Message]:
        with self._changed:
            return [request for request in self.requests if request["op"] == op]

    def wait_for(self, op: str, count: int = 1) -> list[Message]:
        """Wait until `count` requests of this kind have come (and been handled)."""
        with self._changed:
            found = lambda: sum(r["op"] == op for r in self.requests) >= count  # noqa: E731
            assert self._changed.wait_for(found, WAIT_S), f"{op} did not come {count} times: {self.requests}"
        return self.of(op)

    def wait_staged(self, checkpoint: str) -> bytes:
        """Wait for a commit; return the arena's bytes as they were when it came."""
        with self._changed:
            assert self._changed.wait_for(lambda: checkpoint in self.images, WAIT_S)
            return self.images[checkpoint]

    def wait_leased(self, count: int) -> None:
        with self._changed:
            leased = lambda: sum(a.use == "leased" for a in self.arenas.values()) >= count  # noqa: E731
            assert self._changed.wait_for(leased, WAIT_S)

    @property
    def connections(self) -> int:
        return len(self._peers)

    # what a test does -------------------------------------------------------------------------

    def publish(self, checkpoint: str, level: str = "durable", state: str = "live", **more: Any) -> None:
        """Say that a checkpoint has climbed; its arena becomes a hot copy that may be lent again."""
        push = {"checkpoint": checkpoint, "level": level, "state": state, "path": f"/runs/{checkpoint}", **more}
        with self._changed:
            self.levels[checkpoint] = push
            for arena in self.arenas.values():
                if arena.checkpoint == checkpoint and arena.use == "busy":
                    control.set_state(arena.page, control.RELEASED)
                    arena.use = "hot"
            self._serve_waiting()
        self.push({"push": "level", **push})

    def push(self, message: Message) -> None:
        with self._changed:
            peers = list(self._peers)
        for peer in peers:
            self._send(peer, message)

    # the inside -------------------------------------------------------------------------------

    def _accept(self, listening: socket.socket) -> None:
        while self._open:
            try:
                peer, _ = listening.accept()
            except OSError:
                return
            pid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            with self._changed:
                if not self._open:  # it died between the accept and here
                    peer.close()
                    return
                self._peers[peer] = pid
            threading.Thread(target=self._serve, args=(peer, pid), daemon=True).start()

    def _serve(self, peer: socket.socket, pid: int) -> None:
        splitter = wire.Splitter()
        try:
            while data := peer.recv(1 << 16):
                for frame in splitter.feed(data):
                    self._handle(peer, pid, wire.decode(frame))
        except OSError:
            return
        finally:
            with self._changed:
                self._peers.pop(peer, None)
                self._waiting = [entry for entry in self._waiting if entry[0] is not peer]
                for arena in self.arenas.values():
                    if arena.holder is peer and arena.use == "leased":  # lent just before the client hung up
                        arena.use = "free"
                self._serve_waiting()
                self._changed.notify_all()
            peer.close()

    def _handle(self, peer: socket.socket, pid: int, message: Message) -> None:
        op = message["op"]
        with self._changed:
            if self.mute or op in self.silent_on:
                self.requests.append(message)
                self._changed.notify_all()
                return
            if op in self.hang_up_on:
                self.requests.append(message)
                self._changed.notify_all()
                peer.shutdown(socket.SHUT_RDWR)
                return
            if op in self.raw:
                peer.sendall(self.raw[op].replace(b"ID", str(message["id"]).encode()))
            elif op in self.refuse:
                self._reply(peer, message, error=self.refuse[op])
            elif op == "lease":
                self._waiting.append((peer, message, time.monotonic() + message["wait_s"]))
                self._serve_waiting()
            else:
                self._reply(peer, message, **getattr(self, "_" + op.replace(".", "_"), self._nothing)(message))
            self.requests.append(message)
            self._changed.notify_all()
        if op == "commit" and self.auto_publish and op not in self.refuse:
            self.publish(message["checkpoint"])

    def _nothing(self, _message: Message) -> Message:
        return {}

    def _hello(self, _message: Message) -> Message:
        return {"server": "fake", "version": 1, "uid": os.getuid(), "mode": "user", "spool_dir": self.spool_dir}

    def _experiment_open(self, message: Message) -> Message:
        return {"experiment": self.experiment or message["experiment"], "segment": 1, "existed": False, "latest": None}

    def _submit(self, message: Message) -> Message:
        return {"checkpoint": message["checkpoint"], "level": "none", "state": "pending"}

    def _watch(self, message: Message) -> Message:
        return {"states": [self.levels[i] for i in message["checkpoints"] if i in self.levels]}

    def _metrics(self, message: Message) -> Message:
        return {"accepted": len(message["points"])}

    def _attach(self, message: Message) -> Message:
        """Say what a test put into `attach_reply`; with "hot" its arena's descriptor rides along."""
        if self.attach_reply is None:
            return {"error": "not_found"}
        return self.attach_reply

    def _commit(self, message: Message) -> Message:
        arena = self.arenas.get(message["arena"])
        if message["checkpoint"] in self.images:  # a repeat
            return {"checkpoint": message["checkpoint"], "level": "staged", "state": "pending"}
        if arena is None or arena.generation != message["generation"]:
            return {"error": "no_arena"}
        image = arena.image()
        page = control.read(image)
        assert page is not None
        raw = image[page.descriptor_offset :][: page.descriptor_size]
        assert control.is_whole(page, raw), "committed, but the control page does not say so"
        arena.use, arena.checkpoint = "busy", message["checkpoint"]
        self.images[message["checkpoint"]] = image
        return {"checkpoint": message["checkpoint"], "level": "staged", "state": "pending"}

    def _abandon(self, message: Message) -> Message:
        arena = self.arenas.get(message["arena"])
        if arena is not None and arena.generation == message["generation"]:
            control.set_state(arena.page, control.FREE)
            arena.use = "free"
        return {}

    def _serve_waiting(self) -> None:
        """Lend what can be lent, oldest request first. Called with the lock held."""
        for entry in list(self._waiting):
            peer, message, _ = entry
            arena = self._available(message["size_bytes"])
            if arena is None:
                continue
            self._waiting.remove(entry)
            arena.use, arena.holder, arena.generation = "leased", peer, arena.generation + 1
            control.write_lease(arena.page, arena.id, arena.generation, self._peers.get(peer, 0))
            facts = {"arena": arena.id.hex(), "generation": arena.generation, "size_bytes": arena.size_bytes, "fds": 1}
            self._send(peer, {"id": message["id"], "ok": True, **facts}, fd=arena.fd)
            self._changed.notify_all()

    def _available(self, size_bytes: int) -> Arena | None:
        if not self._open:
            return None
        usable = [a for a in self.arenas.values() if a.use in {"free", "hot"} and a.size_bytes >= size_bytes]
        if len(self.arenas) < self.arenas_max and not any(a.use == "free" for a in usable):
            fd = os.memfd_create("fake-arena", os.MFD_CLOEXEC)
            os.posix_fallocate(fd, 0, size_bytes)
            arena = Arena(os.urandom(16), fd, size_bytes, mmap.mmap(fd, control.PAGE))
            self.arenas[arena.id.hex()] = arena
            return arena
        return usable[0] if usable else None

    def _expire(self) -> None:
        while self._open:
            time.sleep(0.02)
            with self._changed:
                for entry in list(self._waiting):
                    if time.monotonic() > entry[2]:
                        self._waiting.remove(entry)
                        self._reply(entry[0], entry[1], error="no_arena")

    def _reply(self, peer: socket.socket, message: Message, *, error: str | None = None, **fields: Any) -> None:
        if error is not None:
            failure = {"code": error, "message": f"refused by the test: {error}", "hint": ""}
            self._send(peer, {"id": message["id"], "ok": False, "error": failure})
        else:
            self._send(peer, {"id": message["id"], "ok": True, **fields})

    def _send(self, peer: socket.socket, message: Message, fd: int | None = None) -> None:
        if message.get("hot") and fd is None:
            fd = next(a.fd for a in self.arenas.values() if a.checkpoint == message["checkpoint"])
            message["fds"] = 1
        frame = wire.encode({"v": 1, **message})
        with suppress(OSError):
            if fd is None:
                peer.sendall(frame, socket.MSG_NOSIGNAL)
            else:
                socket.send_fds(peer, [frame], [fd])


def descriptor_of(image: bytes) -> Message:
    """Return the descriptor of an image; it must be committed and whole."""
    page = control.read(image)
    assert page is not None
    raw = image[page.descriptor_offset :][: page.descriptor_size]
    assert control.is_whole(page, raw)
    found = json.loads(raw)
    assert isinstance(found, dict)
    return found


def files_of(image: bytes) -> dict[str, bytes]:
    """Return the files in an image by name."""
    return {f["path"]: image[f["offset"] :][: f["size_bytes"]] for f in descriptor_of(image)["files"]}


def write_published(directory: Path, image: bytes) -> Path:
    """Write an image as a daemon publishes it; return the checkpoint's directory."""
    found = descriptor_of(image)
    target = directory / f"step_{found['step']:010d}"
    target.mkdir(parents=True)
    listed = []
    for name, body in files_of(image).items():
        (target / name).write_bytes(body)
        listed.append({"path": name, "size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(), "xxh3": []})
    manifest = {"v": 1, "checkpoint": found["checkpoint"], "step": found["step"], "revision": 0, "files": listed}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target
