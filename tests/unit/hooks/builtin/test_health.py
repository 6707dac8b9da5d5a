"""Numeric health on real files: what is wrong is found, and what belongs to the model is not called wrong."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckptd.hooks.builtin import arithmetic as arithmetics
from ckptd.hooks.builtin.arithmetic import PLAIN
from ckptd.hooks.builtin.checks import NumericHealth
from ckptd.hooks.builtin.neighbour import path_before
from ckptd.hooks.context import Context
from ckptd.hooks.result import Level


@pytest.fixture(params=["numpy", "standard library"], autouse=True)
def by(request, monkeypatch):
    """With numpy, and on a machine that has none."""
    if request.param != "numpy":
        monkeypatch.setattr("ckptd.hooks.builtin.checks.arithmetic", lambda: PLAIN)
    return request.param


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 4))


def save(directory: Path, step: int, model: torch.nn.Module, **more: torch.Tensor) -> Context:
    """Write what a trainer would have written, and make the event that tells of it."""
    path = directory / f"model_step_{step}.safetensors"
    save_file({name: tensor.clone() for name, tensor in (model.state_dict() | more).items()}, path)
    return told(path, step)


def told(path: Path, step: int | None, checkpoint: str = "") -> Context:
    now = datetime(2026, 11, 20, tzinfo=UTC)
    data = {"path": str(path), "step": step, "project": "p", "name": "n"}
    return Context("checkpoint.verified", f"k{step}", now, "e" * 32, checkpoint or f"{step or 0:032x}", data)


def kinds(finding) -> dict[str, int]:
    return {kind: count for kind, count in finding.facts["problems"].items() if count}


def test_a_sound_model_is_said_to_be_sound(tmp_path, model, by):
    found = NumericHealth().execute(save(tmp_path, 1, model))
    assert found.level is Level.INFO
    assert found.text.startswith("numbers are sound (8 tensors") or found.text.startswith(
        "numbers are sound (6 tensors"
    )
    assert found.facts["computed_by"] == by


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("bad", "kind"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "inf")])
def test_one_bad_number_among_thousands_is_found_and_named(tmp_path, model, dtype, bad, kind):
    broken = torch.randn(300, 20).to(dtype)
    broken[217, 11] = bad
    found = NumericHealth().execute(save(tmp_path, 1, model, broken=broken))
    assert found.level is Level.ERROR
    assert kinds(found)[kind] == 1
    (named,) = [one for one in found.facts["named"] if one["kind"] == kind]
    assert named["tensor"] == "broken"
    assert named["text"].startswith("1 of 6000 are ")
    assert "broken" in found.text


def test_a_tensor_that_died_is_a_warning_and_one_that_never_lived_is_not(tmp_path, model):
    """Biases and adapters begin with zeros."""
    hook = NumericHealth()
    assert hook.execute(save(tmp_path, 1, model, adapter=torch.zeros(8, 8))).level is Level.INFO
    with torch.no_grad():
        model[0].weight.zero_()
    found = hook.execute(save(tmp_path, 2, model, adapter=torch.zeros(8, 8)))
    assert found.level is Level.WARNING
    assert {(one["tensor"], one["steady"]) for one in found.facts["named"] if one["kind"] == "dead"} >= {
        ("0.weight", False),
        ("adapter", True),
    }


def test_exploding_numbers_are_a_warning(tmp_path, model):
    found = NumericHealth().execute(save(tmp_path, 1, model, big=torch.full((40,), 3e7)))
    assert (found.level, kinds(found)["exploding"]) == (Level.WARNING, 1)


def test_half_precision_explodes_before_it_overflows(tmp_path, model):
    found = NumericHealth().execute(save(tmp_path, 1, model, big=torch.full((40,), 40000.0, dtype=torch.float16)))
    assert kinds(found)["exploding"] == 1


def test_a_mask_that_was_always_infinite_is_no_alarm(tmp_path, model):
    """Attention masks hold infinities, or the largest number there is, by design."""
    mask = torch.full((6, 6), float("-inf")).triu(1)
    lowest = torch.full((6, 6), torch.finfo(torch.float32).min)
    hook = NumericHealth()
    hook.execute(save(tmp_path, 1, model, mask=mask, lowest=lowest))
    found = hook.execute(save(tmp_path, 2, model, mask=mask, lowest=lowest))
    assert found.level is Level.INFO
    assert kinds(found)["inf"] == 1  # still counted
    assert found.text.startswith("as in step 1: 1 inf, 1 exploding: mask: 15 of 36 are infinite (")


def test_nan_that_stays_is_never_called_sound(tmp_path, model):
    """It is no news, so it is no error again; but nothing is made of NaN."""
    hook, bad = NumericHealth(), torch.full((20,), float("nan"))
    assert hook.execute(save(tmp_path, 1, model, bad=bad)).level is Level.ERROR
    found = hook.execute(save(tmp_path, 2, model, bad=bad))
    assert found.level is Level.WARNING
    assert found.text.startswith("as in step 1: 1 nan: bad: 20 of 20 are NaN (")


def test_a_sudden_change_of_norm_is_found_against_the_checkpoint_before(tmp_path, model):
    hook = NumericHealth(norm_factor=5)
    hook.execute(save(tmp_path, 1, model))
    with torch.no_grad():
        model[2].weight.mul_(6)
    found = hook.execute(save(tmp_path, 2, model))
    assert (found.level, kinds(found)["norm"], found.facts["previous_step"]) == (Level.WARNING, 1, 1)
    assert "2.weight: norm went from" in found.text


def test_the_checkpoint_before_is_read_from_its_file_after_a_restart(tmp_path, model):
    for step in (5, 10):
        save(tmp_path, step, model)
    with torch.no_grad():
        model[2].weight.mul_(1 / 60)
    context = save(tmp_path, 20, model)
    save(tmp_path, 30, model)  # a later one is not the one before
    found = NumericHealth().execute(context)
    assert kinds(found)["norm"] == 1
    assert [one["tensor"] for one in found.facts["named"] if one["kind"] == "norm"] == ["2.weight"]


def test_a_checkpoint_is_never_compared_with_itself(tmp_path, model):
    """A second delivery of the same event; also of one that no step tells from the one before."""
    context = save(tmp_path, 1, model, mask=torch.full((9,), float("inf")))
    os.rename(context.data["path"], tmp_path / "weights.safetensors")
    for again in (told(tmp_path / "weights.safetensors", 1), told(tmp_path / "weights.safetensors", None)):
        hook = NumericHealth()
        assert hook.execute(again).level is Level.ERROR
        assert hook.execute(again).level is Level.ERROR  # steady only against another checkpoint


def test_moments_of_an_optimizer_may_jump_and_its_counters_may_be_large(tmp_path, model):
    hook = NumericHealth()
    hook.execute(save(tmp_path, 1, model, **{"state.0.exp_avg": torch.ones(20), "state.0.step": torch.tensor(1.0)}))
    more = {"state.0.exp_avg": torch.ones(20) * 1e4, "state.0.step": torch.tensor(5e6)}
    assert hook.execute(save(tmp_path, 2, model, **more)).level is Level.INFO


def test_what_a_person_ignores_is_not_judged(tmp_path, model):
    context = save(tmp_path, 1, model, **{"ema.mask": torch.full((20,), float("nan"))})
    assert NumericHealth(ignore=["ema.*"]).execute(context).level is Level.INFO


def test_a_truncated_file_is_an_error_and_a_vanished_one_is_nothing(tmp_path, model):
    context = save(tmp_path, 1, model)
    path = Path(context.data["path"])
    path.write_bytes(path.read_bytes()[:-10])
    found = NumericHealth().execute(context)
    assert found.level is Level.ERROR
    assert "truncated" in found.text
    path.unlink()
    assert NumericHealth().execute(context) is None


def test_a_damaged_checkpoint_before_is_no_obstacle(tmp_path, model):
    (tmp_path / "model_step_1.safetensors").write_bytes(b"\x00" * 100)
    found = NumericHealth().execute(save(tmp_path, 2, model))
    assert (found.level, found.facts["previous_step"]) == (Level.INFO, None)


def test_a_sample_is_said_to_be_one(tmp_path, model):
    found = NumericHealth(bytes_max="256K").execute(save(tmp_path, 1, model, w=torch.ones(1 << 20)))
    assert found.facts["share"] < 0.2
    assert "a sample of" in found.text


def test_a_file_without_tensors_is_said_to_have_none(tmp_path):
    path = tmp_path / "step_1.npz"
    path.write_bytes(b"PK\x03\x04")
    found = NumericHealth().execute(told(path, 1))
    assert found.level is Level.INFO
    assert "no floating-point tensors" in found.text


@pytest.mark.parametrize("options", [{"norm_factor": 1}, {"exploding": 0}, {"bytes_max": "much"}])
def test_limits_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError):
        NumericHealth(**options)
    with pytest.raises(TypeError):
        NumericHealth(no_such_limit=1)


def test_a_neighbour_is_named_alike_and_no_link(tmp_path):
    for name in ("model_1.pt", "model_2.pt", "optimizer_3.pt", "model_5.pt"):
        (tmp_path / name).touch()
    (tmp_path / "model_4.pt").symlink_to("model_1.pt")
    assert path_before(str(tmp_path / "model_5.pt")) == str(tmp_path / "model_2.pt")
    assert path_before(str(tmp_path / "model_1.pt")) is None


def test_without_numpy_the_standard_library_computes(monkeypatch):
    monkeypatch.setattr(arithmetics, "find_spec", lambda name: None)
    assert arithmetics.arithmetic() is PLAIN
