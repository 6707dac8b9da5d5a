"""A daemon that does what a line on its socket tells it to; started by the supervisor under test.

It speaks to its supervisor through ckptd.notify, like the real one. Its diary (one JSON object a
line, in the file named by STAND_IN_DIARY) says what each life of it was given and what it met.
"""

import json
import os
import selectors
import signal
import socket
import sys
import time

from ckptd.notify import Notifier, passed_fds


def main() -> None:
    diary = os.environ["STAND_IN_DIARY"]

    def write(**facts: object) -> None:
        with open(diary, "a") as file:
            file.write(json.dumps({"pid": os.getpid(), **facts}) + "\n")

    def on_signal(number: int, _frame: object) -> None:
        write(signal=signal.Signals(number).name)
        if number in {signal.SIGTERM, signal.SIGINT} and mode["obeys"]:
            notifier.stopping()
            sys.exit(mode["code"])

    mode = {"obeys": True, "code": 0, "beats": True}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, on_signal)
    passed = passed_fds()
    stored = {name: os.pread(fd, 1000, 0).decode() for name, fd in passed[1:]}
    write(born=[name for name, _ in passed], stored=stored, cwd=os.getcwd(), argv=sys.argv[1:])
    if code := os.environ.get("STAND_IN_EXIT"):
        sys.exit(int(code))
    listener = socket.socket(fileno=passed[0][1])
    listener.setblocking(False)
    notifier = Notifier()
    notifier.ready()
    chooser = selectors.DefaultSelector()
    chooser.register(listener, selectors.EVENT_READ)
    beat_s = (notifier.watchdog_s or 2) / 4
    while True:
        for _ in chooser.select(beat_s):
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(5)
                obey(peer, peer.makefile("r").readline().split(), notifier, mode)
        if mode["beats"]:
            notifier.watchdog()


def obey(peer: socket.socket, words: list[str], notifier: Notifier, mode: dict) -> None:  # noqa: C901 - one order a branch
    match words:
        case ["store", name, content]:
            fd = os.memfd_create(name)
            os.write(fd, content.encode())
            notifier.store(name, fd)
            os.close(fd)
        case ["remove", name]:
            notifier.remove(name)
        case ["store-and-crash", name, content]:
            fd = os.memfd_create(name)
            os.write(fd, content.encode())
            notifier.store(name, fd)
            os.kill(os.getpid(), signal.SIGKILL)
        case ["crash"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["exit", code]:
            sys.exit(int(code))
        case ["silent"]:
            mode["beats"] = False
        case ["stubborn"]:
            mode["obeys"] = False
        case ["sleep", seconds]:
            time.sleep(float(seconds))
        case ["extend", seconds]:
            notifier.extend(float(seconds))
        case ["orphan"]:
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                while True:
                    time.sleep(60)
            peer.sendall(f"{child}\n".encode())
            return
    peer.sendall(f"{os.getpid()}\n".encode())


if __name__ == "__main__":
    main()
