"""The settings' model: units, bounds, and limits that are checked together."""

import doctest

import pytest
from pydantic import ValidationError

from ckptd import config
from ckptd.bestrule import BestRule
from ckptd.config import Settings
from ckptd.rules import Rules
from ckptd.section import parse_size, parse_span


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(config).failed == 0


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("512", 512),
        ("1K", 1024),
        ("64M", 64 << 20),
        ("1.5G", 3 << 29),
        ("2 TiB", 2 << 40),
        ("10gb", 10 << 30),
    ],
)
def test_sizes_are_read_as_powers_of_1024(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "G", "-1G", "1X", "1 G x", "1e3", "NaN"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "span_s"),
    [("50ms", 0.05), ("30s", 30), ("1h30m", 5400), ("7d12h", 648000), ("1w", 604800), ("1.5h", 5400)],
)
def test_durations_are_read_in_seconds(text, span_s):
    assert parse_span(text) == pytest.approx(span_s)


@pytest.mark.parametrize("text", ["", "5", "s", "-5s", "5y", "5 s x"])
def test_what_is_no_duration_is_refused(text):
    """A bare number in quotes has no unit: it is refused, not guessed."""
    with pytest.raises(ValueError, match="is no duration"):
        parse_span(text)


def test_numbers_pass_as_bytes_and_seconds():
    settings = Settings.model_validate({"drain_s": 5, "arenas": {"bytes_max": 4096}})
    assert (settings.drain_s, settings.arenas.bytes_max) == (5.0, 4096)


def test_the_defaults_agree_with_one_another():
    assert Settings().arenas.bytes_max > 0


def test_settings_can_not_be_changed_in_passing():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().drain_s = 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"jobs": {"lease_s": "1m"}}, "twice workers.request_s"),
        ({"orphan_age_s": "1m"}, "orphan_age_s must not be below jobs.lease_s"),
        ({"jobs": {"backoff_s": 500}}, "backoff_s_max must not be below"),
        ({"intake": {"connections_max": 100}}, "must not exceed intake.connections_max"),
        ({"arenas": {"per_experiment_max": 0}}, "greater than or equal to 1"),
        ({"workers": {"request_s": 0}}, "greater than 0"),
        ({"nonsense": 1}, "Extra inputs"),
        ({"roots": [{"path": "here"}]}, "must be absolute"),
        ({"roots": [{"path": "/a/../b"}]}, "without '..'"),
        ({"retention": {"keep_best": {"metric": "loss"}}}, "mode of 'loss' is missing"),
    ],
)
def test_values_that_can_not_hold_together_are_refused(wrong, message):
    """Limits that depend on one another are checked, not commented on."""
    with pytest.raises(ValidationError, match=message):
        Settings.model_validate(wrong)


def test_one_best_rule_may_be_written_without_a_list():
    rules = Rules.model_validate({"keep_best": {"metric": "val_loss", "mode": "min", "k": 3}})
    assert rules.keep_best == (BestRule(metric="val_loss", mode="min", k=3),)


def test_a_metrics_direction_is_never_guessed():
    with pytest.raises(ValidationError):
        BestRule.model_validate({"metric": "val_loss"})


@pytest.mark.parametrize(
    ("rules", "deletes"),
    [({}, False), ({"trash_grace_s": 0}, False), ({"keep_last": 1}, True), ({"keep_every": 10}, True)],
)
def test_without_any_rule_nothing_is_ever_deleted(rules, deletes):
    assert Rules.model_validate(rules).deletes is deletes
