"""Long descriptions for people: one checkpoint, and the whole state of a daemon."""

from collections.abc import Iterator, Mapping
from typing import Any

from ckptd.cli import render
from ckptd.cli.listing import condition, label, step
from ckptd.cli.render import Column, Screen, escape, table

FILES_SHOWN_MAX = 40
Row = Mapping[str, Any]


def describe(body: Row, screen: Screen) -> list[str]:
    """Set the answer of `show` as lines."""
    checkpoint = body["checkpoint"]
    title = f"{label(checkpoint)} step {step(checkpoint) or 'unknown'}"
    lines = [screen.paint(escape(title), "bold") + "  " + screen.paint(condition(checkpoint), condition(checkpoint))]
    lines += _pairs(_facts(checkpoint), screen)
    lines += _pairs((("vetoed by", checkpoint.get("veto")),), screen, "yellow")
    error = checkpoint.get("error")
    if error:
        lines += _pairs((("problem", f"{error.get('message', '')} [{error.get('code', '')}]"),), screen, "red")
    if body.get("recovery"):
        from ckptd.cli.training import lines_of

        lines += ["", screen.paint(f"its experiment {body['experiment'].get('status')}; to go on:", "bold")]
        lines += lines_of(body["recovery"], screen)
    for title, key, columns in _PARTS:
        rows = list(body.get(key) or ())
        if rows:
            lines += ["", *table(screen, columns, rows[:FILES_SHOWN_MAX])]
            total = body.get("files_total", len(rows)) if key == "files" else len(rows)
            if total > FILES_SHOWN_MAX:
                lines.append(f"and {total - min(len(rows), FILES_SHOWN_MAX)} more {title}")
    return lines


def _facts(row: Row) -> Iterator[tuple[str, object]]:
    yield "id", row["checkpoint"]
    yield "path", row.get("path")
    yield "size", f"{render.size(row.get('size_bytes'))} ({row.get('size_bytes')} bytes), {row.get('format')}"
    for rung in ("created", "staged", "durable", "verified"):
        at = row.get(f"{rung}_at")
        yield rung, f"{render.moment(at)} ({render.age(at)})" if at else None
    yield "came by", row.get("origin")
    yield "epoch", row.get("epoch")
    yield "metrics", render.metrics(row.get("metrics"))
    yield "tags", " ".join(row.get("tags") or ())
    yield "note", row.get("note")
    yield "parent", row.get("parent")
    yield "meta", render.json_text(row["meta"]) if row.get("meta") else None
    yield "hot", "a copy is still in memory" if row.get("hot") else None
    yield "not best", "takes no part in best rules" if row.get("update_best") is False else None


def _pairs(facts: Any, screen: Screen, style: str | None = None) -> list[str]:
    return [
        f"  {screen.paint(f'{name:<9}', 'dim')} {screen.paint(escape(value), style)}"
        for name, value in facts
        if value not in (None, "")
    ]


_GRAVE = {"error": "red", "warning": "yellow"}
_PARTS: tuple[tuple[str, str, tuple[Column, ...]], ...] = (
    (
        "files",
        "files",
        (
            Column("FILE", lambda row: row.get("path") or "(the checkpoint itself)"),
            Column("SIZE", lambda row: render.size(row.get("size_bytes")), right=True),
            Column("SHA-256", lambda row: row.get("sha256")),
        ),
    ),
    (
        "holds",
        "holds",
        (
            Column("HELD BY", lambda row: row.get("kind")),
            Column("WHO", lambda row: row.get("by")),
            Column("UNTIL", lambda row: render.moment(row.get("expires_at"))),
            Column("NOTE", lambda row: row.get("note")),
        ),
    ),
    (
        "copies",
        "copies",
        (
            Column("COPY", lambda row: row.get("tier")),
            Column("CHECKED", lambda row: render.age(row.get("checked_at"))),
            Column("WHERE", lambda row: row.get("location")),
        ),
    ),
    (
        "findings",
        "findings",
        (
            Column("FOUND", lambda row: render.moment(row.get("at"))),
            Column("HOOK", lambda row: row.get("hook")),
            Column("IS", lambda row: row.get("level"), style=lambda row: _GRAVE.get(str(row.get("level")), "")),
            Column("WHAT", lambda row: row.get("text")),
        ),
    ),
    (
        "entries of its history",
        "history",
        (
            Column("WHEN", lambda row: render.moment(row.get("at"))),
            Column("WHAT", lambda row: row.get("what"), style=lambda row: str(row.get("what"))),
            Column("WHO", lambda row: row.get("by")),
            Column("DETAIL", lambda row: row.get("detail")),
        ),
    ),
)


def describe_status(body: Row, screen: Screen) -> list[str]:
    """Set the answer of `status` as lines."""
    daemon = body["daemon"]
    head = f"ckptd {daemon.get('version')}, pid {daemon.get('pid')}, up {render.span(daemon.get('uptime_s') or 0)}"
    lines = [screen.paint(escape(head), "bold") + (", draining" if daemon.get("draining") else "")]
    lines += _pairs(_state(body), screen)
    for problem in daemon.get("degraded") or ():
        word, colour = ("degraded", "red") if problem.get("grave", True) else ("warning", "yellow")
        lines.append("  " + screen.paint(escape(f"{word}: {problem.get('what')}: {problem.get('why')}"), colour))
        if problem.get("do"):
            lines.append("    " + escape(f"hint: {problem['do']}"))
    for key, columns in _TABLES:
        rows = list(body.get(key) or ())
        if rows:
            lines += ["", *table(screen, columns, rows)]
    hidden = body.get("experiments_total", 0) - len(body.get("experiments") or ())
    if hidden > 0:
        lines.append(f"and {hidden} more: `ckpt experiments`")
    return lines


def _state(body: Row) -> Iterator[tuple[str, object]]:
    daemon, arenas, jobs, spool = (body.get(part) or {} for part in ("daemon", "arenas", "jobs", "spool"))
    yield "socket", f"{daemon.get('socket')} ({daemon.get('mode')} mode, {daemon.get('connections')} connections)"
    yield "state", daemon.get("state_dir")
    used = f"{render.size(arenas.get('bytes_used'))} of {render.size(arenas.get('bytes_max'))}"
    parts = ", ".join(f"{arenas[word]} {word}" for word in ("leased", "committed", "hot") if word in arenas)
    yield "arenas", f"{used} in {arenas.get('count', 0)}" + (f": {parts}" if parts else "")
    yield "jobs", ", ".join(f"{jobs.get(word, 0)} {word}" for word in ("queued", "running", "parked"))
    if spool.get("files"):
        yield "spool", f"{spool['files']} files, {render.size(spool.get('size_bytes'))}, being taken in"


def _levels(row: Row) -> str:
    return " ".join(f"{count} {word}" for word, count in (row.get("levels") or {}).items() if count)


def _problems(row: Row) -> str:
    return " ".join(f"{count} {word}" for word, count in (row.get("problems") or {}).items() if count)


_TABLES: tuple[tuple[str, tuple[Column, ...]], ...] = (
    (
        "experiments",
        (
            Column("EXPERIMENT", label),
            Column("STATUS", lambda row: row.get("status"), style=lambda row: str(row.get("status"))),
            Column("STEP", lambda row: row.get("last_step"), right=True),
            Column("SEEN", lambda row: render.age(row.get("seen_at"))),
            Column("CHECKPOINTS", _levels),
            Column("PROBLEMS", _problems, style=lambda _: "red"),
        ),
    ),
    (
        "roots",
        (
            Column("ROOT", lambda row: row.get("path")),
            Column("KIND", lambda row: row.get("kind")),
            Column("IS", lambda row: row.get("state"), style=lambda row: str(row.get("state"))),
            Column("SAVES", lambda row: row.get("checkpoints"), right=True),
            Column("SIZE", lambda row: render.size(row.get("size_bytes")), right=True),
            Column("PROBLEM", lambda row: row.get("problem"), style=lambda _: "red"),
        ),
    ),
    (
        "workers",
        (
            Column("WORKER", lambda row: row.get("mount")),
            Column("PID", lambda row: row.get("pid"), right=True),
            Column("IS", lambda row: row.get("state"), style=lambda row: str(row.get("state"))),
            Column("BUSY", lambda row: row.get("busy"), right=True),
            Column("RESTARTS", lambda row: row.get("restarts") or None, right=True),
            Column("LAST ERROR", lambda row: row.get("last_error"), style=lambda _: "red"),
        ),
    ),
    (
        "disk",
        (
            Column("DISK", lambda row: row.get("mount")),
            Column("TYPE", lambda row: row.get("filesystem")),
            Column("FREE", lambda row: render.size(row.get("free_bytes")), right=True),
            Column("OF", lambda row: render.size(row.get("total_bytes")), right=True),
        ),
    ),
)
