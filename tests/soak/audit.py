"""What must be true when a node has come to rest: every promise kept, every byte as it was saved. [] is good."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.soak.crew import LEGACY, PROJECT, Part
from tests.soak.ground import Ground
from tests.soak.ledger import Entry, Ledger
from tests.support import payload
from tests.support.invariants import violations
from tests.support.node import eventually

IDLE_S = 90.0
FOUND_S = 60.0
KEPT = {"last": 3, "best": 3}  # by the rules in ground.py: so many at least, when so many were saved
HELD_MAX = 8  # beyond the rules: what readers hold, what retention is about to drop


def audit(ground: Ground, ledger: Ledger, parts: list[Part]) -> list[str]:
    """Look at everything. Called while nobody saves and nothing is broken."""
    found = [f"not at rest: {busy}"] if (busy := ground.idle(IDLE_S)) else []
    found += _unfound(ground, ledger)
    found += violations(ground, ledger.acknowledged())
    found += [f"defect: {line}" for line in ground.defects()]
    for part in parts:
        found += _experiment(ground, ledger, part)
    found += _files(ground, ledger)
    found += ledger.wrong
    ledger.wrong = []
    return found


def _experiment(ground: Ground, ledger: Ledger, part: Part) -> Iterator[str]:
    rows: dict[int, list[dict[str, Any]]] = {}
    for row in ground.rows(PROJECT, part.name):
        rows.setdefault(row["step"], []).append(row)
    entries = {entry.step: entry for entry in ledger.of(part.name)}
    for step in rows.keys() - entries.keys():
        yield f"{part.name} step {step} was never saved"
    for step, entry in entries.items():
        yield from _save(entry, rows.get(step, []), part)
    kind = part.name.partition("-")[0]
    live = sum(row["state"] == "live" for of in rows.values() for row in of)
    arrived = sum(any(row["level"] == "verified" for row in of) for of in rows.values())
    if kind in KEPT and live < min(KEPT[kind] - 1, arrived):
        yield f"{part.name} has {live} checkpoints left of {arrived}"
    if kind in KEPT and live > KEPT[kind] + HELD_MAX:
        yield f"{part.name} has {live} checkpoints: its rules are not applied any more"


def _save(entry: Entry, rows: list[dict[str, Any]], part: Part) -> Iterator[str]:
    """One save: there once, or absent where nothing was promised; and what is there is what was saved."""
    name = f"{entry.experiment} step {entry.step}"
    if len(rows) > 1:
        yield f"{name} is there {len(rows)} times"
    certain = not entry.refused and (entry.promised or not entry.lost_sight)
    if not rows and certain:
        yield f"{name} ({entry.id or 'unknown id'}, told {entry.level}, spooled {entry.spooled}) is lost"
    for row in rows:
        if entry.id and row["checkpoint"] != entry.id:
            yield f"{name} is {row['checkpoint']}, its trainer was told {entry.id}"
        if certain and row["state"] not in {"live", "trashed", "dropped"}:
            yield f"{name} is {row['state']}, {row['level']}"
        if part.name.startswith("kept") and certain and row["state"] != "live":
            yield f"{name} is {row['state']} though no rule may remove it"
        if row["state"] == "live" and not entry.checked:
            entry.checked = True
            yield from _bytes(entry, Path(row["path"]), part)


def _bytes(entry: Entry, path: Path, part: Part) -> Iterator[str]:
    """Compare every bit with what the seed made; retention may take it away meanwhile."""
    try:
        if part.plain:
            payload.check_directory(path)
            state = (path / "state.json").read_text()
            if str(entry.seed) not in state or "x" * entry.size_bytes not in state:
                yield f"{path} holds another state"
        else:
            payload.check_saved(path, entry.seed, entry.size_bytes)
    except FileNotFoundError as error:
        if path.exists():
            yield f"{path}: {error}"
    except (AssertionError, OSError, ValueError) as error:
        yield f"{path}: {error}"


def _unfound(ground: Ground, ledger: Ledger) -> list[str]:
    """Wait until every legacy file that lies there is verified."""

    def missing() -> set[str]:
        rows = ground.rows(LEGACY)
        done = {row["path"] for row in rows if (row["state"], row["level"]) == ("live", "verified")}
        return set(ledger.files) - done

    try:
        eventually(lambda: not missing(), "every legacy file to be verified", FOUND_S)
    except AssertionError:
        return [f"{path} was written and is not catalogued" for path in sorted(missing())]
    return []


def _files(ground: Ground, ledger: Ledger) -> Iterator[str]:
    live = Counter(row["path"] for row in ground.rows(LEGACY) if row["state"] == "live")
    for path, count in live.items():
        if count != 1:
            yield f"{path} has {count} live rows"
        if path not in ledger.files:
            yield f"{path} is catalogued, and nobody wrote it: {json.dumps(ground.at(path))}"
