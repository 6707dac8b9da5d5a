"""A worker that does what its request's `root` tells it to: hang, crash, flood, or answer.

Speaks the real frames over the real socket, reads and writes blocking, and knows no storage.
The last component of `root` (or of `path`) is the order.
"""

import array
import json
import os
import signal
import socket
import sys
import threading


def main() -> None:
    fd = int(sys.argv[sys.argv.index("--fd") + 1])
    sock = socket.socket(fileno=fd)
    lock = threading.Lock()

    def say(**message: object) -> None:
        with lock:
            sock.sendall(json.dumps(message).encode() + b"\n")

    if "--die-at-start" in sys.argv:
        os._exit(3)
    if "--ignore-eof" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    buffer, fds, cancelled = b"", [], {}
    while True:
        data, ancillary, _, _ = sock.recvmsg(1 << 16, socket.CMSG_SPACE(4 * 16))
        for _, _, rights in ancillary:
            fds += array.array("i", rights)
        if not data:
            if "--ignore-eof" in sys.argv:
                threading.Event().wait()
            os._exit(0)
        *frames, buffer = (buffer + data).split(b"\n")
        for frame in frames:
            request = json.loads(frame)
            if request["verb"] == "cancel":
                cancelled.setdefault(request["id"], threading.Event()).set()
                continue
            arena = fds.pop(0) if request.get("fds") else None
            stop = cancelled.setdefault(request["id"], threading.Event())
            threading.Thread(target=obey, args=(request, arena, stop, say), daemon=True).start()


def obey(request, arena, stop, say) -> None:  # noqa: C901, PLR0912 - one order a branch
    number, order = request["id"], os.path.basename(request.get("path") or request["root"])
    used = {"total_bytes": 1, "free_bytes": 1, "filesystem": "none", "direct_io": False, "leases": False}
    if order == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    elif order.startswith("hang"):
        if order == "hang-once":
            while not os.path.exists(request["root"]):
                stop.wait(0.02)
            say(id=number, ok=True, result=used)
            return
        stop.wait(1) if order == "hang-briefly" else threading.Event().wait()
    elif order.startswith("slow"):
        for _ in range(6):
            stop.wait(float(order.partition("-")[2] or 0.2))
            say(id=number, alive=True)
        say(id=number, ok=True, result=used)
    elif order == "refuse":
        say(id=number, ok=False, error={"code": "no_space", "message": "full", "hint": "free some", "file": "a"})
    elif order == "arena":
        content = os.pread(arena, 100, 0).decode()
        os.close(arena)
        say(id=number, ok=True, result={**used, "filesystem": content})
    elif order == "garbage":
        say(id=number, ok=True, result={"count": "many"})
    elif order == "environment":
        foreign = [k for k in os.environ if k.startswith(("WATCHFILES", "NOTIFY", "LISTEN"))]
        kept = os.environ.get("CKPTD_FAIL", "")
        say(id=number, ok=True, result={**used, "filesystem": json.dumps([foreign, kept, os.getcwd()])})
    elif order == "parts":
        for n in range(3):
            say(id=number, part={"directories": [str(n)]})
        say(id=number, ok=True, result={"count": 3})
    elif order == "flood":
        while not stop.is_set():
            say(id=number, part={"directories": ["x" * 900_000]})
    elif order == "until-cancelled":
        say(id=number, part={"directories": [str(os.getpid())]})
        stop.wait()
        with open(os.path.join(os.path.dirname(request["root"]), "cancelled"), "w") as file:
            file.write("yes")
        say(id=number, ok=True, result={"count": 0})
    else:
        say(id=number, ok=True, result={**used, "filesystem": str(os.getpid())})


if __name__ == "__main__":
    main()
