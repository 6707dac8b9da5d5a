"""Webhooks and mail, against real servers on this machine that behave badly."""

import contextlib
import hashlib
import hmac
import json
import socket
import threading
import time
from dataclasses import replace

import anyio
import pytest

from ckptd.clock import SystemClock
from ckptd.errors import TimedOut
from ckptd.hooks import letter
from ckptd.hooks.mail import Mailing
from ckptd.hooks.result import Outcome, Run
from ckptd.hooks.spec import Kind, Spec
from tests.unit.hooks.conftest import SAVED, context

PLENTY_S = 60.0
BOUND_S = 20.0  # far below PLENTY_S, far above a timeout of 0.3 s on a machine that stands for some seconds


class Server:
    """Listens on loopback; each connection gets the next script, a function of the socket's file. Keeps what it read."""

    def __init__(self, *scripts):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.scripts, self.seen, self.open = list(scripts), [], []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                sock.settimeout(PLENTY_S)
                self.open.append(sock)
                script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                with contextlib.suppress(OSError):
                    script(self, sock, sock.makefile("rb"))

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for sock in self.open:
            sock.close()
        self.thread.join(PLENTY_S)


@pytest.fixture
def serve():
    made = []

    def start(*scripts):
        made.append(Server(*scripts))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(letter, "PAUSE_S", 0.01)


def answer(status, body=b"", *headers):
    """An HTTP answer; the request is read first."""

    def script(server, sock, file):
        line = file.readline().decode()
        found = {}
        while (text := file.readline().decode().strip()) != "":
            key, _, value = text.partition(": ")
            found[key.lower()] = value
        server.seen.append((line, found, file.read(int(found["content-length"]))))
        head = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body)}", *headers, "", ""]
        sock.sendall("\r\n".join(head).encode() + body)
        sock.close()

    return script


def hang(server, sock, file):
    server.seen.append("hang")


def refuse(server, sock, file):
    server.seen.append("refuse")
    sock.close()


def drip(server, sock, file):
    """Answer a byte at a time, each well within the timeout."""
    server.seen.append("drip")
    sock.sendall(b"HTTP/1.1 200 x\r\nX: ")
    for _ in range(int(PLENTY_S / 0.05)):
        sock.sendall(b"x")
        time.sleep(0.05)


def webhook(port, *, timeout_s=30.0, **options):
    target = f"http://127.0.0.1:{port}/hook?a=b"
    return Spec(name="w", kind=Kind.WEBHOOK, target=target, events=(SAVED,), timeout_s=timeout_s, options=options)


async def send(spec, **data):
    now = SystemClock().now()
    told = letter.Letter(context(SAVED, **data), spec, SystemClock())
    return await letter.send(Run("w", SAVED, "k", now, Outcome.OK), told, anyio.CapacityLimiter(1))


async def test_a_webhook_is_signed_so_that_forged_and_old_ones_can_be_told(serve, tmp_path):
    """HMAC-SHA256 over timestamp, a dot and the body, under the key in a file of its own."""
    secret = tmp_path / "secret"
    secret.write_text("k3y\n")
    secret.chmod(0o600)
    server = serve(answer(200, b"thanks\n"))
    run = await send(webhook(server.port, secret_file=str(secret), headers={"X-Team": "a"}), loss=float("inf"))
    assert (run.outcome, run.output, run.attempts) == (Outcome.OK, "200 thanks", 1)
    ((line, headers, body),) = server.seen
    assert line == "POST /hook?a=b HTTP/1.1\r\n"
    signed = hmac.new(b"k3y", headers["ckptd-timestamp"].encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers["ckptd-signature"] == f"v1={signed}"
    assert abs(int(headers["ckptd-timestamp"]) - time.time()) < 60
    assert (headers["idempotency-key"], headers["ckptd-event"], headers["x-team"]) == (f"{SAVED}:17", str(SAVED), "a")
    assert json.loads(body)["data"]["loss"] == "Infinity"
    assert b"k3y" not in body


async def test_a_server_in_trouble_is_asked_again_and_a_fine_one_once(serve):
    server = serve(answer(500), refuse, answer(429), answer(201))
    run = await send(webhook(server.port))
    assert (run.outcome, run.attempts, len(server.seen)) == (Outcome.OK, 4, 4)
    keys = {seen[1]["idempotency-key"] for seen in server.seen if seen != "refuse"}
    assert len(keys) == 1, "the same fact, whichever attempt it is"


async def test_attempts_end_after_their_number(serve):
    server = serve(answer(503, b"down"))
    run = await send(webhook(server.port, retries_max=2))
    assert (run.outcome, run.error, run.attempts) == (Outcome.FAILED, "the server answered 503: down", 3)
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("status", "said"), [(302, "redirects are never followed"), (307, "redirects"), (404, "answered 404"), (401, "401")]
)
async def test_a_redirect_is_never_followed_and_a_refusal_not_repeated(serve, status, said):
    elsewhere = serve(answer(200))
    server = serve(answer(status, b"", f"Location: http://127.0.0.1:{elsewhere.port}/"))
    run = await send(webhook(server.port))
    assert (run.outcome, said in run.error, run.attempts) == (Outcome.FAILED, True, 1)
    assert elsewhere.seen == []


@pytest.mark.parametrize("script", [hang, drip])
async def test_a_server_that_hangs_or_drips_holds_nothing_longer_than_the_timeout(serve, script):
    """M056: a fraction of a second, over all of the exchange and not over each read."""
    server = serve(script)
    began_s = time.monotonic()
    run = await send(webhook(server.port, timeout_s=0.3, retries_max=0))
    assert (run.outcome, run.error) == (Outcome.TIMEOUT, "no answer within 0.3 s")
    assert time.monotonic() - began_s < BOUND_S
    with anyio.fail_after(BOUND_S):  # the thread ends, too
        while letter._threads.running:
            await anyio.sleep(0.02)


async def test_a_dead_server_keeps_nobody_else_waiting(serve, monkeypatch):
    """Between two attempts it has no turn: with one turn for all, a healthy webhook is told meanwhile."""
    for pause in ("PAUSE_S", "PAUSE_S_MAX"):
        monkeypatch.setattr(letter, pause, PLENTY_S)
    dead, healthy = serve(answer(503)), serve(answer(200))
    turns, now = anyio.CapacityLimiter(1), SystemClock().now()
    told = [letter.Letter(context(SAVED), webhook(server.port), SystemClock()) for server in (dead, healthy)]
    run = Run("w", SAVED, "k", now, Outcome.OK)
    async with anyio.create_task_group() as group:
        group.start_soon(letter.send, run, told[0], turns)
        while not dead.seen:
            await anyio.sleep(0.01)
        with anyio.fail_after(BOUND_S):
            assert (await letter.send(run, told[1], turns)).outcome is Outcome.OK
        group.cancel_scope.cancel()


async def test_nobody_there_is_a_failure_after_every_attempt():
    with socket.socket() as nobody:  # bound, so that nobody else gets the port, and never listening
        nobody.bind(("127.0.0.1", 0))
        run = await send(webhook(nobody.getsockname()[1], retries_max=1))
    assert (run.outcome, run.attempts) == (Outcome.FAILED, 2)
    assert "ConnectionRefusedError" in run.error


async def test_an_endless_answer_is_not_read_to_its_end(serve):
    server = serve(answer(200, b"x" * (8 << 20)))
    run = await send(webhook(server.port))
    assert (run.outcome, len(run.output) < 1000) == (Outcome.OK, True)


async def test_a_server_without_a_valid_certificate_is_not_told_anything(serve):
    server = serve(refuse)
    spec = replace(webhook(server.port, retries_max=0), target=f"https://127.0.0.1:{server.port}/")
    assert (await send(spec)).outcome is Outcome.FAILED


@pytest.mark.parametrize("mode", [0o644, 0o640, None])
async def test_a_secret_that_others_could_read_is_not_used(serve, tmp_path, mode):
    server, secret = serve(answer(200)), tmp_path / "secret"
    if mode is not None:
        secret.write_text("k")
        secret.chmod(mode)
    run = await send(webhook(server.port, secret_file=str(secret)))
    assert (run.outcome, "secret file" in run.error, run.attempts) == (Outcome.FAILED, True, 1)
    assert server.seen == []


async def test_a_header_can_not_be_smuggled_in(serve):
    server = serve(answer(200))
    run = await send(webhook(server.port, headers={"X-A": "1\r\nX-B: 2"}))
    assert (run.outcome, "no header may hold" in run.error) == (Outcome.FAILED, True)


def smtp(*, greeting="220 hi", rcpt="250 ok"):
    """A mail server that keeps what it is given."""

    def script(server, sock, file):
        def say(text):
            sock.sendall(text.encode() + b"\r\n")

        say(greeting)
        while line := file.readline():
            word = line.split()[0].upper()
            if word == b"DATA":
                say("354 go")
                lines = []
                while (line := file.readline()) != b".\r\n":
                    lines.append(line)
                server.seen.append(b"".join(lines).decode())
                say("250 taken")
            elif word == b"QUIT":
                say("221 bye")
                sock.close()
                return
            else:
                say(rcpt if word == b"RCPT" else "250 ok")

    return script


def mail(port, *, timeout_s=30.0, **options):
    options = {"sender": "ckptd@example.org", "to": ["a@example.org", "b@example.org"], **options}
    target = f"smtp://127.0.0.1:{port}"
    return Spec(name="m", kind=Kind.MAIL, target=target, events=(SAVED,), timeout_s=timeout_s, options=options)


async def test_a_mail_says_what_happened_and_can_be_recognised_when_it_comes_twice(serve):
    server = serve(smtp())
    for _ in range(2):
        run = await send(mail(server.port), name="run\r\nBcc: x@example.org", loss=0.5)
        assert (run.outcome, run.output) == (Outcome.OK, "taken for a@example.org, b@example.org")
    first, second = server.seen
    head, _, body = first.partition("\r\n\r\n")
    assert "Subject: [ckptd] checkpoint.published p/run Bcc: x@example.org step 7" in head.replace("\r\n ", " ")
    assert "\r\nBcc:" not in head
    assert "loss: 0.5" in body
    ids = {next(line for line in text.splitlines() if line.startswith("Message-ID")) for text in (first, second)}
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("given", "attempts", "said"),
    [({"rcpt": "550 no such user"}, 1, "550"), ({"rcpt": "450 later"}, 3, "450"), ({"greeting": "421 busy"}, 3, "421")],
)
async def test_a_mail_server_is_asked_again_only_where_that_can_help(serve, given, attempts, said):
    server = serve(smtp(**given))
    run = await send(mail(server.port, retries_max=2))
    assert (run.outcome, run.attempts, said in run.error) == (Outcome.FAILED, attempts, True)


async def test_a_mail_server_that_hangs_or_drips_is_left_in_time(serve):
    def drip(server, sock, file):
        for _ in range(int(PLENTY_S / 0.05)):
            sock.sendall(b"2")
            time.sleep(0.05)

    for script in (hang, drip):
        began_s = time.monotonic()
        run = await send(mail(serve(script).port, timeout_s=0.3, retries_max=0))
        assert run.outcome is Outcome.TIMEOUT
        assert time.monotonic() - began_s < BOUND_S


def test_a_mail_server_that_is_silent_for_too_long_is_late_and_not_gone(serve):
    """The mail library tells of its own limit as of a lost connection; whoever looks first must not decide what it was."""
    with pytest.raises(TimedOut, match=r"no answer within 0\.3 s"):
        Mailing(mail(serve(hang).port, timeout_s=0.3), context()).run()


async def test_a_mail_that_must_be_encrypted_is_not_sent_in_the_clear(serve):
    server = serve(smtp())
    run = await send(mail(server.port, starttls=True))
    assert (run.outcome, "STARTTLS" in run.error) == (Outcome.FAILED, True)
    assert server.seen == []
