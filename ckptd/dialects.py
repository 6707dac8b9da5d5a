"""Names that other tools gave to what a rule says: Lightning, Hugging Face Trainer, Orbax and a few more.

A name is taken with the exact meaning it has there, or refused with the reason: a configuration that is
carried over must not keep something else than it did. Pure: tables in, tables out.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ckptd.strategies import rules_of

Table = dict[str, Any]

# What decides when a trainer saves, or what it puts into a save, is no question of what is kept afterwards.
_TRAINERS_OWN = {
    "train_time_interval": "when to save",
    "save_on_train_epoch_end": "when to save",
    "save_interval_steps": "when to save",
    "save_steps": "when to save",
    "save_strategy": "when to save",
    "save_weights_only": "what goes into a save",
    "save_only_model": "what goes into a save",
    "last_save_model_only": "what goes into a save",
}
_LIGHTNING = ("save_top_k", "monitor", "mode", "every_n_train_steps", "every_n_epochs")
_TRAINER = ("save_total_limit", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
_ORBAX = (
    "max_to_keep", "keep_period", "keep_time_interval", "best_fn", "best_mode", "keep_checkpoints_without_metrics",
    "preservation_policy",
)  # fmt: skip
_PLAIN = {"max_checkpoints": "keep_last", "keep_latest_k": "keep_last", "num_checkpoints_to_keep": "keep_last"}
_STRATEGY = ("strategy",)
NAMES = frozenset((*_TRAINERS_OWN, *_LIGHTNING, *_TRAINER, *_ORBAX, *_PLAIN, *_STRATEGY))
_STEPS = frozenset({"step", "global_step"})  # as a monitor: the newest


class Translated(NamedTuple):
    """A table in our own words, and for each key that came from elsewhere the names that said it."""

    table: Table
    said_by: dict[str, tuple[str, ...]]


def translate(table: Mapping[str, Any]) -> Translated:
    """Put foreign names into our own words. ValueError says which can't be, and why."""
    ours = {key: value for key, value in table.items() if key not in NAMES}
    said_by: dict[str, tuple[str, ...]] = {}
    for name in table:
        if name in _TRAINERS_OWN:
            what = _TRAINERS_OWN[name]
            raise ValueError(f"{name} tells a trainer {what}; ckptd keeps what trainers save: set it there")
    for names, read in (
        (_LIGHTNING, _lightning), (_TRAINER, _trainer), (_ORBAX, _orbax), (tuple(_PLAIN), _plain), (_STRATEGY, _strategy),
    ):  # fmt: skip
        given = {name: table[name] for name in names if name in table}
        if not given:
            continue
        for key, value in read(given).items():
            if key in ours and ours[key] != value:
                other = ", ".join(said_by.get(key, (key,)))
                raise ValueError(f"{', '.join(given)} and {other} contradict one another: keep one of them")
            ours[key] = value
            said_by[key] = tuple(given)
    return Translated(ours, said_by)


def _lightning(given: Table) -> Table:
    """ModelCheckpoint: save_top_k, monitor, mode; every_n_train_steps and every_n_epochs only with save_top_k = -1."""
    top, monitor = given.get("save_top_k", 1), given.get("monitor")
    if isinstance(top, bool) or not isinstance(top, int) or top < -1:
        raise ValueError(f"save_top_k is a whole number from -1, not {top!r}")
    if top == 0:
        raise ValueError("save_top_k = 0 tells a trainer to save nothing; ckptd keeps what trainers save: set it there")
    milestones = {name.removeprefix("every_n_train_"): given[name] for name in given if name.startswith("every_n_")}
    milestones = {"epochs" if name == "every_n_epochs" else name: number for name, number in milestones.items()}
    if milestones and top != -1:
        raise ValueError("every_n_train_steps and every_n_epochs name milestones with save_top_k = -1 only; else they "
                         "tell a trainer when to save")  # fmt: skip
    if milestones:
        if monitor is not None:
            raise ValueError("with every_n_train_steps or every_n_epochs a monitor has nothing to choose from")
        return {"keep_every": milestones}
    if monitor is None:
        if "mode" in given:
            raise ValueError("mode says in which direction the monitor is better; there is no monitor")
        if top > 1:
            raise ValueError("save_top_k above 1 needs a monitor, as in Lightning")
        return {"drop": "on_pressure"} if top == -1 else {"keep_last": 1}
    mode = _mode(given.get("mode"), "mode", "monitor")
    if monitor in _STEPS and mode == "max" and top > 0:
        return {"keep_last": top}
    best = {"metric": monitor, "mode": mode, "k": max(top, 1)}
    return {"keep_best": best, "drop": "on_pressure"} if top == -1 else {"keep_best": best}


def _trainer(given: Table) -> Table:
    """TrainingArguments: the newest N, or with load_best_model_at_end the best and the newest, N together."""
    limit, best = given.get("save_total_limit"), given.get("load_best_model_at_end", False)
    metric, greater = given.get("metric_for_best_model"), given.get("greater_is_better")
    if not best:
        if metric is not None or greater is not None:
            raise ValueError("metric_for_best_model and greater_is_better keep nothing without load_best_model_at_end")
        return {} if limit is None else {"keep_last": limit}
    if metric is None or greater is None:
        raise ValueError("load_best_model_at_end needs metric_for_best_model and greater_is_better: a direction is "
                         "never guessed from a metric's name")  # fmt: skip
    name = metric if str(metric).startswith("eval_") else f"eval_{metric}"  # as the trainer logs it
    rule = {"metric": name, "mode": "max" if greater else "min", "k": 1}
    return {"keep_best": rule, "drop": "on_pressure"} if limit is None else {"keep_best": rule, "keep_total": limit}


def _orbax(given: Table) -> Table:
    """CheckpointManagerOptions; best_fn is the metric's name here, since no code stands in a configuration."""
    found: Table = {}
    policy = given.get("preservation_policy")
    if policy is not None:
        if len(given) > 1:
            raise ValueError("preservation_policy takes the place of max_to_keep, keep_period and best_fn: give either")
        return _policies(policy)
    best, most = given.get("best_fn"), given.get("max_to_keep")
    if "keep_period" in given or "keep_time_interval" in given:
        if most is None:
            raise ValueError("keep_period and keep_time_interval only spare what max_to_keep drops; give max_to_keep")
        every = {"steps": given.get("keep_period"), "time_s": given.get("keep_time_interval")}
        found["keep_every"] = {name: number for name, number in every.items() if number is not None}
    if best is None:
        if "best_mode" in given or "keep_checkpoints_without_metrics" in given:
            raise ValueError("best_mode and keep_checkpoints_without_metrics are about best_fn, which is not given")
        return found if most is None else {**found, "keep_last": most}
    rule = {"metric": best, "mode": _mode(given.get("best_mode"), "best_mode", "best_fn"), "k": most or 1}
    found["keep_best"] = rule
    if most is None:
        found["drop"] = "on_pressure"
    else:
        found["keep_unmeasured"] = given.get("keep_checkpoints_without_metrics", True)
    return found


def _policies(policy: Any) -> Table:
    """A list of one-key tables, a union: [{ LatestN = 3 }, { EveryNSteps = 1000 }, { BestN = { n = 2, ... } }]."""
    if isinstance(policy, Mapping) and set(policy) == {"AnyPreservationPolicy"}:
        policy = policy["AnyPreservationPolicy"]
    listed = [policy] if isinstance(policy, Mapping) else policy
    if not isinstance(listed, list) or not all(isinstance(one, Mapping) and len(one) == 1 for one in listed):
        raise ValueError("preservation_policy is a list of tables such as { LatestN = 3 }")
    found: Table = {}
    every: Table = {}
    best: list[Table] = []
    for (kind, said), *_ in (one.items() for one in listed):
        if kind == "LatestN":
            found["keep_last"] = max(_number(said, "n"), found.get("keep_last", 0))
        elif kind in {"EveryNSteps", "EveryNSeconds"}:
            key, word = ("steps", "interval_steps") if kind == "EveryNSteps" else ("time_s", "interval_secs")
            if key in every:
                raise ValueError(f"{kind} stands there twice; of two intervals give the one that divides the other")
            every[key] = _number(said, word)
        elif kind == "CustomSteps":
            found["keep_steps"] = [
                *found.get("keep_steps", ()),
                *(said["steps"] if isinstance(said, Mapping) else said),
            ]
        elif kind == "BestN":
            best.append(_best_n(said))
            found["keep_unmeasured"] = said.get("keep_checkpoints_without_metrics", True)
        elif kind == "PreserveAll":
            found["drop"] = "on_pressure"
        else:
            known = "LatestN, EveryNSteps, EveryNSeconds, CustomSteps, BestN, PreserveAll"
            raise ValueError(
                f"the policy {kind!r} is not known; there is {known}, and AnyPreservationPolicy around them"
            )
    return found | ({"keep_every": every} if every else {}) | ({"keep_best": best} if best else {})


def _best_n(said: Any) -> Table:
    if not isinstance(said, Mapping) or "metric" not in said or "n" not in said:
        raise ValueError(
            'BestN is { n = 2, metric = "...", mode = "min" }: a metric stands in the place of get_metric_fn'
        )
    return {"metric": said["metric"], "mode": _mode(said.get("mode"), "mode", "BestN"), "k": said["n"]}


def _plain(given: Table) -> Table:
    """A number of the newest; -1 keeps everything."""
    if len({str(value) for value in given.values()}) > 1:
        raise ValueError(f"{' and '.join(given)} contradict one another: keep one of them")
    (number, *_) = given.values()
    return {"drop": "on_pressure"} if number == -1 else {"keep_last": number}


def _strategy(given: Table) -> Table:
    """One of our own, by its name."""
    return rules_of(given["strategy"])


def _mode(mode: Any, name: str, of: str) -> str:
    if mode not in {"min", "max"}:
        raise ValueError(f'{of} needs {name} = "min" or "max": a direction is never guessed from a metric\'s name')
    return str(mode)


def _number(said: Any, word: str) -> Any:
    return said.get(word) if isinstance(said, Mapping) else said
