"""What is needed to go on after an experiment ended badly: the last good checkpoint, and the command that resumes it.

Told with the event of its end, in the same transaction, and computed again whenever somebody asks.
"""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.checkpoint_rows import newest_good
from ckptd.model import Checkpoint, State
from ckptd_client.capture import MASK

COMMAND_BYTES_MAX = 8 << 10  # as text; a longer one is not told, only said to exist
_LOST = (State.CORRUPT, State.MISSING, State.FAILED)
# What changes a run's numbers or its devices, and no launcher sets anew.
_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS", "PYTHONHASHSEED")
_LAUNCHERS = (("SLURM_JOB_ID", "Slurm job"), ("KUBERNETES_SERVICE_HOST", "Kubernetes, API"))
_FACTS = ("host", "cwd", "argv", "executable", "pid", "python", "git_commit", "git_branch", "git_dirty")


@dataclass(frozen=True, slots=True)
class Ended:
    """What is known of an experiment."""

    id: str
    project: str
    name: str
    root: str
    last_step: int | None
    facts: Mapping[str, Any] = field(default_factory=dict)


async def of_experiment(conn: AsyncConnection, ended: Ended) -> dict[str, Any]:
    """Return the JSON object `recovery` of docs/reference/wire-control.md."""
    good = await newest_good(conn, ended.id)
    row = schema.checkpoint.c
    no = select(schema.experiment.c.no).where(schema.experiment.c.id == ended.id).scalar_subquery()
    lost = select(func.count()).where(row.experiment_no == no, row.state.in_(_LOST))
    if good is not None:
        lost = lost.where(row.sequence > good.sequence)
    return recipe(ended, good, int((await conn.execute(lost)).scalar_one()))


def recipe(ended: Ended, good: Checkpoint | None, lost: int = 0) -> dict[str, Any]:
    """Put it together. Pure.

    lost  saves after the last good one that never became good
    """
    facts = {key: ended.facts[key] for key in _FACTS if ended.facts.get(key) not in (None, "")}
    command = command_of(ended.facts)
    again = None if good is None or good.step is None or ended.last_step is None else ended.last_step - good.step
    return {
        "project": ended.project,
        "name": ended.name,
        "checkpoint": None if good is None else _named(good),
        "last_step": ended.last_step,
        "steps_again": None if again is None else max(0, again),
        "lost": lost,
        "command": command,
        "facts": facts,
        "hints": hints(ended, good, command),
    }


def command_of(facts: Mapping[str, Any]) -> str | None:
    """Return one shell command that starts the same program with the same arguments in the same directory.

    None where the process did not say how it was started, or said more than COMMAND_BYTES_MAX.

    >>> command_of({"cwd": "/home/me", "executable": "/usr/bin/python3", "argv": ["train.py", "--lr", "0.1"]})
    'cd /home/me && /usr/bin/python3 train.py --lr 0.1'
    """
    words = _words(facts)
    if not words:
        return None
    environment = facts.get("env")
    environment = environment if isinstance(environment, Mapping) else {}
    settings = [f"{name}={shlex.quote(str(environment[name]))}" for name in _ENVIRONMENT if name in environment]
    cwd = facts.get("cwd")
    start = [f"cd {shlex.quote(cwd)} &&"] if isinstance(cwd, str) and cwd else []
    command = " ".join([*start, *settings, shlex.join(words)])
    return command if len(os.fsencode(command)) <= COMMAND_BYTES_MAX else None


def hints(ended: Ended, good: Checkpoint | None, command: str | None) -> list[str]:
    """Return what a person should know before typing the command."""
    facts = ended.facts
    found: list[str] = []
    if good is None:
        found.append("it has no verified checkpoint: it would begin anew")
    if command is None:
        found.append("its process did not say how it was started")
    elif MASK in command:
        found.append(f"{MASK} stands for a secret that was not recorded: put it in")
    if facts.get("host"):
        found.append(f"it ran on {facts['host']}")
    environment = facts.get("env")
    environment = environment if isinstance(environment, Mapping) else {}
    if str(environment.get("WORLD_SIZE", "1")) not in {"", "0", "1"}:
        rank = environment.get("RANK", "?")
        found.append(f"it was rank {rank} of {environment['WORLD_SIZE']}: start all of them through their launcher")
    found += [f"it ran under {who} {environment[name]}" for name, who in _LAUNCHERS if name in environment]
    if facts.get("git_dirty"):
        found.append("its code had changes that are not in the commit")
    place = f"{ended.root.rstrip('/')}/{ended.project}/{ended.name}/"
    for word in _words(facts):
        if good is not None and place in os.path.join(str(facts.get("cwd") or "/"), word) and good.path not in word:
            found.append(f"its command names {word}; the last good checkpoint is {good.path}")
    return found


def _words(facts: Mapping[str, Any]) -> list[str]:
    """Return the command line: as the interpreter was started, else as the script sees it."""
    for key in ("command", "argv"):
        said = facts.get(key)
        if isinstance(said, list) and said and all(isinstance(word, str) and "\0" not in word for word in said):
            executable = facts.get("executable")
            first = [executable] if isinstance(executable, str) and executable else []
            return [*(first or said[:1]), *said[1:]] if key == "command" else [*first, *said]
    return []


def _named(good: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint": good.id,
        "step": good.step,
        "epoch": good.epoch,
        "path": good.path,
        "verified_at": None if good.verified_at is None else good.verified_at.isoformat(),
    }
