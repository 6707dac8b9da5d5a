"""What must be true of a node at any time, whoever was killed: one function for each invariant.

    violations(node)                     what is wrong, in words; [] is the promise kept
    violations(node, acknowledged={id: "durable"})      and nobody was told of a rung that is not there

Everything is looked at from outside: the catalog's file, the roots, the spool, the arenas that the
supervisor holds. Processes go on meanwhile, so what is wrong must still be wrong at a second look.
"""

import functools
import hashlib
import json
import os
import re
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd_client import control, spool
from ckptd_client.find import stripped_files
from tests.support.node import Node, NotAnswering, arenas_of
from tests.support.taken_out import named, recorded

RANK = {"none": 0, "staged": 1, "durable": 2, "verified": 3, "tiered": 4}
GRACE_S = 60.0  # orphan_age_s of the tests' configuration, twice the upkeep's interval, and a slow machine
AGAIN_S = 0.7
LOOKS_MAX = 3
TRASH = ".ckptd-trash"
MARK = ".ckptd-tmp-"
_TEMPORARY_OF = re.compile(r"\.tmp-(\d+)$")
_ROWS = """
SELECT c.*, e.id AS experiment_id, e.name AS experiment, p.name AS project, r.path AS root, r.kind AS root_kind
FROM checkpoint c JOIN experiment e ON e.no = c.experiment_no JOIN project p ON p.no = c.project_no
LEFT JOIN root r ON r.no = c.root_no ORDER BY c.sequence
"""


@dataclass(frozen=True)
class Arena:
    """One arena as its control page says it."""

    ino: int
    state: int
    pid: int
    ticks: int
    checkpoint: str  # "" unless it holds a whole descriptor


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything that the invariants are about, read at one moment."""

    rows: dict[str, dict[str, Any]]
    files: dict[int, list[tuple[str, int, str]]]  # by the checkpoint's sequence: path, size, SHA-256
    stripped: dict[int, set[str]]  # likewise: files that were taken out, or are on the move
    events: dict[str, list[str]]  # by checkpoint: names in their order
    jobs: dict[str, list[str]]  # by checkpoint: states
    held: dict[int, str]  # by sequence: "pin" or "lease"
    best: set[int]
    roots: dict[str, str]  # path: kind
    spool: Path
    arenas: list[Arena] | None = None  # None: no daemon runs, so there is no memory to speak of
    unowned: set[int] = field(default_factory=set)  # inodes that only one of daemon and store has
    sound: list[str] = field(default_factory=list)
    grace_s: float = GRACE_S

    def good(self) -> Iterator[dict[str, Any]]:
        """Rows whose files must be on disk now."""
        return (row for row in self.rows.values() if row["state"] == "live" and RANK[row["level"]] >= RANK["durable"])

    def managed(self) -> Iterator[Path]:
        """Roots that ckptd writes into."""
        return (Path(path) for path, kind in self.roots.items() if kind == "managed" and os.path.isdir(path))


def violations(node: Node, acknowledged: Mapping[str, str] | None = None, *, grace_s: float = GRACE_S) -> list[str]:
    """Return what is wrong with a running node; blocks for a second look when something seems to be.

    acknowledged  rungs that somebody was told of, by checkpoint id
    grace_s       how old what is left of dead processes may become
    """
    found = examine(of_node(node, grace_s), acknowledged)
    for _ in range(LOOKS_MAX):
        if not found:
            return []
        time.sleep(AGAIN_S)
        again = examine(of_node(node, grace_s), acknowledged)
        found = [each for each in found if each in again]
    return found


def examine(view: View, acknowledged: Mapping[str, str] | None = None) -> list[str]:
    """Return what is wrong in a view."""
    found = list(view.sound)
    for name, invariant in INVARIANTS.items():
        found += [f"{name}: {each}" for each in invariant(view)]
    return found + [f"I1: {each}" for each in _kept_word(view, acknowledged or {})]


def ladder(view: View) -> Iterator[str]:
    """I1. What is staged is held somewhere; what is durable is there, every digest equal; nothing is told twice."""
    in_memory = {arena.checkpoint for arena in view.arenas or () if arena.state == control.COMMITTED}
    spooled = {entry.checkpoint for entry in spool.entries(str(view.spool))}
    for row in view.rows.values():
        told = view.events[row["id"]]
        if row["state"] == "pending":
            if not set(view.jobs[row["id"]]) & {"queued", "running", "parked"}:
                yield f"{_name(row)} is pending and no job is left for it"
            if row["origin"] == "memory" and view.arenas is not None and row["id"] not in in_memory | spooled:
                yield f"{_name(row)} is pending and its bytes are nowhere"
        for event in ("checkpoint.staged", "checkpoint.published"):
            if told.count(event) > 1:
                yield f"{_name(row)}: {event} was told {told.count(event)} times"
        reached = (
            "verified" if "checkpoint.verified" in told else "durable" if "checkpoint.published" in told else "none"
        )
        if RANK[row["level"]] < RANK[reached] and "checkpoint.restored" not in told:
            yield f"{_name(row)} is {row['level']} though {reached} was told"
    for row in view.good():
        for wrong in _damage(row, view.files[row["sequence"]]):
            yield f"{_name(row)} is {row['level']}: {wrong}"


def _kept_word(view: View, acknowledged: Mapping[str, str]) -> Iterator[str]:
    for checkpoint, level in acknowledged.items():
        row = view.rows.get(checkpoint)
        if row is None:
            yield f"{checkpoint} was told to be {level} and is not in the catalog"
        elif row["state"] in {"failed", "replaced"} or RANK[row["level"]] < RANK[level]:
            yield f"{_name(row)} was told to be {level} and is {row['state']}, {row['level']}"


def whole_or_absent(view: View) -> Iterator[str]:
    """I2. Under every final name lies a whole checkpoint of ours."""
    known = {row["path"]: row["state"] for row in view.rows.values() if row["path"]}
    for directory in _final_names(view):
        if known.get(str(directory)) in {"corrupt", "missing"}:
            continue
        try:
            manifest = json.loads((directory / "manifest.json").read_bytes())
            files = named(manifest, stripped_files(str(directory), manifest["checkpoint"]))
        except (OSError, ValueError, KeyError) as error:
            if directory.exists():
                yield f"{directory} has no whole manifest: {error!r}"
            continue
        if not files:
            yield f"{directory} holds no file"
        for wrong in _damage({"path": str(directory)}, files):
            yield f"{directory}: {wrong}"


def never_without_one(view: View) -> Iterator[str]:
    """I3. Who ever had a verified checkpoint has one, unless its disk or somebody else took them all."""
    of = defaultdict(list)
    for row in view.rows.values():
        if "checkpoint.verified" in view.events[row["id"]]:
            of[row["experiment_id"]].append(row)
    for rows in of.values():
        if not any(row["state"] in {"live", "corrupt", "missing"} for row in rows):
            yield f"every verified checkpoint of {rows[0]['project']}/{rows[0]['experiment']} was retired"
    for directory in {path.parent for path in _final_names(view)}:
        link = directory / "latest"
        if link.is_symlink() and not link.exists():
            yield f"{link} leads to what is not there"


def retired_rightly(view: View) -> Iterator[str]:
    """I4. Nothing held, best or newest was retired, and the trash holds only what was."""
    newest: dict[int, dict[str, Any]] = {}
    for row in view.rows.values():
        held = view.held.get(row["sequence"]) or ("best by a rule" if row["sequence"] in view.best else "")
        if held and _is_retired(row):
            yield f"{_name(row)} is {row['state']} in spite of a {held}"
        if row["verified_at"] is not None:
            newest[row["experiment_no"]] = max(newest.get(row["experiment_no"], row), row, key=_age)
    for row in filter(_is_retired, newest.values()):
        yield f"{_name(row)} is {row['state']} and the newest that was verified"
    for root in view.managed():
        for entry in _entries(root / TRASH):
            found = view.rows.get(entry.name.partition(".")[0])
            if found is None or found["state"] not in {"trashed", "live", "missing"}:
                yield f"{entry} is in the trash, and its row is {found and found['state']}"


def _is_retired(row: Mapping[str, Any]) -> bool:
    return row["trashed_at"] is not None and row["state"] in {"trashed", "dropped"}


def rebuildable(view: View) -> Iterator[str]:
    """I5. Manifests say what the catalog says: it could be made again from them."""
    for row in view.good():
        if row["root_kind"] != "managed" or row["origin"] not in {"memory", "rebuild"}:
            continue
        try:
            text = (Path(row["path"]) / "manifest.json").read_bytes()
            manifest = json.loads(text)
        except (OSError, ValueError):
            continue  # I2 says it
        facts = {"checkpoint": "id", "project": "project", "experiment": "experiment", "experiment_id": "experiment_id"}
        facts |= {"step": "step", "segment": "segment"}
        for key, column in facts.items():
            if manifest.get(key) != row[column]:
                yield f"{_name(row)}: the manifest's {key} is {manifest.get(key)!r}, the catalog's {row[column]!r}"
        files = sorted(named(manifest, view.stripped.get(row["sequence"], ())))
        if files != sorted(view.files[row["sequence"]]):
            yield f"{_name(row)}: manifest and catalog list other files"
        if row["manifest_sha256"] not in {"", hashlib.sha256(text).hexdigest()}:
            yield f"{_name(row)}: the manifest has another digest than the catalog says"
    for directory in _final_names(view):
        found = view.rows.get(_claimed(directory))
        if (found is None or found["state"] == "failed") and _age_s(directory) > view.grace_s:
            yield f"{directory} is a checkpoint, and the catalog says {found and found['state']}"


def _claimed(directory: Path) -> str:
    """The checkpoint that a manifest names, "" without one."""
    try:
        return str(json.loads((directory / "manifest.json").read_bytes())["checkpoint"])
    except (OSError, ValueError, KeyError):
        return ""


def no_orphans(view: View) -> Iterator[str]:
    """I11. What dead processes left goes within the grace: temporary names, half images, memory."""
    left = [path for root in view.managed() for path in _temporaries(root)]
    left += [entry for entry in _entries(view.spool) if _is_abandoned(entry)]
    for path in left:
        if _age_s(path) > view.grace_s:
            yield f"{path} is older than {view.grace_s:g} s, and nobody's"
    for ino in sorted(view.unowned):
        yield f"arena {ino} is held by only one of daemon and supervisor"
    for arena in view.arenas or ():
        yield from _misplaced(arena, view.rows.get(arena.checkpoint))


def _misplaced(arena: Arena, row: Mapping[str, Any] | None) -> Iterator[str]:
    alive = control.is_alive(arena.pid, arena.ticks)
    if arena.state in {control.LEASED, control.WRITING} and not alive:
        yield f"arena {arena.ino} is lent to process {arena.pid}, which is dead"
    if arena.state == control.COMMITTED and not alive and row is None:
        yield f"arena {arena.ino} holds {arena.checkpoint}, which nobody took in"
    if arena.state == control.COMMITTED and row is not None and row["state"] == "live":
        yield f"arena {arena.ino} still counts {arena.checkpoint} as unpublished"


def _is_abandoned(entry: Path) -> bool:
    writer = _TEMPORARY_OF.search(entry.name)
    return writer is not None and not Path(f"/proc/{writer[1]}").exists()


INVARIANTS: dict[str, Callable[[View], Iterator[str]]] = {
    "I1": ladder,
    "I2": whole_or_absent,
    "I3": never_without_one,
    "I4": retired_rightly,
    "I5": rebuildable,
    "I11": no_orphans,
}


# -- looking --------------------------------------------------------------------------------------


def of_node(node: Node, grace_s: float = GRACE_S) -> View:
    """Look at a running node; at one whose daemon is away, without its memory."""
    arenas: list[Arena] | None = None
    unowned: set[int] = set()
    if node.supervisor is not None and node.supervisor.poll() is None:
        store = node.supervisor.pid
        arenas = _arenas(store)
        try:
            daemon = int(node.ask_once("status")["daemon"]["pid"])
        except NotAnswering:
            daemon = 0
        if daemon:
            unowned = arenas_of(daemon) ^ arenas_of(store)
    return of_disk(node.state, arenas=arenas, unowned=unowned, grace_s=grace_s)


def of_disk(state: Path, **memory: Any) -> View:
    """Look at a state directory and the roots that its catalog names."""
    raw = sqlite3.connect(f"file:{state}/catalog.sqlite?mode=ro", uri=True, timeout=20, isolation_level=None)
    raw.row_factory = sqlite3.Row
    try:
        raw.execute("BEGIN")
        return View(**_read(raw), sound=list(_sound(raw)), spool=state / "spool", **memory)
    finally:
        raw.close()


def _read(raw: sqlite3.Connection) -> dict[str, Any]:
    rows = {row["id"]: dict(row) for row in raw.execute(_ROWS)}
    files: dict[int, list[tuple[str, int, str]]] = defaultdict(list)
    for number, *of in raw.execute("SELECT checkpoint_no, path, size_bytes, sha256 FROM file WHERE NOT stripped"):
        files[number].append((of[0], of[1], of[2]))
    events: dict[str, list[str]] = defaultdict(list)
    for checkpoint, name in raw.execute(
        "SELECT checkpoint_id, name FROM event WHERE checkpoint_id IS NOT NULL ORDER BY sequence"
    ):
        events[checkpoint].append(name)
    jobs: dict[str, list[str]] = defaultdict(list)
    for checkpoint, job_state in raw.execute("SELECT checkpoint_id, state FROM job"):
        jobs[checkpoint].append(job_state)
    now_us = time.time_ns() // 1000
    held = {row[0]: "lease" for row in raw.execute("SELECT checkpoint_no FROM lease WHERE until > ?", (now_us,))}
    held |= {row[0]: "pin" for row in raw.execute("SELECT checkpoint_no FROM pin")}
    best = {row[0] for row in raw.execute("SELECT checkpoint_no FROM best")}
    roots = {row[0]: row[1] for row in raw.execute("SELECT path, kind FROM root")}
    facts = {"rows": rows, "files": files, "stripped": recorded(raw), "events": events, "jobs": jobs, "held": held}
    return {**facts, "best": best, "roots": roots}


def _sound(raw: sqlite3.Connection) -> Iterator[str]:
    if (said := raw.execute("PRAGMA quick_check").fetchall()[0][0]) != "ok":
        yield f"the catalog is damaged: {said}"
    for row in raw.execute("PRAGMA foreign_key_check").fetchall():
        yield f"the catalog has a row without its parent: {tuple(row)}"


def _arenas(pid: int) -> list[Arena]:
    """Read the control pages of the arenas that a process holds."""
    found = {}
    for entry in _entries(Path(f"/proc/{pid}/fd")):
        try:
            if "memfd:ckptd-arena" not in os.readlink(entry):
                continue
            with entry.open("rb", buffering=0) as memory:
                page = control.read(os.pread(memory.fileno(), control.PAGE, 0).ljust(control.PAGE, b"\0"))
                if page is None:
                    continue
                raw = os.pread(memory.fileno(), min(page.descriptor_size, 16 << 20), page.descriptor_offset)
                ino = os.fstat(memory.fileno()).st_ino
        except OSError:
            continue  # given back between the listing and the look
        whole = control.is_whole(page, raw)
        checkpoint = json.loads(raw)["checkpoint"] if whole else ""
        found[ino] = Arena(ino, page.state, page.pid, page.started_ticks, checkpoint)
    return list(found.values())


def _final_names(view: View) -> Iterator[Path]:
    for root in view.managed():
        for path in root.glob("[!.]*/[!.]*/[!.]*"):
            if path.is_dir() and not path.is_symlink():
                yield path


def _temporaries(root: Path) -> Iterator[Path]:
    for path in root.glob("[!.]*/[!.]*/.*"):
        if MARK in path.name:
            yield path


def _damage(row: Mapping[str, Any], files: list[tuple[str, int, str]]) -> Iterator[str]:
    for name, size_bytes, sha256 in files:
        path = os.path.join(row["path"], name) if name else row["path"]
        try:
            facts = os.stat(path)
            if facts.st_size != size_bytes:
                yield f"{path} has {facts.st_size} bytes instead of {size_bytes}"
            elif digest(path, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns) != sha256:
                yield f"{path} has another digest"
        except OSError as error:
            yield f"{path}: {error.strerror}"


@functools.lru_cache(maxsize=65536)
def digest(path: str, ino: int, mtime_ns: int, ctime_ns: int) -> str:
    """The file's SHA-256, read once while nobody writes to it. After a power cut: digest.cache_clear()."""
    del ino, mtime_ns, ctime_ns
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entries(directory: Path) -> list[Path]:
    try:
        return [directory / name for name in os.listdir(directory)]
    except OSError:
        return []


def _age_s(path: Path) -> float:
    try:
        facts = path.lstat()
    except OSError:
        return 0.0
    return time.time() - max(facts.st_mtime, facts.st_ctime)


def _age(row: Mapping[str, Any]) -> tuple[int, int, int, int]:
    return row["segment"], -1 if row["step"] is None else row["step"], row["revision"], row["sequence"]


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['project']}/{row['experiment']} step {row['step']} ({row['id'][:12]})"
