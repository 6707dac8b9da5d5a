"""Strategies with a name: what to keep in one word, for `strategy = ...` in [retention] and [[experiments]].

Each is a pure function from a few options to rules in our own words. Retention decides by the rules alone, so
a strategy can ask for nothing that a promise forbids: the newest verified checkpoint and the best always stay.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

Table = dict[str, Any]

KEEP, LAST, EPOCHS, DAYS = 10, 3, 25, 7
DAY = "1d"


def performance(metric: str, mode: str, *, keep: int = KEEP) -> Table:
    """Keep the best half of `keep` by a metric, and as many of the newest."""
    half = math.ceil(_count("keep", keep) / 2)
    return {"keep_best": _best(metric, mode, half), "keep_last": max(1, keep - half)}


def top_k(metric: str, mode: str, *, k: int = LAST) -> Table:
    """Keep the best k by a metric, and the newest one to go on from."""
    return {"keep_best": _best(metric, mode, _count("k", k)), "keep_last": 1}


def time(*, within: str | float = DAY, daily: int = DAYS) -> Table:
    """Keep everything saved within a span, then one a day, for `daily` days."""
    return {"keep_within": within, "keep_daily": _count("daily", daily)}


def epoch(*, every: int = EPOCHS, last: int = LAST) -> Table:
    """Keep whole epochs that are multiples of `every`, and the newest ones."""
    return {"keep_every": {"epochs": _count("every", every)}, "keep_last": _count("last", last)}


def hybrid(metric: str, mode: str, *, k: int = 1, last: int = LAST, every: int = EPOCHS) -> Table:
    """Keep the best k by a metric, the newest ones, and milestone epochs."""
    return {**epoch(every=every, last=last), "keep_best": _best(metric, mode, _count("k", k))}


def size_cap(metric: str, mode: str, *, bytes_max: int | str, k: int = 1) -> Table:
    """Keep everything until the experiment takes more than `bytes_max`; then the oldest go, the best k by a metric never."""
    return {"bytes_max": bytes_max, "keep_best": _best(metric, mode, _count("k", k)), "drop": "on_pressure"}


STRATEGIES: dict[str, Callable[..., Table]] = {
    function.__name__: function for function in (performance, top_k, time, epoch, hybrid, size_cap)
}


def rules_of(strategy: str | Mapping[str, Any]) -> Table:
    """Return the rules of `strategy = "epoch"` or `strategy = { name = "hybrid", metric = "val_loss", mode = "min" }`.

    ValueError says what is wrong with it.
    """
    options = {"name": strategy} if isinstance(strategy, str) else dict(strategy)
    name = options.pop("name", None)
    if name not in STRATEGIES:
        message = f"there is no strategy {name!r}; there are {', '.join(STRATEGIES)}"
        raise ValueError(message)
    try:
        return STRATEGIES[name](**options)
    except TypeError as error:
        reason = str(error).removeprefix(f"{name}() ")
        message = f"strategy {name!r}: {reason}"
        raise ValueError(message) from error


def _best(metric: str, mode: str, k: int) -> Table:
    if mode not in {"min", "max"}:
        message = f'mode = {mode!r}: write "min" or "max"; a direction is never guessed from a metric\'s name'
        raise ValueError(message)
    return {"metric": metric, "mode": mode, "k": k}


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        message = f"{name} = {value!r} must be a whole number of at least 1"
        raise ValueError(message)
    return value
