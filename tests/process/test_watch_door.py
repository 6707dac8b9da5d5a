"""The door that costs a training nothing: foreign writers in processes of their own, the real daemon beside them.

Every test holds the writer still at its worst moments and waits until the daemon has looked at just that, more than
once. Nothing may get a level before the writer is done, everything must be verified after. M209, M067, F26
"""

import hashlib
import json
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import eventually
from tests.support.onlooker import Onlooker
from tests.support.writer import Writer

pytestmark = pytest.mark.xdist_group("watch_door")
FORMS = {"torch": ".pt", "safetensors": ".safetensors"}


def sha256sum(path: Path) -> str:
    return subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]


def check_done(onlooker: Onlooker, path: Path, *, rows: int = 1) -> dict[str, Any]:
    """The newest row of a path is verified, its digests are what `sha256sum` says now, and no other row is live."""
    row = onlooker.wait_done(path, rows)
    files = {name: path / name if name else path for name in onlooker.digests(row["checkpoint"])}
    if path.is_dir():
        assert set(files) == {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert onlooker.digests(row["checkpoint"]) == {name: sha256sum(file) for name, file in files.items()}
    found = onlooker.at(path)
    assert len(found) == rows
    assert [other["state"] for other in found if other["checkpoint"] != row["checkpoint"]] == ["missing"] * (rows - 1)
    return row


def published(onlooker: Onlooker, path: Path) -> list[datetime]:
    """When anything at this path was called durable."""
    ids = {row["checkpoint"] for row in onlooker.at(path)}
    told = [event for event in onlooker.events("checkpoint.published") if event["checkpoint"] in ids]
    return [datetime.fromisoformat(event["at"]) for event in told]


def test_what_torch_saves_is_found_and_verified(onlooker: Onlooker, writer: Writer, root: Path) -> None:
    path = root / "run" / "model_120.pt"
    path.parent.mkdir()
    writer.torch_save(path=path, seed=1, size_bytes=3 << 20)
    row = check_done(onlooker, path)
    assert (row["step"], row["format"], row["origin"]) == (120, "torch-zip", "watch")
    assert (row["project"], row["name"]) == (root.parent.name, "run")


def test_a_file_that_is_written_slowly_is_not_taken_early(onlooker: Onlooker, writer: Writer, root: Path) -> None:
    """Its writer pauses with the file open; all but a few bytes are there for longer than quiet_s."""
    paths = {form: root / f"slow_1{ending}" for form, ending in FORMS.items()}
    for form, path in paths.items():
        writer.make(name=form, form=form, seed=2)
        writer.open(path=path)
    for part in range(3):  # after the last part the file is whole, and still open
        for form, path in paths.items():
            writer.write(name=form, path=path, part=part, of=3)
        onlooker.wait_looks(*paths.values())
        assert [published(onlooker, path) for path in paths.values()] == [[], []]
    for path in paths.values():
        writer.close(path=path)
        check_done(onlooker, path)


def test_a_writer_that_closes_between_its_chunks_is_waited_for(onlooker: Onlooker, writer: Writer, root: Path) -> None:
    """No descriptor is open while it pauses: only the structure tells that something is to come."""
    paths = {form: root / f"chunks_1{ending}" for form, ending in FORMS.items()}
    for part in range(3):
        for form, path in paths.items():
            writer.make(name=form, form=form, seed=3)
            writer.open(path=path, how="end" if part else "new")
            writer.write(name=form, path=path, part=part, of=3)
            writer.close(path=path)
        if part < 2:
            onlooker.wait_looks(*paths.values())
            assert [published(onlooker, path) for path in paths.values()] == [[], []]
    for path in paths.values():
        check_done(onlooker, path)


def test_a_file_of_unknown_structure_is_not_taken_while_its_writer_has_it_open(
    onlooker: Onlooker, writer: Writer, root: Path
) -> None:
    """Nothing changes for several quiet_s; the read lease alone says that somebody is at work."""
    path = root / "weights_7.h5"
    writer.make(name="raw", form="raw", seed=4)
    writer.open(path=path)
    writer.write(name="raw", path=path, part=0, of=2)
    onlooker.wait_looks(path, more=3)
    assert published(onlooker, path) == []
    writer.write(name="raw", path=path, part=1, of=2)
    writer.close(path=path)
    check_done(onlooker, path)


def test_a_preallocated_file_that_is_filled_through_a_mapping_is_not_taken_early(
    onlooker: Onlooker, writer: Writer, root: Path
) -> None:
    """Header and full size are there from the first part on, no descriptor is open, the tail is zeros."""
    path = root / "mapped_9.safetensors"
    writer.make(name="mapped", form="safetensors", seed=5, size_bytes=8 << 20)
    writer.map(name="mapped", path=path)
    for part in range(3):
        writer.fill(name="mapped", path=path, part=part, of=3)
        onlooker.wait_looks(path)
    assert published(onlooker, path) == []
    writer.unmap(path=path)
    check_done(onlooker, path)


def test_a_file_rewritten_in_place_is_a_new_checkpoint_once_it_is_whole(
    onlooker: Onlooker, writer: Writer, root: Path
) -> None:
    """Same size, whole by its structure all the while: half the old bytes, half the new ones are nobody's checkpoint."""
    paths = {form: root / f"last{ending}" for form, ending in FORMS.items()}
    old = {}
    for form, path in paths.items():
        writer.make(name=f"old {form}", form=form, seed=6)
        writer.make(name=f"new {form}", form=form, seed=7)
        writer.put(name=f"old {form}", path=path)
        old[form] = check_done(onlooker, path)["checkpoint"]
    digests = {form: onlooker.digests(checkpoint) for form, checkpoint in old.items()}
    for form, path in paths.items():
        writer.open(path=path, how="old")
        writer.write(name=f"new {form}", path=path, part=0, of=2)
        onlooker.wait_found(path, 2)
    onlooker.wait_looks(*paths.values())
    for form, path in paths.items():
        assert len(published(onlooker, path)) == 1
        onlooker.wait_state(old[form], "missing")
        writer.write(name=f"new {form}", path=path, part=1, of=2)
        writer.close(path=path)
    for form, path in paths.items():
        new = check_done(onlooker, path, rows=2)["checkpoint"]
        assert onlooker.digests(new) != digests[form]
        assert onlooker.digests(old[form]) == digests[form]


def test_a_sharded_directory_waits_for_its_last_shard_and_its_index(
    onlooker: Onlooker, writer: Writer, root: Path
) -> None:
    """Side by side: the index comes first, and the index comes last."""
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"metadata": {"total_size": 1}, "weight_map": {f"w{number}": name for number, name in enumerate(names)}}
    first, last = paths = (root / "index-first", root / "index-last")
    for number, name in enumerate(names):
        writer.make(name=name, form="safetensors", seed=10 + number)
    for path in paths:
        path.mkdir()
    (first / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in paths:
        writer.put(name=names[0], path=path / names[0])
    onlooker.wait_looks(*paths)
    for path in paths:
        writer.open(path=path / names[1])
        writer.write(name=names[1], path=path / names[1], part=0, of=2)
    onlooker.wait_looks(*paths)
    assert [published(onlooker, path) for path in paths] == [[], []]
    for path in paths:
        writer.write(name=names[1], path=path / names[1], part=1, of=2)
        writer.close(path=path / names[1])
    onlooker.wait_looks(last)
    assert published(onlooker, last) == []
    (last / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in paths:
        assert check_done(onlooker, path)["format"] == "safetensors-sharded"
    assert {row["path"] for row in onlooker.rows(root.parent.name)} == {str(path) for path in paths}


def test_a_dcp_directory_is_one_checkpoint_once_its_metadata_is_there(
    onlooker: Onlooker, writer: Writer, root: Path, tmp_path: Path
) -> None:
    """.metadata names all data and comes last; a torn data file is told from it by its size."""
    writer.dcp_save(path=tmp_path / "elsewhere", seed=12)
    names = sorted(p.name for p in (tmp_path / "elsewhere").iterdir())
    for name in names:
        writer.take(name=name, path=tmp_path / "elsewhere" / name)
    path = root / "iter_0000500"
    path.mkdir()
    data = [name for name in names if name != ".metadata"]
    assert len(names) == len(data) + 1
    for name in data:
        writer.open(path=path / name)
        writer.write(name=name, path=path / name, part=0, of=2)
        onlooker.wait_looks(path)
        writer.write(name=name, path=path / name, part=1, of=2)
        writer.close(path=path / name)
    onlooker.wait_looks(path)
    assert published(onlooker, path) == []
    writer.put(name=".metadata", path=path / ".metadata")
    row = check_done(onlooker, path)
    assert (row["step"], row["format"]) == (500, "dcp")


def test_what_torch_distributed_saves_is_found_and_verified(onlooker: Onlooker, writer: Writer, root: Path) -> None:
    path = root / "step_40"
    assert ".metadata" in writer.dcp_save(path=path, seed=13)["files"]
    assert check_done(onlooker, path)["format"] == "dcp"


def test_a_trainer_directory_waits_for_its_state_and_brings_its_metrics(
    onlooker: Onlooker, writer: Writer, root: Path
) -> None:
    """The order of the files is the Trainer's own: model and arguments, optimizer, random state, trainer_state.json."""
    path = root / "out" / "checkpoint-500"
    path.mkdir(parents=True)
    for name, form in (("model.safetensors", "safetensors"), ("training_args.bin", "torch"), ("optimizer.pt", "torch")):
        writer.make(name=name, form=form, seed=14)
    (path / "config.json").write_text("{}")
    writer.open(path=path / "model.safetensors")
    writer.write(name="model.safetensors", path=path / "model.safetensors", part=0, of=2)
    onlooker.wait_looks(path)
    writer.write(name="model.safetensors", path=path / "model.safetensors", part=1, of=2)
    writer.put(name="training_args.bin", path=path / "training_args.bin")
    writer.close(path=path / "model.safetensors")
    writer.open(path=path / "optimizer.pt")
    writer.write(name="optimizer.pt", path=path / "optimizer.pt", part=0, of=1)
    writer.close(path=path / "optimizer.pt")
    onlooker.wait_looks(path)
    assert published(onlooker, path) == []
    history = [{"loss": 2.5, "step": 250}, {"loss": 1.25, "step": 500}, {"eval_loss": 0.75, "step": 500}]
    state = {"global_step": 500, "epoch": 1.5, "log_history": history}
    (path / "trainer_state.json").write_text(json.dumps(state))
    row = check_done(onlooker, path)
    assert (row["step"], row["epoch"], row["format"]) == (500, 1.5, "hf-trainer")
    assert row["metrics"] == {"loss": 1.25, "eval_loss": 0.75}


def test_step_and_epoch_come_from_inside_when_the_name_does_not_tell(
    onlooker: Onlooker, writer: Writer, root: Path
) -> None:
    path = root / "final"
    writer.make(name="weights", form="safetensors", seed=15)
    path.mkdir()
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 77, "epoch": 2.0, "log_history": []}))
    writer.put(name="weights", path=path / "model.safetensors")
    row = check_done(onlooker, path)
    assert (row["step"], row["epoch"]) == (77, 2.0)


def test_what_is_torn_is_never_called_complete(onlooker: Onlooker, writer: Writer, root: Path) -> None:
    """Truncated, or a zip whose checksums disagree: however long it is quiet."""
    torn = {form: root / f"torn_1{ending}" for form, ending in FORMS.items()}
    for form, path in torn.items():
        writer.make(name=form, form=form, seed=20)
        writer.open(path=path)
        writer.write(name=form, path=path, part=0, of=2)
        writer.close(path=path)
    crc = root / "crc_1.pt"
    writer.torch_save(path=root.parent / "whole.pt", seed=21)
    body = bytearray((root.parent / "whole.pt").read_bytes())
    body[len(body) // 4] ^= 1  # in the first tensor: every structure around it stays as it was
    crc.write_bytes(body)
    onlooker.wait_looks(*torn.values(), crc, more=3)
    for path in (*torn.values(), crc):
        assert published(onlooker, path) == []
        row = onlooker.wait_found(path)
        assert onlooker.run("wait", row["checkpoint"], "--timeout", "100ms").code == 6
        assert onlooker.run("path", row["checkpoint"]).code == 3


def test_a_torn_file_that_is_written_again_is_taken_then(onlooker: Onlooker, writer: Writer, root: Path) -> None:
    """What had been given up for incomplete is looked at again because it changed, not because a long pause ended."""
    path = root / "again_1.pt"
    writer.make(name="again", form="torch", seed=22)
    writer.open(path=path)
    writer.write(name="again", path=path, part=0, of=2)
    writer.close(path=path)
    onlooker.wait_looks(path, more=4)  # by now it is asked about every few seconds only
    writer.put(name="again", path=path)
    check_done(onlooker, path)


@pytest.mark.parametrize("when", ["before it is found", "while it is written", "after it is verified"])
def test_a_file_that_is_submitted_and_watched_is_one_row(
    onlooker: Onlooker, writer: Writer, root: Path, when: str
) -> None:
    """M209: the writer's word adds what it knows; it makes no second checkpoint."""
    path = root / "both_3.pt"
    writer.make(name="both", form="torch", seed=30)
    told = ("-m", "val_loss=0.5", "--note", "told", "--json")
    if when == "before it is found":
        writer.put(name="both", path=path)
        answer = onlooker.run("submit", str(path), *told)
    elif when == "while it is written":
        writer.open(path=path)
        writer.write(name="both", path=path, part=0, of=2)
        onlooker.wait_looks(path)
        answer = onlooker.run("submit", str(path), *told)
        assert answer.code == 0, answer.err
        onlooker.wait_looks(path)  # told or not: it is open and torn
        writer.write(name="both", path=path, part=1, of=2)
        writer.close(path=path)
    else:
        writer.put(name="both", path=path)
        check_done(onlooker, path)
        answer = onlooker.run("submit", str(path), *told)
    assert answer.code == 0, answer.err
    row = check_done(onlooker, path)
    onlooker.wait_scans(root)
    assert [other["checkpoint"] for other in onlooker.at(path)] == [row["checkpoint"]] == [answer.json["checkpoint"]]
    assert eventually(lambda: onlooker.row(row["checkpoint"])["metrics"] == {"val_loss": 0.5}, "its metrics")  # type: ignore[index]


def test_a_changed_mode_is_no_new_checkpoint(onlooker: Onlooker, writer: Writer, root: Path) -> None:
    path = root / "mode_1.pt"
    writer.torch_save(path=path, seed=31)
    row = check_done(onlooker, path)
    path.chmod(0o600)
    onlooker.wait_scans(root)
    assert [other["checkpoint"] for other in onlooker.at(path)] == [row["checkpoint"]]
    assert onlooker.run("verify", row["checkpoint"]).code == 0
    assert hashlib.sha256(path.read_bytes()).hexdigest() == onlooker.digests(row["checkpoint"])[""]
