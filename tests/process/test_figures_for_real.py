"""One real node: the figures of real saves, on the command line and over HTTP, and every command of the three guides."""

import json
import os
import pty
import select
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import ckptd_client as ckptd
from tests.support import pages
from tests.support.node import eventually
from tests.support.onlooker import CKPT, Onlooker, end, make

pytestmark = pytest.mark.xdist_group("figures")

RULES = '[alerts]\nlook_s = 0.3\nrss_bytes_max = "1M"\n[retention.keep_best]\nmetric = "val_loss"\nmode = "min"\n'
GUIDES = ("docs/guide/cache.md", "docs/guide/statistics.md", "docs/guide/alerts.md")
SAVES = 4


@pytest.fixture(scope="module")
def node() -> Iterator[Onlooker]:
    """A node on which one experiment has trained for a while, and goes on."""
    made = make(more=RULES)
    try:
        made.configure()
        made.start()
        with pytest.MonkeyPatch.context() as environment:
            for name, value in made.environ.items():
                environment.setenv(name, value)
            run = ckptd.Experiment("resnet50", project="imagenet", dir=str(made.runs))
            state = {"model": {"w": torch.ones(1 << 16)}}
            eventually(lambda: run.prepare(state, wait_s=20.0), "memory")
            for step in range(SAVES * 5):
                run.log({"loss": 1.0}, step=step)
                time.sleep(0.01)
                if step % 5 == 4:
                    run.save(state, step=step, metrics={"val_loss": 1.0 / (step + 1)}).wait("verified", timeout=60)
            run.load("latest")
            run.flush()
            made.wait_idle()
            yield made
            run.close()
    finally:
        end(made)


def get(node: Onlooker, path: str) -> tuple[str, str]:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(30)
        peer.connect(str(node.socket.with_suffix(".web")))
        peer.sendall(f"GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n".encode())
        with peer.makefile("rb") as answer:
            head, _, body = answer.read().decode().partition("\r\n\r\n")
    return head.split()[1], body


def test_stats_say_what_was_saved_and_what_it_cost(node):
    """M088, M089: percentiles of stall and of both rungs, bytes, queue, hit rates, memory, the cost of saving."""
    whole = node.run("stats", "--json").json
    assert whole["period"]["counts"]["checkpoint.verified"] == SAVES
    assert whole["period"]["written_bytes"] >= SAVES * (4 << 16)
    took = whole["period"]["took"]
    assert set(took) == {"stall", "durable", "verified", "write", "hash"}
    assert all(figures["count"] == SAVES for figures in took.values())
    assert all(0 <= f["min_s"] <= f["p50_s"] <= f["p95_s"] <= f["p99_s"] <= f["max_s"] for f in took.values())
    assert took["durable"]["p50_s"] <= took["verified"]["max_s"]
    assert whole["hot"]["hits"] == 1
    assert whole["memory"]["daemon_rss_bytes"] > 10 << 20
    assert whole["memory"]["workers_rss_bytes"] > 10 << 20
    (row,) = whole["experiments"]
    assert (row["checkpoints"], row["name"]) == (SAVES, "resnet50")
    one = node.run("stats", "imagenet/resnet50", "--json").json["experiment"]
    assert (one["stall"]["count"], one["durable"]["count"], one["verified"]["count"]) == (SAVES, SAVES, SAVES)
    assert 0 < one["cost"] < 1
    assert one["step_s"] > 0.01
    assert node.run("stats", "--since", "1h", "--json").json["period"]["counts"] == whole["period"]["counts"]
    text = node.run("stats", "imagenet/resnet50").out
    assert "saving costs" in text
    missing = node.run("stats", "imagenet/nothing")
    assert missing.code == 3
    assert "[not_found]" in missing.err


def test_prometheus_reads_the_same_figures(node):
    """M088."""
    status, text = get(node, "/metrics")
    assert status == "200"
    samples = {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    whole = node.run("stats", "--json").json["total"]
    assert samples["ckptd_events_total", (("event", "checkpoint.published"),)] == SAVES
    assert samples["ckptd_written_bytes_total", ()] == whole["written_bytes"]
    assert samples["ckptd_took_seconds_count", (("measure", "stall"),)] == SAVES
    assert samples["ckptd_rss_bytes", (("process", "workers"),)] > 10 << 20
    status, body = get(node, "/healthz")
    probe = node.run("status", "--probe", "--json").json  # a node for tests has its fail points armed: that is not well
    assert json.loads(body)["well"] is probe["well"]
    assert status == ("200" if probe["well"] else "503")


def test_an_alert_is_seen_everywhere_while_it_lasts(node):
    """M089, M202: the daemon's memory is over the limit of this configuration; a reload with another one ends it."""
    raised = eventually(lambda: node.events("alert.raised"), "the alert to be told")
    assert [event["data"]["alert"] for event in raised] == ["rss"]
    assert "alert rss: the daemon uses" in node.run("doctor", "-q").out
    assert "alert rss" in node.run("status").out
    assert "alert rss" in node.run("top", "--once").out
    node.configure(RULES.replace('"1M"', '"1T"'))
    assert node.run("reload").code == 0
    eventually(lambda: node.events("alert.cleared"), "its end to be told")
    assert "alert" not in node.run("doctor", "-q").out
    assert len(node.events("alert.raised")) == 1


def test_top_shows_jobs_experiments_memory_and_disks_on_one_page(node):
    page = node.run("top", "--once").out
    for word in ("imagenet/resnet50", "arenas", "hot copies", "P99", "DISK", "jobs"):
        assert word in page, page
    body = node.run("top", "--once", "--json").json
    assert body["status"]["experiments_total"] == 1


def test_top_renews_its_page_and_leaves_the_terminal_as_it_was(node):
    ours, theirs = pty.openpty()
    environment = {**node.shell, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    command = [str(CKPT), "top", "-n", "200ms"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as top:
        os.close(theirs)
        seen = b""

        def pages_shown() -> bool:
            nonlocal seen
            if select.select([ours], [], [], 0)[0]:
                seen += os.read(ours, 1 << 16)
            return seen.count(b"\x1b[H") >= 3

        eventually(pages_shown, "three pages")
        top.send_signal(signal.SIGINT)
        assert top.wait(timeout=60) == 130
    with suppress(OSError):  # the end of a terminal that nobody writes to any more
        while chunk := os.read(ours, 1 << 16):
            seen += chunk
    os.close(ours)
    assert seen.startswith(b"\x1b[?1049h")
    assert b"\x1b[?25h\x1b[?1049l" in seen
    assert b"saves/s" in seen
    assert b"Traceback" not in seen


def test_every_command_of_the_guides_works_on_a_real_node(node):
    said = {}
    for path in GUIDES:
        for line in "\n".join(pages.blocks(path, "sh")).splitlines():
            command = line.partition("#")[0].partition("|")[0].strip()
            if not command:
                continue
            done = node.run(*shlex.split(command)[1:])
            looks = command.startswith(("ckpt doctor", "ckpt status --probe"))
            assert done.code in ({0, 1} if looks else {0}), (path, line, done)
            said[command] = done.out
    assert len(said) >= 10
    assert said["ckpt config show"].count(f'web.socket = "{os.fspath(node.socket.with_suffix(".web"))}"') == 1
    assert said["ckpt cache ls"] == ""
