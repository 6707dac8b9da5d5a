"""What names tell: steps, epochs, unfinished, and which directories are one checkpoint."""

import pytest

from ckptd.worker import formats
from ckptd.worker.formats import names


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("checkpoint_7", 7),
        ("step_0001", 1),
        ("step_0000000100_r2", 100),
        ("step-30_ckpt", 30),
        ("iter_0000500", 500),
        ("global_step500", 500),
        ("epoch=2-step=10.ckpt", 10),
        ("epoch=2-step=10-v1.ckpt", 10),
        ("epoch=1-step=9-val_loss=0.25.ckpt", 9),
        ("model_12.pt", 12),
        ("model.step100.pt", 100),
        ("ep4-ba500-rank0.pt", 500),
        ("500.pt", 500),
        ("epoch_3.pt", None),
        ("last.ckpt", None),
        ("model-00001-of-00003.safetensors", None),
        ("run_2024-01-15.pt", None),
        ("best_0.25.pt", None),
        ("resnet50.pt", None),
        ("footstep3.pt", None),
        ("model_" + "9" * 19 + ".pt", None),
    ],
)
def test_a_step_is_read_from_a_name(name, step):
    """Epochs, shards, dates and numbers beyond 64 bits are no steps."""
    assert names.step_of(name) == step


def test_an_epoch_is_read_from_a_name():
    assert [names.epoch_of(name) for name in ("epoch=2-step=10.ckpt", "ep4-ba5.pt", "model.pt")] == [2.0, 4.0, None]


@pytest.mark.parametrize(
    "name",
    [
        ".hidden.pt",
        "model.pt.tmp",
        "model.safetensors.part",
        "5.orbax-checkpoint-tmp",
        "5.orbax-checkpoint-tmp-1700000000",
        "step-5_unfinished",
        "tmp-checkpoint-500",
        "model.pt.tmp-1234",
        "foo-unfinished",
        "model.incomplete",
        ".ckptd-trash",
        "model.pt~",
    ],
)
def test_a_name_can_say_that_its_writer_is_not_done(name):
    assert names.is_unfinished(name)


@pytest.mark.parametrize("name", ["model.pt", "template.pt", "tmpfs_model.pt", "checkpoint-500", "particle.h5"])
def test_ordinary_names_are_not_unfinished(name):
    assert not names.is_unfinished(name)


def test_a_marker_is_looked_for_under_every_name_that_its_tool_gives_it():
    """NeMo leaves off .ckpt, .nemo and -EMA."""
    assert set(names.markers_of("a-EMA.ckpt")) == {"a-EMA.ckpt-unfinished", "a-EMA-unfinished", "a-unfinished"}


@pytest.mark.parametrize(
    ("name", "files", "directories", "found"),
    [
        ("checkpoint-500", ["trainer_state.json", "model.safetensors"], [], "hf-trainer"),
        ("checkpoint-500", ["trainer_state.json"], ["global_step500"], "hf-trainer"),
        ("out", ["trainer_state.json", "model.safetensors"], ["checkpoint-500"], None),
        ("checkpoint-500", ["model.safetensors"], [], "opaque"),
        ("anything", ["__0_0.distcp"], [], "dcp"),
        ("final", ["model.safetensors.index.json"], [], "safetensors-sharded"),
        ("final", ["model-00001-of-00002.safetensors"], [], "safetensors-sharded"),
        ("final", ["model.safetensors"], [], None),
        ("iter_0000500", [], ["mp_rank_00"], "opaque"),
        ("500", ["_CHECKPOINT_METADATA"], ["default"], "opaque"),
        ("500", ["model.pt"], [], None),
        ("epoch=1-step=9.ckpt", ["model.pt"], [], "opaque"),
        ("last.ckpt", ["model.pt"], [], "opaque"),
        ("export", ["saved_model.pb"], ["variables"], "opaque"),
        ("step_0000000100", ["manifest.json"], [], "ckptd"),
        ("checkpoints", ["a.pt", "b.pt"], [], None),
        ("exp_step_2_lr", ["a.pt"], [], None),
        ("epoch_1", [], ["step_10", "step_20"], None),
    ],
)
def test_a_directory_is_one_checkpoint_or_a_place_for_them(name, files, directories, found):
    """M006. A Trainer's output directory has its own trainer_state.json and is still a place."""
    assert formats.detect_directory(name, files, directories) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("m.safetensors", "safetensors"),
        ("m.PT", "torch-zip"),
        ("epoch=1.ckpt", "torch-zip"),
        ("m.npz", "opaque"),
        ("m.keras", "opaque"),
        ("m.h5", "opaque"),
        ("m.msgpack", "opaque"),
        ("checkpoint_100", "opaque"),
        ("notes.txt", None),
        ("config.json", None),
        (".m.pt", None),
        ("Makefile", None),
    ],
)
def test_a_file_is_a_checkpoint_by_its_suffix(name, found):
    assert formats.detect_file(name) == found
