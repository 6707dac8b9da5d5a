"""Unit quaternions in checkpoints, in metrics and in a training loop's batches. M059"""

import math
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptd.hooks.builtin.arithmetic import PLAIN
from ckptd.hooks.builtin.checks import QuaternionValidation
from ckptd.hooks.builtin.quaternions import of_metrics
from ckptd.hooks.context import Context
from ckptd.hooks.result import Level
from ckptd_client import quaternions
from ckptd_client.quaternions import check, of_norms

NUMBERS = st.floats(-1e6, 1e6)
ROWS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=12)


@pytest.fixture(params=["numpy", "standard library"])
def by(request, monkeypatch):
    if request.param != "numpy":
        monkeypatch.setattr("ckptd.hooks.builtin.checks.arithmetic", lambda: PLAIN)


def units(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(7)
    return torch.nn.functional.normalize(torch.randn(*shape, 4), dim=-1).to(dtype)


def told(path, metrics=None) -> Context:
    data = {"path": str(path) if path else "", "metrics": metrics or {}}
    return Context("checkpoint.verified", "k", datetime(2026, 11, 20, tzinfo=UTC), "e" * 32, "c" * 32, data)


def saved(tmp_path, **tensors: torch.Tensor) -> Context:
    save_file(tensors, tmp_path / "poses.safetensors")
    return told(tmp_path / "poses.safetensors")


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_normalised_quaternions_of_every_precision_are_unit(tmp_path, dtype):
    (found,) = QuaternionValidation().execute(saved(tmp_path, rig_quaternions=units(500, dtype=dtype)))
    assert (found.level, found.text) == (Level.INFO, "500 unit quaternions in 1")


@pytest.mark.usefixtures("by")
def test_each_one_that_is_not_is_counted_in_the_finding(tmp_path):
    bad = units(10, 50)
    bad[3, 7] *= 1.5
    bad[4, 8] = 0.0
    bad[5, 9, 2] = float("nan")
    context = saved(tmp_path, **{"a.quat": bad, "b.quat": units(20), "weight": torch.randn(5, 4)})
    (found,) = QuaternionValidation().execute(context)
    assert found.level is Level.ERROR
    assert found.text.startswith("a.quat: of 500 quaternions 1 with NaN or infinity and 2 not of unit length")
    assert found.facts["checked"].keys() == {"a.quat", "b.quat"}
    counts = found.facts["checked"]["a.quat"]
    assert (counts["total"], counts["nan"], counts["nonunit"], counts["near_zero"]) == (500, 1, 2, 1)
    assert math.isclose(counts["norm_max"], 1.5, rel_tol=1e-6)


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("offset", [0, 3])
def test_of_a_pose_only_the_quaternion_is_looked_at(tmp_path, offset):
    parts = (units(40), torch.randn(40, 3) * 9)
    poses = torch.cat(parts if offset == 0 else parts[::-1], dim=-1)
    (found,) = QuaternionValidation(pose_offset=offset).execute(saved(tmp_path, camera_poses=poses))
    assert found.text == "40 unit quaternions in 1"
    (other,) = QuaternionValidation(pose_offset=3 - offset).execute(saved(tmp_path, camera_poses=poses))
    assert other.level is Level.WARNING


def test_a_pattern_finds_the_tensors_of_a_persons_own_names(tmp_path):
    context = saved(tmp_path, joints=units(8) * 1.1, elbow_quat=torch.randn(8, 9))
    (found,) = QuaternionValidation(tensors=["joints", "*_quat"]).execute(context)
    assert (found.level, found.facts["skipped"]) == (Level.WARNING, ["elbow_quat"])
    assert QuaternionValidation(tensors=["nothing"]).execute(context) == []
    (looser,) = QuaternionValidation(tensors=["joints"], tolerance=0.2).execute(context)
    assert looser.level is Level.INFO


def test_a_truncated_checkpoint_is_an_error(tmp_path):
    context = saved(tmp_path, quat=units(100))
    path = tmp_path / "poses.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    (found,) = QuaternionValidation().execute(context)
    assert found.level is Level.ERROR
    assert "truncated" in found.text


def test_metrics_that_are_the_parts_of_a_quaternion_are_one():
    good = {"pose.w": 0.5, "pose.x": 0.5, "pose.y": -0.5, "pose.z": 0.5, "loss": 0.1, "head/qw": 1.0}
    assert of_metrics(good).text() == "1 unit quaternions in 1"
    (found,) = QuaternionValidation().execute(told(None, {**good, "pose.z": "NaN"}))
    assert (found.level, found.facts["checked"]["pose"]["nan"]) == (Level.ERROR, 1)
    assert of_metrics({**good, "pose.w": 0.9}).level == "warning"
    assert QuaternionValidation().execute(told(None, {"loss": 1.0, "w": 3.0})) == []


def test_counts_that_training_logged_are_judged():
    """The batch is checked where it is, and the daemon hears of it with the next checkpoint."""
    batch = units(30)
    batch[2] = 0.0
    metrics = check(batch).metrics("poses")
    (found,) = QuaternionValidation().execute(told(None, metrics))
    assert found.level is Level.WARNING
    assert found.text.startswith("poses: of 30 quaternions 1 not of unit length")


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_lists_arrays_and_tensors_are_judged_alike(rows):
    expected = check([list(row) for row in rows])
    for batch in (
        np.array(rows, dtype=np.float64).reshape(-1, 4),
        torch.tensor(rows, dtype=torch.float64, requires_grad=True).reshape(-1, 4),
    ):
        found = check(batch)
        assert found[:2] == expected[:2]
        assert found.nonunit == expected.nonunit
        assert math.isclose(found.norm_max, expected.norm_max, rel_tol=1e-9, abs_tol=1e-150)
    assert expected.total == len(rows)
    assert expected.nonunit == sum(abs(math.hypot(*row) - 1) > quaternions.TOLERANCE for row in rows)


NORMS = st.lists(st.floats(min_value=0) | st.just(math.nan))


@given(NORMS, NORMS)
def test_two_batches_together_are_what_one_would_be(one, other):
    """However large the numbers are."""
    added, whole = of_norms(one).plus(of_norms(other)), of_norms(one + other)
    assert added[:6] == whole[:6]
    assert math.isclose(added.norm_mean, whole.norm_mean, rel_tol=1e-9, abs_tol=1e-300)
    assert math.isfinite(added.norm_mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_tolerance_of_a_batch_follows_its_precision(dtype):
    assert check(units(1000, dtype=dtype)).ok
    assert not check(units(1000, dtype=dtype) * 1.2).ok


@pytest.mark.parametrize("batch", [torch.ones(4, 3), np.ones(()), [[1.0, 0.0, 0.0]], "1000", [["w"]]])
def test_what_is_no_batch_of_quaternions_is_an_error_that_says_so(batch):
    with pytest.raises(ValueError, match=r"quaternion|dimension"):
        check(batch)
