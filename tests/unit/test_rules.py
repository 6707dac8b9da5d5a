"""Rules as they are written: our own words, other tools' names, and what makes no sense."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ckptd import origins
from ckptd.errors import BadConfig
from ckptd.rules import Rules

BEST = {"metric": "val_loss", "mode": "min", "k": 1}
NAMED = [
    # Lightning's ModelCheckpoint
    ({"save_top_k": 3, "monitor": "val_loss", "mode": "min"}, {"keep_best": {**BEST, "k": 3}}),
    ({"save_top_k": 2, "monitor": "step", "mode": "max", "save_last": True}, {"keep_last": 2}),
    ({"monitor": "val_loss", "mode": "min"}, {"keep_best": BEST}),
    ({"save_top_k": 1}, {"keep_last": 1}),
    ({"save_top_k": -1}, {"drop": "on_pressure"}),
    ({"save_top_k": -1, "monitor": "val_loss", "mode": "min"}, {"keep_best": BEST, "drop": "on_pressure"}),
    ({"save_top_k": -1, "every_n_train_steps": 500}, {"keep_every": {"steps": 500}}),
    ({"save_top_k": -1, "every_n_epochs": 2}, {"keep_every": {"epochs": 2}}),
    # Hugging Face TrainingArguments
    ({"save_total_limit": 4}, {"keep_last": 4}),
    (
        {
            "save_total_limit": 4,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "greater_is_better": False,
        },
        {"keep_best": {"metric": "eval_loss", "mode": "min", "k": 1}, "keep_total": 4},
    ),
    (
        {"load_best_model_at_end": True, "metric_for_best_model": "eval_f1", "greater_is_better": True},
        {"keep_best": {"metric": "eval_f1", "mode": "max", "k": 1}, "drop": "on_pressure"},
    ),
    # Orbax CheckpointManagerOptions and preservation policies
    ({"max_to_keep": 3, "keep_period": 1000}, {"keep_last": 3, "keep_every": 1000}),
    ({"max_to_keep": 3, "keep_time_interval": "1h"}, {"keep_last": 3, "keep_every": {"time_s": 3600}}),
    (
        {"max_to_keep": 2, "best_fn": "val_loss", "best_mode": "min"},
        {"keep_best": {**BEST, "k": 2}, "keep_unmeasured": True},
    ),
    (
        {"max_to_keep": 2, "best_fn": "val_loss", "best_mode": "min", "keep_checkpoints_without_metrics": False},
        {"keep_best": {**BEST, "k": 2}},
    ),
    (
        {"preservation_policy": [{"LatestN": 3}, {"EveryNSteps": {"interval_steps": 100}}, {"CustomSteps": [7, 9]}]},
        {"keep_last": 3, "keep_every": 100, "keep_steps": [7, 9]},
    ),
    (
        {"preservation_policy": {"AnyPreservationPolicy": [{"EveryNSeconds": 60}, {"BestN": {"n": 2, **BEST}}]}},
        {"keep_every": {"time_s": 60}, "keep_best": {**BEST, "k": 2}, "keep_unmeasured": True},
    ),
    ({"preservation_policy": [{"PreserveAll": {}}]}, {"drop": "on_pressure"}),
    # and a few more
    ({"max_checkpoints": 10}, {"keep_last": 10}),
    ({"keep_latest_k": 10}, {"keep_last": 10}),
    ({"num_checkpoints_to_keep": -1}, {"drop": "on_pressure"}),
]


@pytest.mark.parametrize(("theirs", "ours"), NAMED, ids=[", ".join(theirs) for theirs, _ in NAMED])
def test_a_name_of_another_tool_means_what_it_means_there(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """M093, M095: max_checkpoints, and what people's configurations already say."""
    assert Rules(**theirs) == Rules(**ours)


WRONG = [
    ({"save_top_k": 0}, "save nothing"),
    ({"save_top_k": 3}, "needs a monitor"),
    ({"save_top_k": 2, "monitor": "val_loss"}, "never guessed"),
    ({"save_top_k": 2, "monitor": "val_loss", "mode": "auto"}, "never guessed"),
    ({"save_top_k": 2, "monitor": "val_loss", "mode": "min", "every_n_train_steps": 5}, "save_top_k = -1"),
    ({"mode": "min"}, "no monitor"),
    ({"save_strategy": "epoch"}, "when to save"),
    ({"save_weights_only": True}, "what goes into a save"),
    ({"save_total_limit": 3, "max_to_keep": 4}, "contradict"),
    ({"save_total_limit": 3, "keep_last": 4}, "contradict"),
    ({"load_best_model_at_end": True, "metric_for_best_model": "loss"}, "never guessed"),
    ({"metric_for_best_model": "loss"}, "load_best_model_at_end"),
    ({"keep_period": 100}, "max_to_keep"),
    ({"best_mode": "max", "max_to_keep": 2}, "best_fn"),
    ({"max_to_keep": 2, "best_fn": "acc"}, "never guessed"),
    ({"preservation_policy": [{"Newest": 3}]}, "not known"),
    ({"preservation_policy": 3}, "list of tables"),
    ({"preservation_policy": [{"LatestN": 3}], "max_to_keep": 3}, "takes the place"),
    ({"max_checkpoints": 3, "keep_latest_k": 4}, "contradict"),
    ({"keep_hourly": 0}, "leave it out"),
    ({"keep_total": 3}, "keep_best"),
    ({"keep_unmeasured": True}, "keep_best"),
    ({"keep_every": {}}, "steps, epochs or time_s"),
    ({"keep_every": True}, "Every"),
    ({"time_zone": "Mars/Olympus"}, "IANA"),
    ({"time_zone": "../../etc/passwd"}, "IANA"),
    ({"keep_daily": "often"}, "valid integer"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=[str(wrong) for wrong, _ in WRONG])
def test_what_can_not_be_mapped_or_contradicts_is_refused_with_the_reason(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Rules(**wrong)


def test_the_same_thing_said_twice_is_no_contradiction() -> None:
    assert Rules(save_total_limit=3, keep_last=3, max_to_keep=3) == Rules(keep_last=3)


def test_unlimited_ladders_may_be_written_as_a_word() -> None:
    assert Rules(keep_daily="unlimited").keep_daily == Rules(keep_daily=-1).keep_daily == -1


def test_rules_say_themselves_in_words() -> None:
    rules = Rules(keep_last=2, keep_every={"steps": 10, "epochs": 1}, keep_daily=7, keep_tags=("paper",), keep_hashes=3)
    assert list(rules.words()) == [
        "last 2", "every 10 steps", "every 1 epochs", "daily 7", "tags paper", "newest 3 configurations",
    ]  # fmt: skip
    assert rules.keeps
    assert not Rules(strip_after=3, trash_grace_s=0, links=False).keeps


def test_config_show_tells_which_of_other_tools_names_said_it(tmp_path: Path) -> None:
    """The name and the line, beside the setting that it became."""
    file = tmp_path / "config.toml"
    file.write_text("[retention]\nsave_total_limit = 4\nkeep_every = 1000\n")
    loaded = origins.load(file, {})
    assert loaded.settings.retention.keep_last == 4
    assert loaded.origins["retention.keep_last"] == f"{file}:2 (save_total_limit)"
    assert loaded.origins["retention.keep_every.steps"] == f"{file}:3"
    assert loaded.origins["retention.keep_daily"] == "default"
    file.write_text("[retention]\nsave_total_limit = 4\nmax_to_keep = 5\n")
    with pytest.raises(BadConfig, match="contradict"):
        origins.load(file, {})
