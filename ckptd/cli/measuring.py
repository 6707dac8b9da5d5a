"""Figures: stats once, top again and again."""

import shutil
import sys
from collections.abc import Iterator
from typing import Any

import click

from ckptd.cli import render
from ckptd.cli.completion import complete_scope
from ckptd.cli.daemon_socket import Daemon, connect
from ckptd.cli.listing import label, parse_scope
from ckptd.cli.options import Output, Span, output, verb
from ckptd.clock import SystemClock
from ckptd.errors import Unreachable
from ckptd.query.statistics import MEASURES

REFRESH_S = 2.0
REFRESH_S_MIN = 0.2
_HOME, _CLEAR_BELOW, _CLEAR_LINE = "\x1b[H", "\x1b[J", "\x1b[K"
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # a screen of its own, without the cursor
MS = 1000.0

Row = dict[str, Any]


@verb(
    ("ckpt stats", "since the daemon started"),
    ("ckpt stats --since 1h", "the last hour"),
    ("ckpt stats imagenet/resnet50", "one experiment: its stalls, and what they cost"),
    ("ckpt stats --json | jq .period.took.stall.p99_s", "for a program"),
)
@click.argument("scope", required=False, metavar="[PROJECT[/EXPERIMENT]]", shell_complete=complete_scope)
@click.option(
    "--since", type=Span(), metavar="SPAN", help="Only what happened since then, such as 1h; at most 24h back."
)
@output()
def stats(scope: str | None, since: float | None, out: Output) -> None:
    """How fast saves are, how much they write, what they cost training.

    Times are counted by the daemon that runs now, to the minute, for 24 h; volumes come from the catalog.
    """
    with connect() as daemon:
        body = daemon.request("stats", {"since_s": since, **parse_scope(scope)})
    if not out.json(body):
        render.print_lines(out.screen, stats_lines(body, out.screen))


def stats_lines(body: Row, screen: render.Screen) -> list[str]:
    """Set the answer of `stats` as lines."""
    since_s, period = body["since_s"], body["period"]
    head = f"the last {render.span(since_s)}" if since_s else f"since the start, {render.span(body['uptime_s'])} ago"
    lines = [screen.paint(head, "bold"), *_facts(body), ""]
    took = [{"what": name, "means": MEASURES[name], **figures} for name, figures in period["took"].items()]
    one = body.get("experiment")
    if one:
        lines.append(screen.paint(render.escape(label(one)), "bold"))
        took = [
            {"what": name, "means": MEASURES[name], **one[name]}
            for name in ("stall", "durable", "verified")
            if one[name]
        ]
    lines += render.table(screen, TOOK, took) if took else ["no save was measured yet"]
    if one:
        lines += ["", *(f"  {line}" for line in _cost(one))]
    if body["experiments"]:
        lines += ["", *render.table(screen, VOLUMES, body["experiments"])]
    return lines


def _facts(body: Row) -> Iterator[str]:
    period, jobs, arenas, memory = body["period"], body["jobs"], body["arenas"], body["memory"]
    counts = period["counts"]
    events = ", ".join(
        f"{counts.get(f'checkpoint.{what}', 0)} {what}"
        for what in ("staged", "found", "published", "verified", "failed", "corrupt")
        if what in {"staged", "published", "verified"} or counts.get(f"checkpoint.{what}")
    )
    seconds = body["since_s"] or body["uptime_s"]
    rate = period["written_bytes"] / max(min(seconds, body["uptime_s"]), 1.0)
    waits = "" if jobs["oldest_s"] is None else f", the oldest for {render.span(jobs['oldest_s'])}"
    yield f"  checkpoints  {events}"
    yield f"  written      {render.size(period['written_bytes'])}, {render.size(int(rate))}/s on average"
    yield f"  jobs         {jobs['queued']} queued, {jobs['running']} running, {jobs['parked']} parked{waits}"
    used, limit = render.size(arenas["bytes_used"]), render.size(arenas["bytes_max"])
    yield f"  arenas       {used} of {limit}; {arenas['waiting']} saves wait for one"
    hot, answers = body["hot"], body["answers"]
    room = f"{render.size(hot['bytes_used'])} of {render.size(hot['bytes_max'])}"
    yield f"  hot copies   {room}; {_rate(hot)} of loads"
    yield f"  answers      {render.size(answers['bytes_used'])} of {render.size(answers['bytes_max'])}; {_rate(answers)} of reads"
    processes = (f"{render.size(memory[f'{who}_rss_bytes'])} {who}" for who in ("daemon", "workers", "clients"))
    yield f"  memory       {', '.join(processes)}; workers were restarted {sum(w['restarts'] for w in body['workers'])} times"


def _rate(counted: Row) -> str:
    asked_for = counted["hits"] + counted["misses"]
    return f"{counted['hits'] / asked_for:.0%} ({counted['hits']} of {asked_for})" if asked_for else "none yet"


def _cost(one: Row) -> Iterator[str]:
    if one["step_s"] is None:
        yield "what saving costs is not known: no steps were logged, or too few"
        return
    yield f"a step takes {_ms({'x': one['step_s']}, 'x')}; saving costs {one['cost']:.2%} of training's time"


def _ms(row: Row, key: str) -> str:
    took_s = row.get(key)
    if took_s is None:
        return ""
    if took_s < 1:
        return f"{took_s * MS:.3g} ms"
    return f"{took_s:.3g} s" if took_s < 1000 else render.span(took_s)  # noqa: PLR2004 - three digits


def _percentiles() -> Iterator[render.Column]:
    for title, key in (("P50", "p50_s"), ("P95", "p95_s"), ("P99", "p99_s"), ("MAX", "max_s")):
        yield render.Column(title, lambda row, key=key: _ms(row, key), right=True)  # type: ignore[misc]


TOOK = (
    render.Column("TIME", lambda row: row["what"]),
    render.Column("COUNT", lambda row: row["count"], right=True),
    *_percentiles(),
    render.Column("MEANS", lambda row: row["means"]),
)
VOLUMES = (
    render.Column("EXPERIMENT", label),
    render.Column("SAVES", lambda row: row["checkpoints"], right=True),
    render.Column("WRITTEN", lambda row: render.size(row["written_bytes"]), right=True),
    render.Column("STALL", lambda row: _ms(row, "stall_p50_s"), right=True),
    render.Column("STEP", lambda row: _ms(row, "step_s"), right=True),
    render.Column("COST", lambda row: "" if row["cost"] is None else f"{row['cost']:.2%}", right=True),
)


@verb(
    ("ckpt top", "until Ctrl-C"),
    ("ckpt top -n 5s", "every five seconds"),
    ("ckpt top --once", "one page, for a script"),
)
@click.option("-n", "--interval", type=Span(), default=REFRESH_S, metavar="SPAN", help="Between two pages; 2s.")
@click.option("--once", is_flag=True, help="Print one page and end.")
@output()
def top(interval: float, out: Output, *, once: bool) -> None:
    """Watch the daemon work: rates, memory, jobs, experiments, disks.

    Where standard output is no terminal, it prints one page.
    """
    with connect() as daemon:
        page = _look(daemon)
        if out.json(page):
            return
        if once or not out.screen.terminal:
            render.print_lines(out.screen, top_lines(page, None, out.screen))
            return
    _watch(page, max(interval, REFRESH_S_MIN), out.screen)


def _look(daemon: Daemon) -> Row:
    """Ask for both answers; `at_s` is ours, so that rates do not depend on the daemon's clock."""
    return {
        "stats": daemon.request("stats", {"since_s": 3600.0}),
        "status": daemon.request("status"),
        "at_s": SystemClock().monotonic_s(),
    }


def _watch(page: Row, interval_s: float, screen: render.Screen) -> None:
    """Draw until interrupted; the terminal is as before afterwards, whatever ends it."""
    import time

    before: Row | None = None
    away = ""
    sys.stdout.write(_ENTER)
    try:
        while True:
            sized = render.Screen(screen.terminal, screen.colour, *shutil.get_terminal_size((80, 24)))
            lines = top_lines(page, before, sized)[: sized.lines - 1] if page else [away, "looking again"]
            sys.stdout.write(_HOME + "".join(f"{line}{_CLEAR_LINE}\n" for line in lines) + _CLEAR_BELOW)
            sys.stdout.flush()
            time.sleep(interval_s)
            before = page or before
            try:
                with connect() as daemon:
                    page = _look(daemon)
            except Unreachable as gone:
                page, away = {}, render.escape(gone.message)
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


def top_lines(page: Row, before: Row | None, screen: render.Screen) -> list[str]:
    """Set one page; with the page before, rates are those since then, else those of the last hour."""
    stats_, status = page["stats"], page["status"]
    daemon = status["daemon"]
    title = f"ckptd {daemon['version']}, up {render.span(daemon['uptime_s'])}, pid {daemon['pid']}"
    lines = [f"{screen.paint(title, 'bold')}   {_speed(page, before)}"]
    lines += [
        f"{screen.paint('fail' if t['grave'] else 'warn', 'fail' if t['grave'] else 'warn')}  "
        f"{render.escape(t['what'])}: {render.escape(t['why'])}"
        for t in daemon["degraded"]
    ]
    lines += ["", *(line.removeprefix("  ") for line in _facts({**stats_, "since_s": 3600.0}))]
    took = [{"what": name, **figures} for name, figures in stats_["period"]["took"].items()]
    if took:
        lines += ["", *render.table(screen, TOOK[:-1], took)]
    running = [row for row in status["experiments"] if row["status"] == "running"]
    if running:
        volumes = {row["experiment"]: row for row in stats_["experiments"]}
        rows = [{**row, "cost": None, **volumes.get(row["experiment"], {})} for row in running]
        lines += ["", *render.table(screen, RUNNING, rows)]
    disks = [{**disk, "workers": _of_mount(status["workers"], disk["mount"])} for disk in status["disk"]]
    if disks:
        lines += ["", *render.table(screen, DISKS, disks)]
    return lines


def _speed(page: Row, before: Row | None) -> str:
    """Return saves and bytes for each second since the page before; "" for the first, or after a restart."""
    if before is None:
        return ""
    passed_s = page["at_s"] - before["at_s"]
    now, then = page["stats"]["total"], before["stats"]["total"]
    saves = now["counts"].get("checkpoint.published", 0) - then["counts"].get("checkpoint.published", 0)
    written = now["written_bytes"] - then["written_bytes"]
    if passed_s <= 0 or saves < 0:
        return ""
    return f"{saves / passed_s:.1f} saves/s, {render.size(int(written / passed_s))}/s"


def _of_mount(workers: list[Row], mount: str) -> str:
    found = [worker for worker in workers if worker["mount"] == mount]
    return ", ".join(f"{w['state']}, {w['busy']} at work, {w['restarts']} restarts" for w in found)


RUNNING = (
    render.Column("RUNNING", label),
    render.Column("STEP", lambda row: row.get("last_step"), right=True),
    render.Column("SEEN", lambda row: render.age(row.get("seen_at"))),
    render.Column("SAVES", lambda row: row.get("checkpoints"), right=True),
    render.Column("WRITTEN", lambda row: render.size(row.get("written_bytes") or 0), right=True),
    render.Column("STALL", lambda row: _ms(row, "stall_p50_s"), right=True),
    render.Column("COST", lambda row: "" if row["cost"] is None else f"{row['cost']:.2%}", right=True),
)
DISKS = (
    render.Column("DISK", lambda row: row["mount"]),
    render.Column("TYPE", lambda row: row["filesystem"]),
    render.Column("FREE", lambda row: render.size(row["free_bytes"]), right=True),
    render.Column("OF", lambda row: render.size(row["total_bytes"]), right=True),
    render.Column("WORKER", lambda row: row["workers"]),
)
