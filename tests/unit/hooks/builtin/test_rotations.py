"""Rotation losses: which are known, what their values may be, and the hook that looks at a checkpoint's. M060"""

import math
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptd.hooks.builtin.notices import RotationLoss
from ckptd.hooks.context import Context
from ckptd.hooks.result import Level
from ckptd_client.rotations import LOSSES, check, known


def told(**metrics: object) -> Context:
    now = datetime(2026, 11, 20, tzinfo=UTC)
    return Context("checkpoint.verified", "k", now, "e" * 32, "c" * 32, {"metrics": metrics})


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("spelled", ["{}", "{}_loss", "val/{}", "train.loss.{}", "rotation_{}", "Loss-{}"])
def test_every_supported_loss_is_known_under_usual_names(name, spelled):
    assert known(spelled.format(name)) == name


@pytest.mark.parametrize("name", ["loss", "val_loss", "rotation", "cross_entropy", "", "geodesic_cross_entropy"])
def test_other_losses_are_not_taken_for_rotations(name):
    assert known(name) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "NaN", "-Infinity", torch.tensor(float("nan"))])
def test_nan_and_infinity_are_errors_with_hints(value):
    verdict = check("geodesic", value)
    assert verdict.level == "error"
    assert any("acos" in hint for hint in verdict.hints)


@given(st.sampled_from(sorted(LOSSES)), st.floats(0, 1))
def test_a_value_within_the_range_of_its_loss_is_fine(name, share):
    assert check(name, LOSSES[name].largest * share).ok


@pytest.mark.parametrize("value", [90.0, -0.5])
def test_a_value_that_no_angle_has_is_a_warning(value):
    assert check("geodesic", value).level == "warning"


@pytest.mark.parametrize("value", [None, "high", [1, 2], torch.ones(3), np.ones(2), object()])
def test_what_is_no_number_never_raises_in_the_loop(value):
    assert check("geodesic", value).level == "error"


def test_the_largest_angle_of_real_rotations_is_in_range():
    torch.manual_seed(7)
    one, other = (torch.linalg.qr(torch.randn(500, 3, 3))[0] for _ in range(2))
    one, other = (matrix * torch.det(matrix)[:, None, None] for matrix in (one, other))
    angle = torch.acos((((one.transpose(1, 2) @ other).diagonal(dim1=1, dim2=2).sum(-1) - 1) / 2).clamp(-1, 1))
    chord = (one - other).flatten(1).norm(dim=1)
    assert check("geodesic", angle.max()).ok
    assert check("chordal", chord.max()).ok
    assert check("chordal", math.pi).level == "warning"


def test_the_hook_finds_a_broken_loss_among_the_metrics():
    found = RotationLoss().execute(told(val_geodesic="NaN", val_loss="NaN", chordal=0.3))
    assert [(one.level, one.facts["metric"], one.facts["loss"]) for one in found] == [
        (Level.ERROR, "val_geodesic", "geodesic")
    ]
    assert found[0].text == "val_geodesic is nan"
    assert found[0].facts["hints"]


def test_a_loss_of_its_own_name_is_judged_when_it_is_named():
    found = RotationLoss(metrics=["my_*"]).execute(told(my_rotations="Infinity", my_other=1e9))
    assert [one.text for one in found] == ["my_rotations is inf"]


def test_an_unknown_loss_is_refused_with_the_supported_ones():
    with pytest.raises(ValueError, match="geodesic, chordal"):
        RotationLoss(loss="hinge")
    assert RotationLoss(loss="rot6d").execute(told()) == []
