"""The verb watch: hints are early, and what they miss they say. The scans they cause find everything."""

import contextlib
import os
import queue
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from ckptd.worker import scan, watch
from ckptd.worker.context import Context
from ckptd.worker.mounts import Mount
from ckptd.worker.protocol import Done, Hints, Scan, Watch

PACE = watch.Pace(step_ms=20, root_check_ms=50, poll_remote_s=0.05, restart_s=(0.05, 0.1))
LONG_S = 40.0


class Watched:
    """One watch in a thread, its parts in a queue."""

    def __init__(self, root):
        self.root = root
        self.parts = queue.Queue()
        self.context = Context(send=lambda frame: self.parts.put(frame["part"]))
        self.result = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        self.result = watch.run(Watch(root=str(self.root), debounce_ms=20), self.context, PACE)

    def until(self, wanted):
        """Return the first part that `wanted` accepts; fail after LONG_S."""
        deadline = time.monotonic() + LONG_S
        seen = []
        while True:
            try:
                part = self.parts.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"only {seen} came")
            seen.append(part)
            if wanted(part):
                return part

    def was_lost(self, within_s):
        """Say whether a part that says so comes within this time."""
        deadline = time.monotonic() + within_s
        with contextlib.suppress(queue.Empty):
            while True:
                if self.parts.get(timeout=max(0.01, deadline - time.monotonic())).lost:
                    return True
        return False

    def hears_of(self, directory, within_s):
        """Say whether a hint of this directory alone comes within this time."""
        deadline = time.monotonic() + within_s
        with contextlib.suppress(queue.Empty):
            while True:
                if self.parts.get(timeout=max(0.01, deadline - time.monotonic())).directories == [str(directory)]:
                    return True
        return False

    def hinted(self, directory):
        """Wait for a hint that makes a scan of `directory` happen."""
        return self.until(
            lambda part: (
                part.lost or any(str(directory) == d or str(directory).startswith(d + "/") for d in part.directories)
            )
        )

    def end(self):
        self.context.cancelled.set()
        self.thread.join(LONG_S)
        assert not self.thread.is_alive()


@pytest.fixture
def watched(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    found = Watched(root)
    try:
        assert found.until(lambda _: True) == Hints([], lost=True)
        yield found
    finally:
        found.end()


@pytest.fixture
def short_queue(monkeypatch):
    """Let the kernel's queue look short before a watch begins: no slow machine makes files slower than that."""
    monkeypatch.setattr(watch, "_queue_length", lambda: 256)


def test_a_watch_starts_with_lost_so_that_what_was_before_is_scanned(watched):
    """And ends with Done when it is cancelled."""
    watched.end()
    assert watched.result == Done()


def test_a_new_file_is_a_hint_of_its_directory(watched):
    (watched.root / "m.pt").write_bytes(b"x")
    assert watched.until(lambda _: True) == Hints([str(watched.root)])


def test_the_last_file_of_a_dcp_directory_is_a_hint_although_it_is_hidden(watched):
    step = watched.root / "step-3"
    step.mkdir()
    watched.hinted(step)
    (step / ".metadata").write_bytes(b"x")
    assert watched.until(lambda part: part.directories == [str(step)])


def test_a_tree_that_is_moved_in_is_hinted(watched, tmp_path):
    """F14: the kernel tells of its top only."""
    outside = tmp_path / "outside"
    (outside / "a" / "b").mkdir(parents=True)
    (outside / "a" / "b" / "m.pt").write_bytes(b"x")
    outside.rename(watched.root / "moved")
    assert watched.hinted(watched.root / "moved")


def found_below(root, directories):
    """Scan as the daemon does after hints; return the paths found."""
    found = set()

    def send(frame):
        found.update(candidate.path for candidate in frame["part"].found)

    for directory in directories:
        scan.run(
            Scan(root=str(root), managed=False, under="" if directory == str(root) else directory), Context(send=send)
        )
    return found


def test_of_nested_directories_made_in_a_burst_nothing_is_lost(watched):
    """F14: 200 times mkdir -p and 4 files; a watcher alone loses most of them."""
    wanted = set()
    for index in range(200):
        deep = watched.root / f"run{index}" / "a" / "b"
        deep.mkdir(parents=True)
        for at in (deep, deep.parent, deep.parent.parent, watched.root):
            path = at / f"m_{index}.pt"
            path.write_bytes(b"x")
            wanted.add(str(path))
    found = set()

    def covers(part):
        found.update(found_below(watched.root, [str(watched.root)] if part.lost else part.directories))
        return wanted <= found

    watched.until(covers)


def test_a_burst_near_the_kernels_queue_is_lost(short_queue, watched):
    """F12: several events make one path, so the queue may have overflowed without a word."""
    for attempt in range(5):  # a machine that is busy may make files no faster than they are read
        for index in range(20_000):
            (watched.root / f"{attempt}-{index}.pt").touch()
        if watched.was_lost(within_s=3.0):
            return
    pytest.fail("five bursts, and none of them was taken for lost")


def test_a_root_that_is_removed_and_made_again_is_watched_again(watched):
    """F14: the kernel's watch goes with the old directory."""
    shutil.rmtree(watched.root)
    assert watched.until(lambda part: "does not exist" in part.problem).lost
    watched.root.mkdir()
    assert watched.until(lambda part: not part.problem).lost
    (watched.root / "m.pt").write_bytes(b"x")
    assert watched.hinted(watched.root)


def test_a_root_that_is_replaced_is_noticed_without_an_event(watched, tmp_path):
    """Renamed away and another put in its place between two looks."""
    other = tmp_path / "other"
    other.mkdir()
    watched.root.rename(tmp_path / "away")
    other.rename(watched.root)
    watched.until(lambda part: part.lost and not part.problem)
    (watched.root / "m.pt").write_bytes(b"x")
    assert watched.hinted(watched.root)


def test_a_name_that_is_no_text_does_not_end_the_watch(watched):
    """S11: the native watcher dies of it, the watch starts another."""
    with open(os.fsencode(watched.root) + b"/\xff.pt", "wb") as file:
        file.write(b"x")
    assert watched.until(lambda part: part.problem).lost
    watched.until(lambda part: part.lost and not part.problem)
    (watched.root / "m.pt").write_bytes(b"x")
    assert watched.hinted(watched.root)


def test_a_network_file_system_is_not_watched_but_hinted_at_intervals(tmp_path, monkeypatch):
    """Events of other hosts are not seen, so none are asked for."""
    monkeypatch.setattr(watch.mounts, "find", lambda *_: Mount(1, 0, "/", "nfs4", "server:/x"))
    monkeypatch.setattr(watch, "RustNotify", lambda *_: pytest.fail("it was watched"))
    found = Watched(tmp_path)
    for _ in range(3):
        assert found.until(lambda _: True) == Hints([], lost=True)
    found.end()


def test_the_environment_changes_nothing(tmp_path, monkeypatch):
    """S26: polling and debugging can't be switched on from outside."""
    for name in ("WATCHFILES_FORCE_POLLING", "WATCHFILES_DEBUG", "WATCHFILES_IGNORE_PERMISSION_DENIED"):
        monkeypatch.setenv(name, "1")
    made = []
    real = watch.RustNotify
    monkeypatch.setattr(watch, "RustNotify", lambda *how: made.append(how) or real(*how))
    found = Watched(tmp_path)
    found.until(lambda part: part.lost)
    found.end()
    assert made == [([str(tmp_path)], False, False, 0, True, False)]


def test_a_reached_watch_limit_is_told_and_hints_still_come(tmp_path):
    """F13: in a user namespace of its own, whose limit is 5; the host's is untouched."""
    for index in range(20):
        (tmp_path / f"d{index}").mkdir()
    code = textwrap.dedent(f"""
        import itertools, os
        from pathlib import Path
        from ckptd.worker import watch
        from ckptd.worker.context import Context
        from ckptd.worker.protocol import Watch
        Path("/proc/sys/user/max_inotify_watches").write_text("5")
        context, count = Context(), itertools.count(1)
        def send(frame):
            if not frame["part"].problem:
                os._exit(9)  # it was watched
            print(frame["part"].lost, frame["part"].problem, flush=True)
            if next(count) == 3:
                context.cancelled.set()
        context.send = send
        watch.run(Watch(root={str(tmp_path)!r}), context, watch.Pace(restart_s=(0.05, 0.05)))
    """)
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare")
    done = subprocess.run(
        [unshare, "--user", "--map-root-user", sys.executable, "-c", code],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    if "unshare" in done.stderr or "max_inotify_watches" in done.stderr:
        pytest.skip("no user namespaces here")
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all(line.startswith("True the kernel's watch limit is reached") for line in lines), lines


def test_a_directory_without_permission_does_not_hide_the_others(tmp_path, monkeypatch):
    """It is told, the rest is watched, and `lost` comes at intervals: a limit can't be seen then."""
    real = watch.RustNotify

    def refuse(*how):
        if not how[-1]:
            raise PermissionError("Permission denied (os error 13)")
        return real(*how)

    monkeypatch.setattr(watch, "RustNotify", refuse)
    found = Watched(tmp_path)
    assert found.until(lambda _: True).problem.startswith("some directories can't be watched")
    again = found.until(lambda part: part.lost)
    assert again.blind, "what is not seen is said for as long as it lasts"
    (tmp_path / "m.pt").write_bytes(b"x")
    found.until(lambda part: part.directories == [str(tmp_path)])
    found.end()


def test_a_root_that_is_made_again_with_the_same_inode_is_watched_again(watched):
    """Inodes are used again at once; the new root has no watch of its own."""
    shutil.rmtree(watched.root)
    watched.root.mkdir()
    watched.until(lambda part: part.problem == "the root was replaced")
    assert watched.until(lambda part: part.lost and part.problem != watch._GONE).problem == ""
    (watched.root / "m.pt").write_bytes(b"x")
    watched.until(lambda part: part.directories == [str(watched.root)])


def test_after_a_burst_that_may_have_lost_events_everything_is_watched_anew(short_queue, watched):
    """Directories made in an overflow have no watch: hints say so until a new watcher stands."""
    for number in range(20_000):
        (watched.root / f"{number}.pt").touch()
    assert watched.until(lambda part: part.lost).problem == watch._CROWDED
    assert watched.until(lambda part: not part.problem).lost
    # Where the burst paused for a moment, that was not the last new watcher: one directory after the other until one is seen.
    late = [watched.root / f"late{number}" for number in range(40)]
    assert any(path.mkdir() or watched.hears_of(path, 1.0) for path in late)


def test_hints_are_the_topmost_directories_only(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    root = str(tmp_path)
    changed = {f"{root}/a", f"{root}/a/b", f"{root}/a/b/m.pt", f"{root}/c/m.pt", f"{root}/gone/m.pt"}
    assert watch.hints(root, changed, burst=100) == Hints([f"{root}/a", f"{root}/c", f"{root}/gone"])


def test_our_own_files_are_no_hint(tmp_path):
    """A publish in progress must not cause scans of its own root."""
    root = str(tmp_path)
    own = {f"{root}/p/e/.step_5.ckptd-tmp-ab-cd/model.safetensors", f"{root}/.ckptd-trash", f"{root}/.git/x.pt"}
    assert watch.hints(root, own, burst=100) is None


def test_too_many_directories_are_one_scan_of_everything(tmp_path):
    changed = {f"{tmp_path}/d{index}/m.pt" for index in range(watch.DIRECTORIES_MAX + 1)}
    assert watch.hints(str(tmp_path), changed, burst=10_000) == Hints([], lost=True)
    assert watch.hints(str(tmp_path), changed, burst=100) == Hints([], lost=True)


@pytest.mark.slow
def test_an_idle_watch_takes_less_than_three_thousandths_of_a_core(tmp_path):
    context = Context()
    thread = threading.Thread(target=watch.run, args=(Watch(root=str(tmp_path)), context))
    thread.start()
    try:
        context.cancelled.wait(1.0)
        shares = []
        for _ in range(3):
            before_s, began_s = time.process_time(), time.monotonic()
            context.cancelled.wait(2.0)
            shares.append((time.process_time() - before_s) / (time.monotonic() - began_s))
        assert min(shares) < 0.003
    finally:
        context.cancelled.set()
        thread.join()
