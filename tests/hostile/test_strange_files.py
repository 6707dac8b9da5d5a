"""Things in a watched tree that are no checkpoints, and checkpoints that are somebody else's (S13, S14)."""

import os
import resource
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from ckptd.errors import CkptdError
from ckptd.model import State, new_id
from ckptd.worker import scan, settle
from ckptd.worker.context import Context
from ckptd.worker.protocol import Candidate, Scan, Scanned, Settle
from tests.support.disk import tmpfs
from tests.support.in_process import a_tensor, daemon, eventually
from tests.support.watched import a_watched, live_at

ANN, BEN = 64001, 64002  # two users that no machine has


def look(root: Path, **more) -> tuple[Scanned, list[Candidate]]:
    """One scan, and all that it found."""
    found: list[Candidate] = []
    context = Context(send=lambda frame: found.extend(frame["part"].found if "part" in frame else ()))
    return scan.run(Scan(root=str(root), managed=False, entries_max=2_000_000, **more), context), found


def rss_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def strange_tree(root: Path) -> None:
    root.mkdir()
    os.mkfifo(root / "fifo.pt")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "s.pt"))
    if os.getuid() == 0:
        os.mknod(root / "zero.pt", 0o600 | 0o020000, os.makedev(1, 5))
    (root / "link.safetensors").symlink_to("/etc/passwd")
    (root / "loop").symlink_to(root)
    (root / "gone.pt").symlink_to(root / "nowhere")
    (root / "good.safetensors").write_bytes(a_tensor())


def test_among_strange_things_only_the_checkpoint_is_found(tmp_path):
    """S14: a FIFO, a socket, a device, links to elsewhere, to nothing and to itself, under a checkpoint's name."""
    strange_tree(tmp_path / "w")
    done, found = look(tmp_path / "w")
    assert [Path(one.path).name for one in found] == ["good.safetensors"]
    assert done.complete
    assert done.skipped["symlink"] == 3
    assert done.skipped["special"] >= 2


@pytest.mark.parametrize("name", ["fifo.pt", "s.pt", "zero.pt", "link.safetensors", "loop"])
def test_what_is_no_file_is_refused_when_it_is_handed_over(tmp_path, name):
    """S14: and never opened: a FIFO would wait, a device would act."""
    strange_tree(tmp_path / "w")
    if not os.path.lexists(tmp_path / "w" / name):
        pytest.skip("needs root to make a device")
    began_s = time.monotonic()
    found = settle.run(
        Settle(root=str(tmp_path / "w"), path=str(tmp_path / "w" / name), quiet_s=0, told=True), Context()
    )
    assert found.reason.startswith("refused")
    assert time.monotonic() - began_s < 20  # a FIFO would wait for ever


def test_a_mount_inside_a_root_is_not_entered(tmp_path):
    """S14: another disk is another root's business."""
    root = tmp_path / "w"
    root.mkdir()
    with tmpfs(root / "other", "4m") as other:
        (other / "m.safetensors").write_bytes(a_tensor())
        (root / "good.safetensors").write_bytes(a_tensor())
        done, found = look(root)
    assert [Path(one.path).name for one in found] == ["good.safetensors"]
    assert done.skipped["other device"] == 1


def crowded(root: Path, entries: int) -> float:
    """Scan a directory of so many foreign files, and one 1,000 levels deep; return the CPU time that it took."""
    root.mkdir()
    at = os.open(root, os.O_RDONLY)
    for number in range(entries):
        os.close(os.open(f"data-{number}.bin.part", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=at))
    here = os.dup(at)
    for _ in range(1000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    os.close(at)
    before, began_s = rss_peak_bytes(), time.thread_time()
    try:
        done, found = look(root)
    finally:
        subprocess.run(["rm", "-rf", root], check=True)  # Python's own removal recurses
    took_s = time.thread_time() - began_s
    assert found == []
    assert not done.complete, "what lies below the limit is not called absent"
    assert done.seen >= entries
    assert rss_peak_bytes() - before < 32 << 20
    return took_s


def test_a_directory_of_ten_thousand_entries_and_one_of_a_thousand_levels_cost_little(tmp_path):
    """S14, short form."""
    assert crowded(tmp_path / "w", 10_000) < 10


@pytest.mark.faults
def test_a_directory_of_a_hundred_thousand_entries_costs_little(tmp_path):
    """S14, long form."""
    assert crowded(tmp_path / "w", 100_000) < 10


async def test_a_huge_sparse_file_costs_no_memory_and_stops_no_other(short_dir):
    """S14: a header that claims 16 TiB of zeros is no checkpoint, and its neighbour is verified meanwhile."""
    tree, roots = a_watched(short_dir)
    size = 16 << 40
    header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    huge = tree / "run7" / "huge.safetensors"
    huge.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(huge, 15 << 40)  # ext4 has no larger ones; so it is cut short as well
    (tree / "run7" / "good.safetensors").write_bytes(a_tensor())
    async with daemon(short_dir, **roots) as node:
        await live_at(node, tree / "run7" / "good.safetensors")
        async with node.connect() as line:
            rows = (await line.ask("list"))["checkpoints"]
        states = Counter((Path(row["path"]).name, row["state"]) for row in rows)
        assert states["huge.safetensors", "live"] == 0


# -- other people's files: S13 --------------------------------------------------------------------


def needs_root() -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to have files of two users")


@pytest.fixture
def linked(tmp_path):
    """Ann's directory holds a hard link to a file of Ben's, made where the kernel does not protect hard links."""
    needs_root()
    theirs, tree = tmp_path / "ben.safetensors", tmp_path / "ann"
    theirs.write_bytes(a_tensor())
    theirs.chmod(0o600)
    os.chown(theirs, BEN, BEN)
    tree.mkdir()
    os.chown(tree, ANN, ANN)
    (tree / "mine.safetensors").write_bytes(a_tensor(1))
    os.chown(tree / "mine.safetensors", ANN, ANN)
    os.link(tree / "mine.safetensors", tree / "twice.safetensors")
    os.link(theirs, tree / "stolen.safetensors")
    return theirs, tree


def test_a_hard_link_to_another_users_file_is_not_taken_for_a_checkpoint(linked):
    """S13: it is counted; one's own file under two names is fine."""
    _, tree = linked
    done, found = look(tree)
    assert sorted(Path(one.path).name for one in found) == ["mine.safetensors", "twice.safetensors"]
    assert done.skipped["foreign link"] == 1


async def test_a_foreign_file_in_a_watched_tree_is_left_as_it_is(short_dir, linked):
    """S13: not read as its owner, not chowned, not removed, with deletion allowed and a rule that keeps one."""
    theirs, tree = linked
    before = os.lstat(theirs)
    roots = {"roots": [{"path": str(tree), "kind": "watched", "allow_delete": True}], "retention": {"keep_last": 1}}
    async with daemon(short_dir, **roots):
        await eventually(lambda: len(list(tree.glob("*.safetensors"))) == 2, patience_s=100)
        assert (tree / "stolen.safetensors").exists()
    after = os.lstat(theirs)
    facts = ("st_uid", "st_gid", "st_mode", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns", "st_nlink")
    assert [getattr(before, name) for name in facts] == [getattr(after, name) for name in facts]


async def test_a_user_of_a_shared_daemon_can_not_hand_over_another_users_file(short_dir):
    """S13, I9: the daemon can read it, he can't: neither its digest nor its tensors' names are his to learn."""
    needs_root()
    from ckptd.intake.files import FileOffer

    shared = short_dir / "data"
    shared.mkdir()
    for uid, name in ((ANN, "ann"), (BEN, "ben")):
        (shared / f"{name}.safetensors").write_bytes(a_tensor(uid))
        os.chown(shared / f"{name}.safetensors", uid, uid)
    settings = {"mode": "system", "roots": [{"path": str(shared), "kind": "managed"}], "jobs": {"retries_max": 0}}
    async with daemon(short_dir, **settings) as node:
        files = node.parts.reconciler._files
        offers = {
            name: FileOffer(id=new_id(), path=str(shared / f"{name}.safetensors"), uid=ANN) for name in ("ann", "ben")
        }
        for offer in offers.values():
            await files.file(offer)

        async def states() -> dict[str, State]:
            from ckptd.catalog import checkpoints

            ids = [offer.id for offer in offers.values()]
            rows = await node.read(lambda conn: checkpoints.get_many(conn, ids))
            return {name: rows[offer.id].state for name, offer in offers.items()}

        async def decided() -> bool:
            return State.PENDING not in (await states()).values()

        await eventually(decided)
        assert await states() == {"ann": State.LIVE, "ben": State.FAILED}
        async with node.connect() as line:
            shown = await line.ask("show", selector=offers["ben"].id)
        assert shown["files"] == []
        assert "another user" in str(shown["checkpoint"])


def test_a_root_that_is_a_file_or_the_kernels_own_tree_gives_nothing(tmp_path):
    """S14: /proc has names that end like checkpoints for whoever makes them; none is a file of a disk."""
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises((CkptdError, NotADirectoryError)):
        look(tmp_path / "f")
    done, found = look(Path("/proc/self/task"))
    assert found == []
    assert done.seen > 0
