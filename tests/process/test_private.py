"""Nobody else reaches a user's daemon: not through its socket, not over a network."""

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from tests.support import descriptors
from tests.support.node import Node, eventually
from tests.support.strangers import SOMEBODY, ask_as, need_root


def test_another_user_is_kept_out_by_the_mode_and_by_the_daemon(node: Node):
    """The socket is 0600; and should somebody open it up by hand, the daemon still asks the kernel who is there."""
    need_root()
    node.start()
    assert stat.S_IMODE(node.socket.stat().st_mode) == 0o600
    node.dir.chmod(0o711)
    assert ask_as(SOMEBODY, node.socket).stderr.strip() == "kept out by the kernel"
    node.socket.chmod(0o666)
    said = ask_as(SOMEBODY, node.socket)
    assert '"not_authorized"' in said.stdout, said
    assert '"ok":true' in ask_as(os.getuid(), node.socket).stdout.replace(" ", "")


def test_no_process_of_a_node_listens_on_a_network(node: Node):
    node.start()
    node.ckpt("roots", "add", str(node.dir))  # a worker runs
    eventually(node.workers, "a worker")
    looked_at = set()
    for pid in node.family():
        with suppress(FileNotFoundError, ProcessLookupError):  # a process that ended since
            assert listening(pid) == [], pid
            looked_at.add(pid)
    assert {node.daemon_pid, *node.workers()} <= looked_at


def listening(pid: int) -> list[str]:
    """What a process holds of the network's tables."""
    inodes, found = set(descriptors.names(pid)), []
    for family in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        table = Path(f"/proc/{pid}/net/{family}")
        rows = table.read_text().splitlines()[1:] if table.exists() else []
        found += [f"{family} {row}" for row in rows if f"socket:[{row.split()[9]}]" in inodes]
    return found


def test_the_check_above_would_see_a_listening_socket():
    with socket.create_server(("127.0.0.1", 0)) as server:
        inode = os.readlink(f"/proc/self/fd/{server.fileno()}")
        rows = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
        assert any(f"socket:[{row.split()[9]}]" == inode for row in rows)
        assert "tcp" in {row.partition(" ")[0] for row in listening(os.getpid())}
