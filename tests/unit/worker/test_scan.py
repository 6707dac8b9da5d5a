"""The verb scan: everything that is there, once, in bounds, and nothing that is not."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest

from ckptd.errors import BadPath, NotFound
from ckptd.worker import digest, scan
from ckptd.worker.context import Cancelled, Context
from ckptd.worker.mark import mark
from ckptd.worker.protocol import Digest, Scan


def scanned(root, **more):
    """Return (candidates by path below the root, the final answer, sizes of the parts)."""
    found, parts = {}, []

    def send(frame):
        parts.append(len(frame["part"].found))
        for candidate in frame["part"].found:
            relative = os.path.relpath(candidate.path, root)
            assert relative not in found
            found[relative] = candidate

    answer = scan.run(Scan(root=str(root), **{"managed": False, **more}), Context(send=send))
    return found, answer, parts


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10)


def test_files_and_directories_are_found_once_each(tmp_path):
    """M006: a directory checkpoint is one; what lies in it is not another."""
    write(
        tmp_path,
        "a/model_1.pt",
        "a/model_2.safetensors",
        "a/notes.txt",
        "b/epoch=1-step=9.ckpt",
        "out/trainer_state.json",
        "out/model.safetensors",
        "out/checkpoint-500/trainer_state.json",
        "out/checkpoint-500/model.safetensors",
        "out/checkpoint-500/global_step500/zero.pt",
        "dcp/step-3/__0_0.distcp",
        "dcp/step-3/.metadata",
        "mega/iter_0000500/mp_rank_00/model.pt",
        "w/model-00001-of-00002.safetensors",
        "w/model-00002-of-00002.safetensors",
        "w/model.safetensors.index.json",
        "arrays/a.npz",
    )
    (tmp_path / "empty" / "step_7").mkdir(parents=True)
    found, answer, _ = scanned(tmp_path)
    assert {path: (c.kind, c.format, c.step) for path, c in found.items()} == {
        "a/model_1.pt": ("file", "torch-zip", 1),
        "a/model_2.safetensors": ("file", "safetensors", 2),
        "b/epoch=1-step=9.ckpt": ("file", "torch-zip", 9),
        "out/model.safetensors": ("file", "safetensors", None),
        "out/checkpoint-500": ("directory", "hf-trainer", 500),
        "dcp/step-3": ("directory", "dcp", 3),
        "mega/iter_0000500": ("directory", "opaque", 500),
        "w": ("directory", "safetensors-sharded", None),
        "arrays/a.npz": ("file", "opaque", None),
    }
    assert (answer.complete, answer.problem) == (True, "")


def test_an_identity_is_the_one_that_digest_takes(tmp_path):
    """What a scan sees again must be known again: files and directories alike."""
    write(tmp_path, "m.pt", "checkpoint-5/trainer_state.json", "checkpoint-5/sub/x.pt")
    found, _, _ = scanned(tmp_path)
    for name in ("m.pt", "checkpoint-5"):
        taken = digest.run(Digest(root=str(tmp_path), path=str(tmp_path / name)), Context())
        assert found[name].identity == taken.identity


def test_any_change_below_a_directory_changes_its_identity(tmp_path):
    write(tmp_path, "checkpoint-5/sub/x.pt", "checkpoint-5/sub/y.pt")
    seen = [scanned(tmp_path)[0]["checkpoint-5"].identity]
    below = tmp_path / "checkpoint-5" / "sub"
    for change in (
        partial((below / "x.pt").write_bytes, b"y" * 10),
        partial((below / "x.pt").rename, below / "z.pt"),
        (below / "y.pt").unlink,
    ):
        change()
        seen.append(scanned(tmp_path)[0]["checkpoint-5"].identity)
    assert len(set(seen)) == len(seen)


def test_unfinished_hidden_and_own_names_are_left_out(tmp_path):
    write(
        tmp_path,
        "a.pt.tmp",
        ".b.pt",
        "tmp-checkpoint-5/model.pt",
        "7.orbax-checkpoint-tmp/x.pt",
        "step-5_unfinished/x.pt",
        ".ckptd-trash/x.pt",
        ".step_5.ckptd-tmp-ab/x.pt",
        ".git/x.pt",
        "c.ckpt",
        "c-unfinished",
        "step_9/x.pt",
        "step_9-unfinished",
    )
    found, answer, _ = scanned(tmp_path)
    assert found == {}
    assert answer.complete
    assert answer.skipped["unfinished"] >= 4


def test_links_fifos_and_foreign_names_are_skipped_and_counted(tmp_path):
    """S11, S12, S14: nothing is followed, opened or choked on."""
    write(tmp_path, "real/m.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real/m.pt")
    (tmp_path / "around").symlink_to(tmp_path / "real")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "fifo.pt")
    raw = os.fsencode(tmp_path)
    with open(raw + b"/\xff.pt", "wb") as file:
        file.write(b"x")
    os.mkdir(raw + b"/\xfe")
    write(tmp_path, "odd/-rf.pt", "odd/new\nline.pt", "odd/\u202eabc.pt")
    found, answer, _ = scanned(tmp_path)
    assert set(found) == {"real/m.pt", "odd/-rf.pt", "odd/new\nline.pt", "odd/\u202eabc.pt"}
    assert answer.skipped == {"symlink": 3, "special": 1, "not UTF-8": 2}


def test_a_limit_that_cuts_the_scan_short_is_told(tmp_path):
    """Nobody may take "not found" for "gone" then."""
    write(tmp_path, *(f"m_{n}.pt" for n in range(50)))
    found, answer, _ = scanned(tmp_path, entries_max=20)
    assert (answer.complete, answer.problem) == (False, "over 20 entries")
    assert len(found) <= 20


def test_a_tree_of_a_thousand_levels_is_cut_at_its_limit(tmp_path):
    """S14: bounded in depth and open files."""
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1000):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    try:
        found, answer, _ = scanned(tmp_path)
        assert (found, answer.complete, answer.skipped) == ({}, False, {"too deep": 1})
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # Python's own removal recurses


def test_another_file_system_is_not_entered(tmp_path):
    """S14: mounted below the root, in a namespace of its own."""
    code = f"""
import os, subprocess
from ckptd.worker import scan, settle
from ckptd.worker.context import Context
from ckptd.worker.protocol import Scan, Settle
root = {str(tmp_path)!r}
os.mkdir(root + "/mounted")
subprocess.run(["mount", "-t", "tmpfs", "none", root + "/mounted"], check=True)
for name in ("here.pt", "mounted/there.pt"):
    open(root + "/" + name, "w").close()
paths = []
context = Context(send=lambda frame: paths.extend(c.path for c in frame["part"].found))
answer = scan.run(Scan(root=root, managed=False), context)
print(paths == [root + "/here.pt"], answer.skipped)
print(settle.run(Settle(root=root, path=root + "/mounted/there.pt", quiet_s=0.0), Context()).reason)
"""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare")
    run = [unshare, "--user", "--map-root-user", "--mount", sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, check=False, text=True, timeout=60)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no user namespaces here")
    first, second = done.stdout.splitlines()
    assert first == "True {'other device': 1}"
    assert second.startswith("refused: ")


def test_a_directory_without_permission_is_told(tmp_path, monkeypatch):
    """What is known to be in it is not gone."""
    write(tmp_path, "closed/m.pt", "open/m.pt")
    real = os.open

    def refuse(path, flags, mode=0o777, *, dir_fd=None):
        if path == "closed":
            raise PermissionError(13, "Permission denied")
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(scan.os, "open", refuse)
    found, answer, _ = scanned(tmp_path)
    assert set(found) == {"open/m.pt"}
    assert (answer.complete, answer.skipped) == (False, {"unreadable": 1})


def test_parts_hold_at_most_five_hundred(tmp_path):
    write(tmp_path, *(f"run{n % 3}/m_{n}.pt" for n in range(1201)))
    found, answer, parts = scanned(tmp_path)
    assert (len(found), parts, answer.seen) == (1201, [500, 500, 201], 1204)


def test_a_cancelled_scan_ends(tmp_path):
    write(tmp_path, *(f"m_{n}.pt" for n in range(300)))
    context = Context()
    context.cancelled.set()
    with pytest.raises(Cancelled):
        scan.run(Scan(root=str(tmp_path), managed=False), context)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_scan_below_a_directory_sees_only_that(tmp_path, absolute):
    write(tmp_path, "a/b/m.pt", "a/n.pt", "c/o.pt")
    under = str(tmp_path / "a" / "b") if absolute else "a/b"
    assert set(scanned(tmp_path, under=under)[0]) == {"a/b/m.pt"}


@pytest.mark.parametrize("under", ["out/checkpoint-5", "out/checkpoint-5/sub", "out/checkpoint-5/sub/deeper"])
def test_a_scan_below_a_part_of_a_checkpoint_finds_the_checkpoint(tmp_path, under):
    """A hint names the directory of the file that changed, which may lie deep in one checkpoint."""
    write(tmp_path, "out/checkpoint-5/trainer_state.json", "out/checkpoint-5/sub/deeper/x.pt", "out/other.pt")
    assert set(scanned(tmp_path, under=under)[0]) == {"out/checkpoint-5"}


@pytest.mark.parametrize("under", ["gone", "a/gone", ".hidden", "step_5", "link"])
def test_a_scan_below_what_is_not_there_or_not_looked_at_finds_nothing(tmp_path, under):
    write(tmp_path, "a/m.pt", ".hidden/m.pt", "step_5/m.pt", "step_5-unfinished")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found, answer, _ = scanned(tmp_path, under=under)
    assert (found, answer.complete) == ({}, True)


@pytest.mark.parametrize("under", ["../x", "a/../..", "/etc"])
def test_a_scan_never_leaves_its_root(tmp_path, under):
    """S11."""
    with pytest.raises(BadPath):
        scanned(tmp_path, under=under)


def test_a_root_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(NotFound):
        scanned(tmp_path / "gone")


def ours(path, **more):
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * 10)
    manifest = {"v": 1, "checkpoint": "ab" * 16, "files": [], "config": {"lr": 0.1}, **more}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def test_a_managed_root_gives_manifests_and_nothing_else(tmp_path):
    """The catalog can be made again from this."""
    manifest = ours(tmp_path / "project" / "run" / "step_0000000005")
    ours(tmp_path / "project" / "run" / "step_0000000006", v=99)
    ours(tmp_path / "project" / "run" / ".step_0000000007.ckptd-tmp-ab-cd")
    write(tmp_path, "project/run/stray.pt", "project/run/step_0000000008/model.safetensors")
    (tmp_path / "project" / "run" / "latest").symlink_to("step_0000000005")
    found, answer, _ = scanned(tmp_path, managed=True)
    assert {path: (c.kind, c.format, c.step, c.manifest) for path, c in found.items()} == {
        "project/run/step_0000000005": ("directory", "ckptd", 5, manifest),
        "project/run/step_0000000006": ("directory", "ckptd", 6, None),
    }
    assert answer.complete


def test_a_manifest_that_is_a_link_or_too_large_is_none(tmp_path, monkeypatch):
    """S16: a managed root belongs to a user, who may put anything there."""
    ours(tmp_path / "a" / "step_0000000005")
    ours(tmp_path / "b" / "step_0000000006")
    secret = tmp_path / "secret"
    (tmp_path / "a" / "step_0000000005" / "manifest.json").rename(secret)
    (tmp_path / "a" / "step_0000000005" / "manifest.json").symlink_to(secret)
    monkeypatch.setattr(scan, "MANIFEST_BYTES_MAX", 10)
    found, _, _ = scanned(tmp_path, managed=True)
    assert {path: c.manifest for path, c in found.items()} == {"b/step_0000000006": None}


def test_large_manifests_travel_in_parts_of_their_own(tmp_path, monkeypatch):
    """A frame has a limit; five hundred manifests of megabytes would pass it."""
    for step in range(4):
        ours(tmp_path / "p" / "e" / f"step_{step:010d}", note="x" * 3000)
    monkeypatch.setattr(scan, "PART_BYTES_MAX", 5000)
    found, _, parts = scanned(tmp_path, managed=True)
    assert (len(found), parts) == (4, [2, 2])


def marks_of(root, found):
    """Return the marks of candidates, as the daemon would make them of its rows, and their paths in that order."""
    seen = [(path, candidate.identity) for path, candidate in sorted(found.items())]
    marks = [mark(f"{root}/{path}", one.ino, one.size_bytes, one.mtime_ns) for path, one in seen]
    return b"".join(marks), [path for path, _ in seen]


def test_what_is_known_is_counted_and_what_is_not_as_known_is_told(tmp_path):
    """M006: every known file is looked at: changed in place, replaced, grown or gone, none is taken for the same."""
    names = ("same.pt", "same/checkpoint-5/trainer_state.json", "touched.pt", "grown.pt", "replaced.pt", "gone.pt")
    write(tmp_path, *names, "parts/step_1/__0_0.distcp", "parts/step_1/.metadata")
    known, paths = marks_of(tmp_path, scanned(tmp_path)[0])
    directories = {path: os.stat(tmp_path / path).st_mtime_ns for path in (".", "parts/step_1")}
    os.utime(tmp_path / "touched.pt", ns=(0, (tmp_path / "touched.pt").stat().st_mtime_ns + 1))
    (tmp_path / "grown.pt").write_bytes(b"x" * 11)
    (tmp_path / "parts/step_1/__0_0.distcp").write_bytes(b"y" * 10)
    before = (tmp_path / "replaced.pt").stat()
    (tmp_path / "other").write_bytes(b"z" * 10)
    (tmp_path / "other").replace(tmp_path / "replaced.pt")
    os.utime(tmp_path / "replaced.pt", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "gone.pt").unlink()
    write(tmp_path, "new.pt")
    for path, mtime_ns in directories.items():
        os.utime(tmp_path / path, ns=(0, mtime_ns))  # a directory's time tells nothing of the files in it
    found, answer, _ = scanned(tmp_path, known=known)
    assert set(found) == {"touched.pt", "grown.pt", "replaced.pt", "parts/step_1", "new.pt"}
    assert answer.same == 2
    assert {paths[at] for at in answer.unmet} == {*("touched.pt", "grown.pt", "replaced.pt", "parts/step_1", "gone.pt")}


def test_of_two_marks_of_one_file_the_later_is_met(tmp_path):
    """Two rows of the same bytes at one path: the newest counts, as in a look-up by path."""
    write(tmp_path, "a.pt")
    known, _ = marks_of(tmp_path, scanned(tmp_path)[0])
    answer = scanned(tmp_path, known=known * 2)[1]
    assert (answer.same, answer.unmet) == (1, [])
