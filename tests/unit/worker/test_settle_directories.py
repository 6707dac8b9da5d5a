"""The verb settle on directories, as their writers make them file by file."""

import json
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.usefixtures("sigio_ignored", "nothing_remembered")

QUIET_S = 5.0  # as the asker asks


def trainer_writes(path, puppet):
    """Yield after each step of a Trainer's save, in its order."""
    puppet.do("import json, os, torch; from safetensors.torch import save_file")
    puppet.do(f"os.mkdir({str(path)!r}); os.chdir({str(path)!r})")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    yield
    for index, shard in enumerate(shards):
        puppet.do(f"save_file({{'{index}': torch.ones(9)}}, {shard!r})")
        yield
    index = json.dumps({"weight_map": dict(enumerate(shards))})
    puppet.do(f"f = open('model.safetensors.index.json', 'w'); f.write({index[:20]!r}); f.flush()")
    yield
    puppet.do(f"f.write({index[20:]!r}); f.close()")
    puppet.do("torch.save({'lr': 1}, 'training_args.bin')")
    yield
    puppet.do("f = open('optimizer.pt', 'wb'); torch.save({'m': torch.ones(100)}, f)")
    yield
    puppet.do("f.close()")
    yield
    puppet.do("f = open('trainer_state.json', 'w'); f.write('{\"global_step\": 500'); f.flush()")
    yield
    puppet.do("f.close()")
    yield
    puppet.do("f = open('trainer_state.json', 'w'); f.write('{\"global_step\": 500}'); f.close()")


def test_a_trainers_directory_is_settled_only_after_its_last_file_and_quiet(tmp_path, puppet, asker_of):
    """Other ranks may still write when trainer_state.json is there, so quiet is asked for as well."""
    path = tmp_path / "checkpoint-500"
    asker = asker_of(path)
    for step, _ in enumerate(trainer_writes(path, puppet)):
        asker.ask()
        found = asker.ask(still_s=QUIET_S if step < 2 or step > 3 else 1.0)
        assert not found.settled, (step, found)
    assert not asker.ask(0.0).settled
    puppet.do("torch.save({'r': 1}, 'rng_state_1.pth')")
    assert asker.ask(still_s=1000.0).reason == "changing"
    found = asker.ask(still_s=QUIET_S)
    assert (found.settled, found.reason, found.format, found.step) == (True, "structure", "hf-trainer", 500)
    assert found.identity.size_bytes == sum(file.stat().st_size for file in path.iterdir())


def test_a_sharded_directory_with_one_open_shard_is_not_settled(tmp_path, puppet, asker_of):
    for _ in trainer_writes(tmp_path / "checkpoint-5", puppet):
        pass
    asker = asker_of(tmp_path / "checkpoint-5")
    asker.ask()
    assert asker.ask(QUIET_S).settled
    puppet.do("f = open('model-00002-of-00002.safetensors', 'r+b')")
    assert asker.ask(1000.0).reason == "writer"


def test_a_dcp_directory_is_settled_by_its_last_file(tmp_path, puppet, asker_of):
    """.metadata names all data, so no quiet is needed; a save into the old directory is seen at once."""
    import torch.distributed.checkpoint as dcp

    path = tmp_path / "step-3"

    def save():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"w": torch.zeros(40, 3)}, checkpoint_id=str(path), no_dist=True)

    save()
    asker = asker_of(path)
    found = asker.ask()
    assert (found.settled, found.reason, found.format, found.step) == (True, "structure", "dcp", 3)
    data = path / "__0_0.distcp"
    puppet.do(f"f = open({str(data)!r}, 'wb')")
    assert asker.ask(1000.0).reason == "writer"
    raw = b"\0" * found.identity.size_bytes
    puppet.do(f"f.write({raw!r}); f.close()")
    assert asker.ask(1000.0).reason.startswith("incomplete: stale")
    save()
    assert asker.ask().settled


def test_the_end_mark_of_an_orbax_directory_settles_it(tmp_path, asker_of):
    path = tmp_path / "checkpoint_7"
    (path / "default").mkdir(parents=True)
    (path / "default" / "data").write_bytes(b"x")
    asker = asker_of(path)
    assert asker.ask().reason == "young"
    (path / "commit_success.txt").touch()
    assert asker.ask().reason == "marker"
