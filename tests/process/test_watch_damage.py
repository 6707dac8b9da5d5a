"""What happens to a watched checkpoint after its digest was recorded: rot, a new one in its place, deletion. M011, F27"""

import hashlib
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import eventually
from tests.support.onlooker import Onlooker
from tests.support.signals import standing_still
from tests.support.writer import Writer

pytestmark = pytest.mark.xdist_group("watch_damage")
SIZE_BYTES = 5 << 20
MIB = 1 << 20


def rot(onlooker: Onlooker, path: Path, change: Callable[[bytearray], None]) -> None:
    """Change bytes as a bad disk does: nobody wrote, so no time of writing tells, and no look sees it half done."""
    facts = path.stat()
    with standing_still([onlooker.daemon_pid, *onlooker.workers()]):
        with path.open("r+b") as file:
            body = bytearray(file.read())
            change(body)
            file.seek(0)
            file.write(body)
            file.truncate()
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def flip_a_bit(body: bytearray) -> None:
    body[2 * MIB + 17] ^= 4


def zero_a_block(body: bytearray) -> None:
    body[3 * MIB : 3 * MIB + 4096] = bytes(4096)


def cut(body: bytearray) -> None:
    del body[-1:]


ROT: dict[str, tuple[Callable[[bytearray], None], str, list[int]]] = {
    "flipped bit": (flip_a_bit, "digest", [2]),
    "zeroed block": (zero_a_block, "digest", [3]),
    "cut": (cut, "size", []),
}


@pytest.mark.parametrize("how", ROT)
def test_rot_is_named_by_verify_and_never_verified_again(
    onlooker: Onlooker, writer: Writer, root: Path, how: str
) -> None:
    change, kind, mib = ROT[how]
    path = root / "model_1.safetensors"
    writer.make(name="rot", form="safetensors", seed=1, size_bytes=SIZE_BYTES)
    writer.put(name="rot", path=path)
    row = onlooker.wait_done(path)
    rot(onlooker, path, change)
    for _ in range(2):  # a second look at the same bytes finds the same
        said = onlooker.run("verify", row["checkpoint"], "--json")
        assert said.code == 4
        (result,) = said.json["results"]
        (damage,) = result["damage"]
        assert (result["ok"], result["path"], damage["kind"], damage["mib"]) == (False, str(path), kind, mib)
    after = onlooker.row(row["checkpoint"])
    assert after is not None
    assert after["state"] in ({"corrupt", "missing"} if change is cut else {"corrupt"})  # another size: another file
    onlooker.wait_scans(root)
    assert onlooker.run("path", row["checkpoint"]).code == 3
    assert onlooker.run("path", f"{row['project']}/{row['name']}@latest").code == 3
    assert onlooker.run("wait", row["checkpoint"], "--level", "verified").code == 4
    told = [e["event"] for e in onlooker.events() if e["checkpoint"] == row["checkpoint"]]
    assert told.index("checkpoint.corrupt") > told.index("checkpoint.verified")
    assert "checkpoint.verified" not in told[told.index("checkpoint.corrupt") :]


def test_damage_names_the_tensors_it_hit(onlooker: Onlooker, writer: Writer, root: Path) -> None:
    path = root / "model_2.safetensors"
    writer.make(name="named", form="safetensors", seed=2, size_bytes=SIZE_BYTES)
    writer.put(name="named", path=path)
    row = onlooker.wait_done(path)
    rot(onlooker, path, lambda body: body.__setitem__(len(body) - 1, body[-1] ^ 255))
    (damage,) = onlooker.run("verify", row["checkpoint"], "--json").json["results"][0]["damage"]
    assert damage["tensors"] == ["layer.weight"]  # the last in the file: safetensors sorts by name within a type


def test_a_repaired_file_is_verified_again(onlooker: Onlooker, writer: Writer, root: Path) -> None:
    """Repaired means the recorded digest, bit for bit."""
    path = root / "model_3.pt"
    writer.make(name="repaired", form="torch", seed=3, size_bytes=SIZE_BYTES)
    writer.put(name="repaired", path=path)
    row = onlooker.wait_done(path)
    rot(onlooker, path, flip_a_bit)
    assert onlooker.run("verify", row["checkpoint"]).code == 4
    rot(onlooker, path, flip_a_bit)
    assert onlooker.run("verify", row["checkpoint"]).code == 0
    assert onlooker.wait_state(row["checkpoint"], "live")["level"] == "verified"


def test_one_damaged_file_of_a_directory_is_named(onlooker: Onlooker, writer: Writer, root: Path) -> None:
    path = root / "checkpoint-7"
    path.mkdir()
    for number, name in enumerate(("model.safetensors", "optimizer.pt")):
        writer.make(name=name, form="safetensors" if not number else "torch", seed=number, size_bytes=SIZE_BYTES)
        writer.put(name=name, path=path / name)
    (path / "trainer_state.json").write_text('{"global_step": 7}')
    row = onlooker.wait_done(path)
    rot(onlooker, path / "optimizer.pt", flip_a_bit)
    said = onlooker.run("verify", row["checkpoint"])
    assert said.code == 4
    assert "optimizer.pt: digest MiB 2" in said.out
    assert "model.safetensors" not in said.out
    (path / "optimizer.pt").unlink()
    said = onlooker.run("verify", row["checkpoint"])
    assert said.code == 4
    assert "optimizer.pt: missing" in said.out


def test_another_file_in_its_place_is_another_checkpoint(onlooker: Onlooker, writer: Writer, root: Path) -> None:
    """Renamed over it, by somebody who preserves times: the old one is gone, and the new one earns its own digest."""
    path = root / "model_4.safetensors"
    for name, seed in (("first", 4), ("second", 5)):
        writer.make(name=name, form="safetensors", seed=seed, size_bytes=SIZE_BYTES)
    writer.put(name="first", path=path)
    old = onlooker.wait_done(path)
    facts = path.stat()
    writer.put(name="second", path=root.parent / "aside")
    os.utime(root.parent / "aside", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.rename(root.parent / "aside", path)
    new = onlooker.wait_done(path, 2)
    assert new["checkpoint"] != old["checkpoint"]
    assert onlooker.digests(new["checkpoint"]) != onlooker.digests(old["checkpoint"])
    said = onlooker.run("verify", old["checkpoint"], "--json")
    assert said.code == 4
    assert not said.json["results"][0]["ok"]
    row = onlooker.row(old["checkpoint"])
    assert row is not None
    assert row["state"] in {"missing", "corrupt"}
    assert onlooker.run("verify", new["checkpoint"]).code == 0


@pytest.mark.parametrize("form", ["file", "directory"])
def test_a_deleted_checkpoint_is_missing_within_one_reconcile(
    onlooker: Onlooker, writer: Writer, root: Path, form: str
) -> None:
    path = root / ("step_5" if form == "directory" else "model_5.pt")
    if form == "directory":
        writer.dcp_save(path=path, seed=6)
    else:
        writer.torch_save(path=path, seed=6)
    row = onlooker.wait_done(path)
    shutil.rmtree(path) if form == "directory" else path.unlink()
    gone = datetime.now(UTC)
    assert onlooker.wait_state(row["checkpoint"], "missing")["level"] == "verified"
    (told,) = [e for e in onlooker.events("checkpoint.missing") if e["checkpoint"] == row["checkpoint"]]
    at = datetime.fromisoformat(told["at"])
    done = [e for e in onlooker.news("reconcile.done") if e["root"] == str(root)]
    assert done
    # The one that was under way, and the one after it; how long scans take is the machine's affair.
    assert sum(gone < datetime.fromisoformat(e["timestamp"]) < at for e in done) <= 2
    assert onlooker.run("verify", row["checkpoint"]).code == 4
    onlooker.wait_scans(root)
    assert len([e for e in onlooker.events("checkpoint.missing") if e["checkpoint"] == row["checkpoint"]]) == 1


def test_a_checkpoint_that_is_moved_away_and_back_is_the_same_one(
    onlooker: Onlooker, writer: Writer, root: Path
) -> None:
    path = root / "model_6.pt"
    writer.torch_save(path=path, seed=7)
    row = onlooker.wait_done(path)
    os.rename(path, root.parent / "away")
    onlooker.wait_state(row["checkpoint"], "missing")
    os.rename(root.parent / "away", path)
    onlooker.wait_state(row["checkpoint"], "live")
    onlooker.wait_level(row["checkpoint"])
    assert [r["checkpoint"] for r in onlooker.at(path)] == [row["checkpoint"]]


def test_a_path_that_is_reused_step_after_step_keeps_only_the_last(
    onlooker: Onlooker, writer: Writer, root: Path
) -> None:
    """Legacy scripts write last.ckpt for ever: each save is a checkpoint of its own, the newest one is good."""
    path = root / "last.ckpt"
    rows: list[dict[str, Any]] = []
    for seed in range(3):
        writer.make(name="last", form="torch", seed=seed)
        writer.put(name="last", path=root.parent / "next")
        os.rename(root.parent / "next", path)
        rows.append(onlooker.wait_done(path, seed + 1))
    states = [row["state"] for row in onlooker.at(path)]
    assert states == ["missing", "missing", "live"]
    assert onlooker.run("path", f"{rows[0]['project']}/{rows[0]['name']}").out.strip() == str(path)
    assert len({onlooker.digests(row["checkpoint"])[""] for row in rows}) == 3


def test_a_file_truncated_or_replaced_while_it_is_digested_is_never_verified_wrong(
    onlooker: Onlooker, writer: Writer, root: Path
) -> None:
    """F26: the worker stands still between its fsync and its reading; the writer comes back in that moment."""
    for number, how in enumerate(("new", "old")):
        path = root / f"raced_{number}.safetensors"
        whole = []
        for name, seed in (("before", 20), ("after", 21)):
            writer.make(name=name, form="safetensors", seed=seed)
            writer.put(name=name, path=root.parent / name)
            whole.append(hashlib.sha256((root.parent / name).read_bytes()).hexdigest())
        onlooker.arm("digest.fsynced", "delay:6")
        writer.put(name="before", path=path)
        onlooker.wait_fired()
        writer.open(path=path, how=how)
        writer.write(name="after", path=path, part=0, of=2)
        onlooker.wait_looks(path)
        writer.write(name="after", path=path, part=1, of=2)
        writer.close(path=path)
        row = eventually(
            lambda path=path: next(
                (r for r in onlooker.at(path) if r["state"] == "live" and r["level"] == "verified"), None
            ),
            "one of its rows to be verified",
        )
        assert onlooker.digests(row["checkpoint"]) == {"": whole[1]}
        durable = [r["checkpoint"] for r in onlooker.at(path) if r["durable_at"] is not None]
        assert all(onlooker.digests(checkpoint)[""] in whole for checkpoint in durable)
