"""The HTTP door: read back by Prometheus's own parser, closed to whoever has no token, silent until asked (M088)."""

import importlib
import socket
import stat
import sys

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ckptd import web
from ckptd.config import Settings, Web
from ckptd.intake.premises import web_doors
from tests.support.in_process import Training, daemon, eventually, settings_of

TOKEN = "a token of some length"
CLOSED = "Connection: close\r\nHost: node\r\n"


async def get(place, path: str, *headers: str, method: str = "GET") -> tuple[int, dict[str, str], str]:
    """One request over a Unix socket's path or a (host, port)."""
    stream = await (anyio.connect_unix(str(place)) if not isinstance(place, tuple) else anyio.connect_tcp(*place))
    async with stream:
        more = "".join(f"{header}\r\n" for header in headers)
        await stream.send(f"{method} {path} HTTP/1.1\r\n{CLOSED}{more}\r\n".encode())
        with anyio.fail_after(20):
            received = b"".join([part async for part in stream])
    head, _, body = received.decode().partition("\r\n\r\n")
    first, *rest = head.split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in rest)}, body


def families(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def test_what_was_saved_is_in_the_figures_that_prometheus_reads(short_dir):
    """M088: as text, by the parser of those who scrape it; no id and no name of an experiment is a label."""
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        await training.saved(1)
        await line.ask("attach", selector="latest", project="demo", name="run")
        meter = node.parts.observers.meter
        await eventually(lambda: meter.now()["total"]["counts"].get("checkpoint.verified") == 1)
        status, headers, text = await get(node.directory / "s.web", "/metrics")
        assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        read = families(text)
        assert read["ckptd_events_total"][(("event", "checkpoint.published"),)] == 1
        assert read["ckptd_took_seconds_count"][(("measure", "durable"),)] == 1
        assert read["ckptd_took_seconds_bucket"][(("le", "+Inf"), ("measure", "verified"))] == 1
        assert read["ckptd_written_bytes_total"][()] > 0
        assert sum(read["ckptd_hot_reads_total"].values()) == 1
        assert read["ckptd_rss_bytes"][(("process", "daemon"),)] > 10 << 20
        assert read["ckptd_healthy"][()] == 1
        labels = {label for samples in read.values() for pairs in samples for label, _ in pairs}
        assert labels <= {"event", "measure", "le", "use", "process", "state", "alert", "result", "mount", "version"}
        for secret in (training.experiment, "demo", str(node.runs)):
            assert secret not in text
        buckets = [v for k, v in sorted(read["ckptd_took_seconds_bucket"].items()) if ("measure", "durable") in k]
        assert set(buckets) <= {0.0, 1.0}


async def test_a_probe_is_answered_and_everything_else_is_not_there(short_dir):
    async with daemon(short_dir, front=False) as node:
        door = node.directory / "s.web"
        status, _, body = await get(door, "/healthz")
        assert status == 200
        assert '"well":true' in body
        assert (await get(door, "/"))[0] == 404
        assert (await get(door, "/metrics", method="POST"))[0] == 405
        node.parts.observers.health = lambda: {"well": False, "line": "degraded"}  # type: ignore[method-assign]
        assert stat.S_IMODE(door.stat().st_mode) == 0o660


async def test_what_is_wrong_makes_a_probe_fail(short_dir):
    async with daemon(short_dir, front=False) as node:
        node.parts.vitals.draining = True
        status, _, body = await get(node.directory / "s.web", "/healthz")
        assert status == 503
        assert "the daemon is ending" in body


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def test_over_tcp_nothing_is_answered_without_the_token(short_dir):
    """Not even whether a page exists; the Unix socket's guard is its mode."""
    port = free_port()
    async with daemon(short_dir, front=False, web={"port": port, "token": TOKEN}) as node:
        place = ("127.0.0.1", port)
        for given in (
            (),
            ("Authorization: Bearer wrong",),
            (f"Authorization: {TOKEN}",),
            (f"Authorization: Bearer {TOKEN}x",),
        ):
            for path in ("/metrics", "/healthz", "/nowhere"):
                status, headers, body = await get(place, path, *given)
                assert (status, TOKEN in body) == (401, False)
                assert headers["www-authenticate"].startswith("Bearer")
        twice = (f"Authorization: Bearer {TOKEN}", f"Authorization: Bearer {TOKEN}")
        assert (await get(place, "/metrics", *twice))[0] == 401
        assert (await get(place, "/metrics", f"Authorization: Bearer {TOKEN}"))[0] == 200
        assert (await get(node.directory / "s.web", "/metrics"))[0] == 200


@pytest.mark.parametrize("web", [{"port": 9470}, {"port": 9470, "token": "short"}, {"token": "é" * 20}])
def test_a_port_without_a_good_token_is_no_configuration(web):
    with pytest.raises(ValueError, match=r"web\.(port|token)"):
        Web.model_validate(web)


def test_a_door_that_can_not_be_had_is_left_out_and_the_others_stay(short_dir):
    (short_dir / "s.web").write_text("in the way")
    port = free_port()
    settings = settings_of(short_dir, web={"port": port, "token": TOKEN})
    (tcp,) = web_doors(settings)
    with tcp.sock:
        assert tcp.token == TOKEN
        assert web_doors(settings) == [], "the port is taken now"
    assert (short_dir / "s.web").read_text() == "in the way"
    off = Settings.model_validate({**settings.model_dump(), "web": {"enabled": False}})
    assert web_doors(off) == []


async def test_nothing_that_serves_is_loaded_before_somebody_asks(short_dir):
    """The idle daemon of design 12 does not pay for it; checked in a process of its own."""
    code = (
        "import sys, ckptd.daemon, ckptd.intake.observers;"
        "sys.exit(any(name.split('.')[0] in {'uvicorn', 'starlette', 'prometheus_client'} for name in sys.modules))"
    )
    done = await anyio.run_process([sys.executable, "-c", code], check=False)
    assert done.returncode == 0


async def test_what_could_not_be_loaded_at_first_serves_later(short_dir, monkeypatch):
    """Out of descriptors when it was first asked, the door stayed shut for as long as the daemon lived."""
    real, failed = importlib.import_module, []

    def fails_at_first(name, *more):
        if name == "uvicorn" and len(failed) < 2:
            failed.append(name)
            raise ImportError("libssl.so.3: cannot open shared object file: Too many open files")
        return real(name, *more)

    monkeypatch.setattr(web.importlib, "import_module", fails_at_first)
    monkeypatch.setattr(web, "AGAIN_S", 0.05)
    async with daemon(short_dir) as node:
        assert (await get(node.directory / "s.web", "/metrics"))[0] == 200
    assert len(failed) == 2
