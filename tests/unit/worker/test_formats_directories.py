"""Directory checkpoints as their real writers leave them, and half written, stale or lying ones."""

import json
import math
import os
import pickle
import warnings

import pytest

from ckptd.errors import InvalidFormat
from ckptd.worker.formats import ckptd_dir

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file


def dcp_save(path, state):
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves in a single process is what is meant
        dcp.save(state, checkpoint_id=str(path), no_dist=True)
    return path


@pytest.fixture
def dcp(tmp_path):
    state = {"w": torch.zeros(4, 3), "o": {"m": torch.ones(5, dtype=torch.bfloat16)}, "step": 3}
    return dcp_save(tmp_path / "step-3", state)


@pytest.fixture
def trainer(tmp_path):
    """A Trainer's directory in the order in which transformers writes it, weights in two shards."""
    path = tmp_path / "checkpoint-500"
    path.mkdir()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, shard in shards.items():
        save_file({name: torch.ones(4)}, path / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 32}, "weight_map": shards}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    torch.save({"lr": 0.1}, path / "training_args.bin")
    torch.save({"state": {0: {"m": torch.ones(3)}}}, path / "optimizer.pt")
    history = [
        {"loss": 2.5, "grad_norm": math.nan, "epoch": 0.5, "step": 250},
        {"loss": 1.5, "grad_norm": 3, "epoch": 1.0, "step": 500},
        {"eval_loss": 1.25, "epoch": 1.0, "step": 500},
    ]
    state = {
        "global_step": 500,
        "epoch": 1.0,
        "best_metric": 1.25,
        "best_model_checkpoint": "x",
        "log_history": history,
    }
    (path / "trainer_state.json").write_text(json.dumps(state))
    torch.save({"cpu": torch.ones(2)}, path / "rng_state_0.pth")
    return path


def test_a_real_dcp_directory_is_whole_and_its_tensors_are_listed(dcp, look):
    found = look(dcp)
    assert (found.format, found.complete, found.problem) == ("dcp", True, "")
    assert {t.name: (t.dtype, t.shape, t.file) for t in found.tensors} == {
        "w": ("F32", [4, 3], "__0_0.distcp"),
        "o.m": ("BF16", [5], "__0_0.distcp"),
    }


@pytest.mark.parametrize("missing", [".metadata", "__0_0.distcp"])
def test_a_dcp_directory_without_one_of_its_files_is_not_whole(dcp, look, missing):
    (dcp / missing).unlink()
    assert look(dcp).problem.startswith("missing: ")


def test_dcp_data_newer_than_its_metadata_is_stale(dcp, look):
    """A save into an old directory: the old .metadata fits the new files in every size."""
    os.utime(dcp / "__0_0.distcp", ns=(0, (dcp / ".metadata").stat().st_mtime_ns + 1))
    assert look(dcp).problem.startswith("stale: ")


def test_dcp_metadata_on_its_way_is_told(dcp, look):
    (dcp / ".metadata.tmp").write_bytes(b"x")
    assert look(dcp).problem.startswith("stale: ")


def test_dcp_data_cut_short_is_told(dcp, look):
    """Even when its time says that it is older than .metadata."""
    data = dcp / "__0_0.distcp"
    os.truncate(data, data.stat().st_size - 1)
    os.utime(data, ns=(0, 0))
    assert look(dcp).problem.startswith("truncated: '__0_0.distcp'")


def test_dcp_metadata_cut_at_any_byte_is_never_whole(dcp, look):
    metadata = dcp / ".metadata"
    whole = metadata.read_bytes()
    for length in range(0, len(whole), 7):
        metadata.write_bytes(whole[:length])
        assert look(dcp).complete is not True, length


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_dcp_metadata_that_would_run_code_runs_none(dcp, look, tmp_path):
    """S17."""
    metadata, canary = dcp / ".metadata", tmp_path / "canary"
    metadata.write_bytes(pickle.dumps(Bomb(canary)))
    assert look(dcp).complete is None
    assert not canary.exists()
    pickle.loads(metadata.read_bytes())
    assert canary.exists()  # the bomb was a real one


@pytest.mark.parametrize("place", [("../evil", 0, 1), ("__0_0.distcp", -1, 1), ("__0_0.distcp", 0, 1 << 70)])
def test_dcp_metadata_that_names_impossible_places_is_not_whole(tmp_path, look, place):
    """It is real metadata, of torch's own classes, with one place replaced."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    path = tmp_path / "step-1"
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"x" * 100)
    storage = {MetadataIndex("w"): _StorageInfo(*place)}
    (path / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data=storage)))
    assert look(path).complete is not True


def test_a_trainers_directory_gives_step_epoch_and_last_metrics(trainer, look):
    """NaN has no place in an answer; the last finite value of each name counts."""
    found = look(trainer)
    assert (found.format, found.complete, found.problem) == ("hf-trainer", True, "")
    assert (found.step, found.epoch) == (500, 1.0)
    assert found.metrics == {"loss": 1.5, "grad_norm": 3.0, "eval_loss": 1.25}
    assert (found.extra["best_metric"], found.extra["best_model_checkpoint"]) == (1.25, "x")
    assert {tensor.name for tensor in found.tensors} >= {"a", "b", "state.0.m"}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("trainer_state.json", "missing"),
        ("model-00002-of-00002.safetensors", "missing"),
    ],
)
def test_a_trainers_directory_without_a_needed_file_is_not_whole(trainer, look, name, code):
    (trainer / name).unlink()
    found = look(trainer)
    assert (found.complete, found.problem.split(":")[0]) == (False, code)


@pytest.mark.parametrize(
    "name",
    [
        "trainer_state.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "optimizer.pt",
        "rng_state_0.pth",
    ],
)
def test_a_trainers_directory_with_a_cut_file_is_not_whole(trainer, look, name):
    """No torn file hides in a directory, weights or not."""
    file = trainer / name
    os.truncate(file, file.stat().st_size - 2)
    found = look(trainer)
    assert (found.complete, found.problem.split(":")[0]) == (False, "truncated")
    assert name in found.problem


def test_a_trainers_file_with_a_wrong_checksum_is_named(trainer, look):
    file = trainer / "optimizer.pt"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    assert look(trainer).complete is False
    assert "optimizer.pt" in look(trainer).problem


def test_sharded_weights_are_whole_when_every_shard_is(trainer, look):
    (trainer / "trainer_state.json").unlink()
    weights = trainer.rename(trainer.parent / "final")
    found = look(weights)
    assert (found.format, found.complete) == ("safetensors-sharded", True)
    os.truncate(weights / "model-00002-of-00002.safetensors", 20)
    assert look(weights).problem.startswith("truncated: ")


def test_shards_without_their_index_are_not_whole_yet(trainer, look):
    """transformers writes the index after the shards."""
    (trainer / "trainer_state.json").unlink()
    (trainer / "model.safetensors.index.json").unlink()
    found = look(trainer.rename(trainer.parent / "final"))
    assert (found.format, found.complete, found.problem) == ("safetensors-sharded", False, "missing: no index yet")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "", "..", 7])
def test_an_index_that_leads_outside_is_refused(trainer, look, shard):
    index = {"weight_map": {"a": shard}}
    (trainer / "model.safetensors.index.json").write_text(json.dumps(index))
    assert look(trainer).problem.startswith("invalid_format: ")


def ours(path):
    path.mkdir()
    save_file({"w": torch.ones(4)}, path / "model.safetensors")
    (path / "state.json").write_text("{}")
    files = [
        {"path": name, "size_bytes": (path / name).stat().st_size, "sha256": "0" * 64}
        for name in ("model.safetensors", "state.json")
    ]
    manifest = {"v": 1, "checkpoint": "ab" * 16, "step": 12, "epoch": 2, "metrics": {"loss": 0.5, "bad": "NaN"}}
    (path / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
    return path


def test_our_own_directory_is_read_by_its_manifest(tmp_path, look):
    found = look(ours(tmp_path / "step_0000000012"))
    assert (found.format, found.complete, found.step, found.epoch) == ("ckptd", True, 12, 2.0)
    assert (found.metrics, found.extra["checkpoint"]) == ({"loss": 0.5}, "ab" * 16)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_our_own_directory_with_a_missing_or_cut_file_is_not_whole(tmp_path, look, name):
    path = ours(tmp_path / "step_0000000012")
    os.truncate(path / name, 1)
    assert look(path).problem.startswith(f"truncated: {name!r}")
    (path / name).unlink()
    assert look(path).problem.startswith(f"missing: {name!r}")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"v":1,"checkpoint":"' + b"ab" * 16 + b'","files":[],"config":' + b"[" * 30 + b"]" * 30 + b"}",
        b'{"v":2,"checkpoint":"' + b"ab" * 16 + b'","files":[]}',
        b'{"v":1,"checkpoint":"../../etc","files":[]}',
        b'{"v":1,"checkpoint":"' + b"ab" * 16 + b'","files":[{"path":7}]}',
        b'{"v":1,"checkpoint":"' + b"ab" * 16 + b'","files":[' + b"[]," * 400_000 + b"[]]}",
        b'{"v":1,"checkpoint":"' + b"cd" * 16 + b'","checkpoint":"' + b"ab" * 16 + b'","files":[]}',
        b'{"v":1,"checkpoint":"' + b"ab" * 16 + b'","files":[],"config":{"lr":1,"\\u006cr":2}}',
    ],
)
def test_a_manifest_that_is_none_is_refused(raw):
    """S2: wrong type, version or id, a key twice, too deep, too many: in bounded memory and with one kind of error."""
    with pytest.raises(InvalidFormat):
        ckptd_dir.parse_manifest(raw)


def test_a_directory_of_an_unknown_kind_is_neither_whole_nor_torn(tmp_path, look):
    """M006: many files, one checkpoint."""
    path = tmp_path / "iter_0000500"
    (path / "mp_rank_00").mkdir(parents=True)
    torch.save({"iteration": 500, "w": torch.ones(2)}, path / "mp_rank_00" / "model_optim_rng.pt")
    found = look(path)
    assert (found.format, found.complete, found.step, found.tensors_total) == ("opaque", None, 500, 1)
    os.truncate(path / "mp_rank_00" / "model_optim_rng.pt", 50)
    assert look(path).complete is False


def test_an_orbax_directory_with_its_commit_file_is_whole(tmp_path, look):
    path = tmp_path / "500"
    (path / "default").mkdir(parents=True)
    (path / "default" / "manifest.ocdbt").write_bytes(b"x")
    (path / "_CHECKPOINT_METADATA").write_text("{}")
    assert look(path).complete is None
    (path / "commit_success.txt").write_text("")
    assert (look(path).complete, look(path).extra) == (True, {"marker": "commit_success.txt"})


def test_an_empty_directory_is_not_whole(tmp_path, look):
    (tmp_path / "step_5").mkdir()
    assert look(tmp_path / "step_5").problem.startswith("missing: ")
