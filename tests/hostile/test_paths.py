"""Names and paths that lead elsewhere: nothing outside a root is read, written or removed (S10, S11, S12, S16)."""

import errno
import hashlib
import os
import random
import socket
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from ckptd.errors import BadConfig, BadPath, CkptdError, NotFound, Refused
from ckptd.intake import premises
from ckptd.model import new_id
from ckptd.worker import beneath, digest, durable, kernel, publish, trash
from ckptd.worker.context import Context
from ckptd.worker.members import identity
from ckptd.worker.protocol import Digest, Publish, Purge, Trash
from tests.support import tally
from tests.support.arena import sealed
from tests.support.in_process import Training, a_tensor, daemon, sha256
from tests.support.swapping import swapping, turns
from tests.support.watched import a_watched, live_at

SECRET = b"the canary's own bytes"
# What a walk may answer while names are swapped under it; anything else is a defect.
LOST = (CkptdError, FileNotFoundError, NotADirectoryError, FileExistsError)


# -- the socket's own path: S10 -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo"])
def test_a_daemon_that_makes_its_own_socket_takes_nobodys_place(short_dir, kind):
    """S10: what lies at the path stays, and the daemon says why it does not start."""
    path = short_dir / "s"
    make = {
        "file": lambda: path.write_bytes(b"mine"),
        "directory": path.mkdir,
        "symlink": lambda: path.symlink_to(short_dir / "elsewhere"),
        "fifo": lambda: os.mkfifo(path),
    }
    make[kind]()
    before = os.lstat(path)
    with pytest.raises(BadConfig):
        premises.listening([], path, "user")
    assert os.lstat(path) == before
    assert not (short_dir / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_socket_in_a_directory_that_others_may_write_is_not_made(short_dir, mode):
    """S10: whoever may rename it could put his own in its place; in a sticky directory he can't, a group is chosen."""
    place = short_dir / "open"
    place.mkdir()
    place.chmod(mode)
    if mode != 0o777:
        premises.listening([], place / "s", "user")[0].close()
        return
    with pytest.raises(BadConfig, match="written by others"):
        premises.listening([], place / "s", "user")
    assert list(place.iterdir()) == []


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(short_dir):
    """S10: only a name on which nobody answers is removed."""
    path = short_dir / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    premises.listening([], path, "user")[0].close()
    with socket.socket(socket.AF_UNIX) as living:
        path.unlink()
        living.bind(str(path))
        living.listen()
        with pytest.raises(CkptdError, match="already"):
            premises.listening([], path, "user")
    assert path.is_socket()


# -- names in requests: S11 -----------------------------------------------------------------------


BAD_PATHS = [
    "relative", "", ".", "..", "/a/../etc/shadow", "/a/./b", "//a", "/a//b", "/a\0b", "/" + "x/" * 3000, "~/a", "-rf",
    "file:///a", "/..",
]  # fmt: skip
BAD_NAMES = [
    "..",
    ".",
    "",
    ".hidden",
    "a/b",
    "/a",
    "a\0b",
    "a\nb",
    "a\tb",
    "\u202ea",
    "a\u2066b",
    "\x1b[2Ja",
    "x" * 129,
]


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda value: repr(value)[:30])
async def test_a_path_that_is_not_plain_and_absolute_is_refused_by_every_door(short_dir, path):
    """S11: files handed over, a trainer's directory, a root, a rebuild."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        asked = {
            "submit": {"path": path, "checkpoint": new_id()},
            "experiment.open": {"experiment": new_id(), "project": "p", "name": "n", "dir": path},
            "root.add": {"path": path},
            "rebuild": {"root": path},
        }
        for op, fields in asked.items():
            with pytest.raises(CkptdError) as caught:
                await line.ask(op, **fields)
            assert caught.value.code in {"bad_path", "bad_request"}, op


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda value: repr(value)[:30])
async def test_a_name_that_can_be_no_directory_is_refused_by_every_door(short_dir, name):
    """S11: control characters and marks that turn text around never become a directory's name."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        plain = {"experiment": new_id(), "dir": str(node.runs)}
        file = {"path": str(node.runs / "a.pt"), "checkpoint": new_id()}
        for op, fields in (
            ("experiment.open", {**plain, "project": name, "name": "n"}),
            ("experiment.open", {**plain, "project": "p", "name": name}),
            ("submit", {**file, "project": name}),
            ("submit", {**file, "experiment": name}),
        ):
            with pytest.raises(CkptdError) as caught:
                await line.ask(op, **fields)
            assert caught.value.code in {"bad_path", "bad_request"}, (op, fields)
        assert list(node.runs.iterdir()) == []


async def test_odd_but_lawful_file_names_are_taken_byte_by_byte_and_one_that_is_no_text_ends_nothing(short_dir):
    """S11: a newline, a leading dash, marks that turn text around, a quote; and beside them bytes that are no UTF-8."""
    tree, roots = a_watched(short_dir)
    names = [
        "-rf.safetensors",
        "a\nb.safetensors",
        "\u202etxt.safetensors",
        "'; rm -r *.safetensors",
        "\x1b[2J.safetensors",
    ]
    for number, name in enumerate(names):
        (tree / "run7" / name).write_bytes(a_tensor(number))
    with open(os.fsencode(tree) + b"/run7/\xff\xfe.safetensors", "wb") as file:
        file.write(a_tensor(9))
    async with daemon(short_dir, **roots) as node:
        for name in names:
            await live_at(node, tree / "run7" / name)
        async with node.connect() as line:
            found = (await line.ask("list", limit=50))["checkpoints"]
            assert {Path(row["path"]).name for row in found} == set(names)
            assert (await line.ask("status"))["ok"]


# -- names that change under a walk: S12, S16 -----------------------------------------------------


def fingerprint(tree: Path) -> str:
    """Every name, kind, mode, time and byte of a tree."""
    facts = []
    for path in sorted([tree, *tree.rglob("*")]):
        found = os.lstat(path)
        body = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        facts.append((str(path), found.st_mode, found.st_ino, found.st_nlink, found.st_mtime_ns, body))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@pytest.fixture
def canary(tmp_path):
    """A tree outside of every root that looks like what is inside; it must be the same afterwards."""
    tree = tmp_path / "canary"
    (tree / "deep").mkdir(parents=True)
    for name in ("f", "deep/f", "manifest.json", "x"):
        (tree / name).write_bytes(SECRET)
    before = fingerprint(tree)
    yield tree
    tally.add("violations", fingerprint(tree) != before)
    assert fingerprint(tree) == before


@pytest.fixture(params=["openat2", "name by name"])
def walking(request, monkeypatch):
    """With the kernel's own resolution, and without it on old kernels."""
    if request.param == "name by name":

        def refuse(*_, **__):
            raise OSError(errno.ENOSYS, "no openat2")

        monkeypatch.setattr(kernel, "openat2", refuse)
    return request.param


def swapped_reads(tmp_path, canary, rounds: int) -> int:
    root = tmp_path / "root"
    (root / "d" / "deep").mkdir(parents=True)
    for name in ("d/f", "d/deep/f"):
        (root / name).write_bytes(b"inside")
    (root / "l").symlink_to(canary)
    root_fd = os.open(root, os.O_RDONLY)
    got: list[int] = []
    with swapping(root / "d", root / "l"):
        for turn in turns(rounds, got):
            try:
                fd = beneath.open_file(root_fd, ("d/f", "d/deep/f")[turn % 2])
            except LOST:
                continue
            assert os.read(fd, 99) == b"inside"
            os.close(fd)
            got.append(turn)
            with suppress(*LOST):
                files = digest.run(Digest(root=str(root), path=str(root / "d")), Context()).files
                assert {file.size_bytes for file in files} <= {len(b"inside")}
    os.close(root_fd)
    return len(got)


def test_a_directory_swapped_for_a_symlink_is_never_read_through(tmp_path, canary, walking):
    """S12, short form: each open is of the file inside, or an error."""
    assert swapped_reads(tmp_path, canary, 150) > 0


@pytest.mark.faults
def test_two_thousand_swaps_under_reads_lead_nowhere(tmp_path, canary, walking):
    """S12, long form."""
    assert swapped_reads(tmp_path, canary, 2000) > 0


def swapped_writes(tmp_path, canary, rounds: int) -> int:
    root, rng = tmp_path / "root", random.Random(3)
    done: list[int] = []
    (root / "d").mkdir(parents=True)
    (root / "l").symlink_to(canary)
    fd, images = sealed({"f": b"inside" * 900})
    with swapping(root / "d", root / "l"):
        for number in turns(rounds, done):
            target = root / "d" / rng.choice(("", "deep")) / f"step_{number:010d}"
            manifest = {"v": 1, "checkpoint": new_id(), "step": number}
            request = Publish(root=str(root), target=str(target), files=images, manifest=manifest)
            try:
                publish.run(request, Context(fd=fd))
            except LOST:
                continue
            done.append(number)
    os.close(fd)
    return len(done)


def test_a_directory_swapped_for_a_symlink_is_never_written_through(tmp_path, canary, walking):
    """S12, short form: publishing makes directories, files and links on the way."""
    assert swapped_writes(tmp_path, canary, 40) > 0


@pytest.mark.faults
@pytest.mark.timeout(280)
def test_a_thousand_swaps_under_publishes_lead_nowhere(tmp_path, canary, walking):
    """S12, long form."""
    assert swapped_writes(tmp_path, canary, 500) > 0


def retire(root: Path, path: Path, name: str) -> None:
    found = identity(os.lstat(path))
    trash.trash(Trash(root=str(root), path=str(path), identity=found, trash=name), Context())


def swapped_retirements(tmp_path, canary, rounds: int) -> int:
    """The trash itself is swapped for a symlink while files go in and are emptied out."""
    root = tmp_path / "root"
    done: list[int] = []
    (root / trash.TRASH).mkdir(parents=True)
    (root / "l").symlink_to(canary)
    with swapping(root / trash.TRASH, root / "l"):
        for number in turns(rounds, done):
            path = root / f"m{number}.pt"
            path.write_bytes(b"inside")
            with suppress(*LOST):
                retire(root, path, "x")  # the canary has one of that name
            with suppress(*LOST):
                done += [number] * trash.purge(Purge(root=str(root), trash="x"), Context()).count
    return len(done)


def test_a_trash_swapped_for_a_symlink_is_never_emptied_through(tmp_path, canary, walking):
    """S16, short form."""
    assert swapped_retirements(tmp_path, canary, 100) > 0


@pytest.mark.faults
def test_a_thousand_swaps_of_the_trash_remove_nothing_outside(tmp_path, canary, walking):
    """S16, long form."""
    assert swapped_retirements(tmp_path, canary, 1000) > 0


def swapped_removals(tmp_path, canary, rounds: int) -> None:
    """A sub-directory of what is removed is swapped for a symlink while it is emptied."""
    root = tmp_path / "root"
    for number in range(rounds):
        victim = root / f"v{number}"
        (victim / "d" / "deep").mkdir(parents=True)
        for name in [f"d/{n}" for n in range(20)] + [f"d/deep/{n}" for n in range(20)]:
            (victim / name).write_bytes(b"inside")
        (victim / "l").symlink_to(canary)
        at = os.open(root, os.O_RDONLY)
        with swapping(victim / "d", victim / "l"), suppress(*LOST, OSError):
            durable.remove_tree(at, victim.name)
        os.close(at)


def test_a_directory_swapped_for_a_symlink_while_it_is_removed_takes_nothing_along(tmp_path, canary):
    """S16, short form."""
    swapped_removals(tmp_path, canary, 10)


@pytest.mark.faults
def test_five_hundred_removals_under_swaps_take_nothing_along(tmp_path, canary):
    """S16, long form."""
    swapped_removals(tmp_path, canary, 500)


async def test_a_trainer_whose_directory_becomes_a_symlink_publishes_nothing_through_it(short_dir, tmp_path, canary):
    """S12: the whole way: the project's directory is swapped after the first save; the next one fails or waits."""
    async with daemon(short_dir) as node, node.connect() as line:
        run = await Training(line, str(node.runs)).open()
        await run.saved(1)
        (node.runs / "demo").rename(node.runs / "aside")
        (node.runs / "demo").symlink_to(canary)
        second = await run.save(2)
        found: list[dict] = []
        with anyio.move_on_after(3):
            found.append(await line.push("level", checkpoint=second, state="failed"))
        told = [message for message in [*line.pushes, *found] if message.get("checkpoint") == second]
        assert not any(message.get("level") in {"durable", "verified"} for message in told)
        (node.runs / "demo").unlink()


@pytest.mark.parametrize("path", ["/proc/self/environ", "/dev/zero", "/sys/kernel/notes"])
def test_a_path_of_the_kernel_is_no_checkpoint(path):
    """S14: not a regular file of a disk's own, or on another file system than its root."""
    root_fd = beneath.open_root("/")
    try:
        with pytest.raises((BadPath, NotFound, Refused)):
            os.close(beneath.open_beneath(root_fd, beneath.parts_below("/", path), beneath.READ, one_mount=True))
    finally:
        os.close(root_fd)


def test_a_symlink_that_leads_back_inside_is_refused_as_well(tmp_path, walking):
    """S12: below a root nothing is followed, wherever it leads."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"x")
    (tmp_path / "l").symlink_to("d")
    (tmp_path / "m").symlink_to(tmp_path / "d" / "f")
    root_fd = beneath.open_root(str(tmp_path))
    for path in ("l/f", "m"):
        with pytest.raises((BadPath, NotADirectoryError)):
            beneath.open_file(root_fd, path)
    fd = beneath.open_file(root_fd, "d/f")
    assert os.pread(fd, 9, 0) == b"x"
    os.close(fd)
    os.close(root_fd)
    assert sha256(tmp_path / "d" / "f")
