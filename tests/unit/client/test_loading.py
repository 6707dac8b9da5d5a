"""Loading through an Experiment: hot, cold, without a daemon, past damage. A load is exact or an error."""

import gc
import hashlib
import os
import time
from pathlib import Path

import pytest
import torch

import ckptd_client as ckptd
from ckptd_client import hot, loader, restore
from tests.support.fake_daemon import FakeDaemon, descriptor_of, files_of, write_published


@pytest.fixture
def daemon(daemon: FakeDaemon) -> FakeDaemon:
    daemon.arenas_max = 8
    return daemon


def state(value: float) -> dict[str, object]:
    return {"model": {"w": torch.full((100_000,), float(value))}, "epoch": int(value), "lr": [0.1, None]}


def same(left: object, right: dict[str, object]) -> bool:
    assert isinstance(left, dict)
    return torch.equal(left["model"]["w"], right["model"]["w"]) and left["epoch"] == right["epoch"]


def saved(run: ckptd.Experiment, daemon: FakeDaemon, home: Path, value: int) -> tuple[str, Path, bytes]:
    """Save and publish; return the id, the directory and the image."""
    handle = run.save(state(value), step=value)
    image = daemon.wait_staged(handle.id)
    directory = write_published(home / "runs" / "vision" / "net", image)
    daemon.publish(handle.id, "verified", path=str(directory))
    return handle.id, directory, image


def hot_reply(checkpoint: str, image: bytes, directory: Path) -> dict[str, object]:
    files = descriptor_of(image)["files"]
    return {"checkpoint": checkpoint, "step": 1, "path": str(directory), "hot": True, "files": files}


def test_nothing_yet_is_none_and_a_named_checkpoint_that_is_not_there_is_an_error(run: ckptd.Experiment):
    assert run.load() is None
    assert run.load("best:val_loss") is None
    assert run.path() is None
    with pytest.raises(ckptd.NotFound, match="step:7"):
        run.load(7)
    with pytest.raises(ckptd.NotFound):
        run.load("deadbeef")


def test_a_rule_that_has_no_winner_yet_is_nothing_although_checkpoints_lie_there(
    run: ckptd.Experiment, daemon: FakeDaemon, home: Path
):
    """The daemon knows, and said so: the disk, which knows of no best, must not make an error of it."""
    saved(run, daemon, home, 1)
    daemon.refuse["attach"] = "not_found"
    assert run.load("best:record") is None
    assert run.load("best_record") is None
    assert same(run.load(), state(1)), "the newest one is on the disk all the same"


def test_a_rule_that_nobody_wrote_is_an_error_and_not_nothing(run: ckptd.Experiment, daemon: FakeDaemon, home: Path):
    """M010: None would have the script begin afresh, over what is there."""
    saved(run, daemon, home, 1)
    daemon.refuse["attach"] = daemon.refuse["resolve"] = "unknown_rule"
    for ask in (run.load, run.path):
        with pytest.raises(ckptd.Refused) as refused:
            ask("best:recrod")
        assert refused.value.code == "unknown_rule"


def test_a_cold_load_is_what_was_saved(run: ckptd.Experiment, daemon: FakeDaemon, home: Path):
    checkpoint, directory, image = saved(run, daemon, home, 3)
    files = [
        {"path": name, "size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
        for name, body in files_of(image).items()
    ]
    daemon.attach_reply = {"checkpoint": checkpoint, "path": str(directory), "hot": False, "files": files}
    loaded = run.load("latest")
    assert same(loaded, state(3))
    assert loaded["lr"] == [0.1, None]
    assert daemon.of("attach")[0]["selector"] == "latest"
    assert daemon.wait_for("detach")[0]["checkpoint"] == checkpoint
    assert list(run.load("latest", keys=["epoch"])) == ["epoch"]
    into = state(9)
    assert run.load("latest", into=into) is not None
    assert same(into, state(3))


def test_a_load_names_where_later_saves_come_from(run: ckptd.Experiment, daemon: FakeDaemon, home: Path):
    """M113: the parent link of a resume."""
    checkpoint, directory, _ = saved(run, daemon, home, 3)
    daemon.attach_reply = {"checkpoint": checkpoint, "path": str(directory), "hot": False, "files": None}
    run.load()
    handle = run.save(state(4), step=4)
    assert descriptor_of(daemon.wait_staged(handle.id))["parent"] == checkpoint


def test_a_hot_load_reads_no_file_and_is_given_back_when_it_is_let_go(
    run: ckptd.Experiment, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hot, "OWN_AFTER_S", 1000.0)
    checkpoint, directory, image = saved(run, daemon, home, 5)
    for path in directory.iterdir():
        path.unlink()
    daemon.attach_reply = hot_reply(checkpoint, image, directory)
    loaded = run.load()
    assert same(loaded, state(5))
    assert not daemon.of("detach")
    del loaded
    gc.collect()
    run._session.connection.tick_within(0)
    assert daemon.wait_for("detach")[0]["checkpoint"] == checkpoint


def test_a_hot_load_that_is_kept_becomes_private_and_survives_the_next_save(
    run: ckptd.Experiment, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch
):
    """The arena is lent again after the detach: what was loaded from it must not change under the training."""
    monkeypatch.setattr(hot, "OWN_AFTER_S", 0.0)
    checkpoint, directory, image = saved(run, daemon, home, 5)
    daemon.attach_reply = hot_reply(checkpoint, image, directory)
    loaded = run.load()
    daemon.wait_for("detach")
    arena = next(a for a in list(daemon.arenas.values()) if a.checkpoint == checkpoint)  # another may be lent meanwhile
    os.pwrite(arena.fd, b"\xff" * (arena.size_bytes - 4096), 4096)
    assert same(loaded, state(5))


def test_a_hot_load_becomes_private_when_the_connection_breaks(run: ckptd.Experiment, daemon: FakeDaemon, home: Path):
    """The daemon no longer knows of the reader: the arena may be lent at any moment."""
    checkpoint, directory, image = saved(run, daemon, home, 6)
    daemon.attach_reply = hot_reply(checkpoint, image, directory)
    loaded = run.load()
    daemon.stop()
    deadline_s = time.monotonic() + 30
    while run._session.hot._held and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not run._session.hot._held
    arena = next(a for a in daemon.arenas.values() if a.checkpoint == checkpoint)
    os.pwrite(arena.fd, b"\xff" * (arena.size_bytes - 4096), 4096)
    assert same(loaded, state(6))


def test_a_hot_copy_that_can_t_be_mapped_is_read_from_the_disk(run: ckptd.Experiment, daemon: FakeDaemon, home: Path):
    checkpoint, directory, image = saved(run, daemon, home, 5)
    reply = hot_reply(checkpoint, image, directory)
    daemon.attach_reply = {**reply, "files": [{"path": "state.json", "offset": 4096, "size_bytes": 10}]}
    assert same(run.load(), state(5))


def test_without_a_daemon_the_manifests_answer(run: ckptd.Experiment, daemon: FakeDaemon, home: Path):
    for value in (1, 2, 3):
        saved(run, daemon, home, value)
    daemon.stop()
    lone = ckptd.Experiment("net", project="vision", dir=home / "runs")
    assert same(lone.load(), state(3))
    assert same(lone.load(2), state(2))
    assert lone.path("step:1") == str(home / "runs/vision/net/step_0000000001")
    with pytest.raises(ckptd.Unavailable):
        lone.load("best:loss")
    lone.close()


@pytest.mark.parametrize("what", ["the directory", "a file"])
def test_what_is_retired_while_it_is_read_without_a_daemon_is_looked_for_anew(
    run: ckptd.Experiment, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch, what: str
):
    """Nobody holds it then: a daemon that was too busy to answer goes on, and so does its retention."""
    directories = [saved(run, daemon, home, value)[1] for value in (1, 2)]
    daemon.stop()
    lone = ckptd.Experiment("net", project="vision", dir=home / "runs")
    real, aside = restore.read_checkpoint, home / "aside"

    def retired_meanwhile(path: str, *given: object, **more: object) -> object:
        if path == str(directories[1]) and directories[1].exists():
            os.rename(path, aside)
            if what == "a file":  # unlinked one after another where it lay
                os.rename(aside, path)
                os.unlink(directories[1] / "model.safetensors")
                os.unlink(directories[1] / "manifest.json")
        return real(path, *given, **more)

    monkeypatch.setattr(restore, "read_checkpoint", retired_meanwhile)
    assert same(lone.load(), state(1))
    with pytest.raises(ckptd.NotFound):
        lone.load(2)
    lone.close()


def test_what_another_save_replaces_while_it_is_read_without_a_daemon_is_that_save(
    run: ckptd.Experiment, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch
):
    _, directory, _ = saved(run, daemon, home, 1)
    other = write_published(home / "other", daemon.wait_staged(run.save({**state(7)}, step=1).id))
    daemon.stop()
    lone = ckptd.Experiment("net", project="vision", dir=home / "runs")
    real = restore.read_checkpoint

    def replaced_meanwhile(path: str, *given: object, **more: object) -> object:
        if other.exists():
            os.rename(directory, home / "aside")
            os.rename(other, directory)
        return real(path, *given, **more)

    monkeypatch.setattr(restore, "read_checkpoint", replaced_meanwhile)
    assert same(lone.load(1), state(7))
    assert lone.load(1, keys=["epoch"]) == {"epoch": 7}
    with pytest.raises(ckptd.MissingPart, match="nothing"):
        lone.load(1, keys=["nothing"])
    lone.close()


def test_what_is_gone_each_time_it_is_read_is_an_error_in_the_end(
    run: ckptd.Experiment, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch
):
    saved(run, daemon, home, 1)
    daemon.stop()
    lone = ckptd.Experiment("net", project="vision", dir=home / "runs")
    real, tries = restore.find_checkpoint, []

    def found_and_gone(*given: object) -> object:
        tries.append(given)
        found = real(*given)
        return found._replace(path=str(home / "nowhere"))

    monkeypatch.setattr(restore, "find_checkpoint", found_and_gone)
    with pytest.raises(ckptd.MissingPart, match="is not there"):
        lone.load(1)
    assert len(tries) == loader.TRIES_MAX
    lone.close()


def damage(directory: Path) -> None:
    path = directory / "model.safetensors"
    body = bytearray(path.read_bytes())
    body[-100] ^= 1
    path.write_bytes(body)


def test_damage_is_reported_and_the_newest_intact_checkpoint_named(
    run: ckptd.Experiment, daemon: FakeDaemon, home: Path
):
    for value in (1, 2):
        saved(run, daemon, home, value)
    checkpoint, directory, _ = saved(run, daemon, home, 3)
    damage(directory)
    with pytest.raises(ckptd.CorruptCheckpoint) as caught:
        run.load()
    assert caught.value.file == "model.safetensors"
    assert caught.value.newest_good == str(home / "runs/vision/net/step_0000000002")
    report = daemon.wait_for("report")[0]
    assert (report["checkpoint"], report["problem"]["file"]) == (checkpoint, "model.safetensors")


def test_fallback_takes_the_newest_good_one_before_the_damage(run: ckptd.Experiment, daemon: FakeDaemon, home: Path):
    directories = [saved(run, daemon, home, value)[1] for value in (1, 2, 3, 4)]
    damage(directories[2])
    damage(directories[1])
    assert same(run.load(3, fallback=True), state(1)), "a resume goes back, not ahead"
    damage(directories[0])
    assert same(run.load(3, fallback=True), state(4))
    damage(directories[3])
    with pytest.raises(ckptd.CorruptCheckpoint):
        run.load(fallback=True)


def test_unverified_loads_are_possible_but_have_to_be_asked_for(run: ckptd.Experiment, daemon: FakeDaemon, home: Path):
    _, directory, _ = saved(run, daemon, home, 1)
    damage(directory)
    assert run.load(verify=False) is not None


@pytest.mark.parametrize("selector", ["", None, -1, 1.5, True, "x" * 600])
def test_a_selector_that_means_nothing_is_named(run: ckptd.Experiment, selector: object):
    """M019"""
    with pytest.raises(ValueError, match="selector="):
        run.load(selector)


def test_a_load_prepares_memory_for_the_saves_to_come(run: ckptd.Experiment, daemon: FakeDaemon, home: Path):
    checkpoint, directory, _ = saved(run, daemon, home, 3)
    daemon.stop()
    daemon.lose_arenas()
    daemon.start()
    daemon.attach_reply = {"checkpoint": checkpoint, "path": str(directory), "hot": False, "files": None}
    other = ckptd.Experiment("net", project="vision", dir=home / "runs")
    assert other.load() is not None
    daemon.wait_leased(2)
    other.close()
