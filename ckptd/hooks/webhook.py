"""One POST of one fact: signed, never redirected, its answer bounded. Blocking; runs in a thread of letter.py.

The body is the context as JSON with the hook's name. With a secret the headers carry

    Ckptd-Timestamp   seconds since 1970, decimal
    Ckptd-Signature   "v1=" and the hex HMAC-SHA256 of timestamp + "." + body

so that a receiver can refuse what is forged and what is old. Idempotency-Key is the context's key.
"""

import contextlib
import hashlib
import hmac
import http.client
import re
import socket
import ssl
from urllib.parse import urlsplit

from ckptd import __version__
from ckptd.errors import BadConfig, Busy, Refused, TimedOut
from ckptd.hooks import secret
from ckptd.hooks.context import Context
from ckptd.hooks.spec import Spec

ANSWER_BYTES_MAX = 16 << 10  # read of an answer's body; the rest is left unread
SHOWN_CHARS_MAX = 500
_SUCCESS, _REDIRECT, _SERVER_ERROR = 2, 3, 5  # hundreds of a status
_AGAIN = {408, 425, 429}  # beside all of 5xx: another attempt may help
_HEADER = re.compile(r"[\x20-\x7e]*")


def signature(key: bytes, timestamp: str, body: bytes) -> str:
    """Return the value of Ckptd-Signature."""
    return "v1=" + hmac.new(key, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class Posting:
    """One attempt to post."""

    def __init__(self, spec: Spec, context: Context, timestamp_s: int) -> None:
        """Post `context` to the hook's URL."""
        self._spec = spec
        self._context = context
        self._timestamp = str(timestamp_s)
        self._connection: http.client.HTTPConnection | None = None
        self._aborted = False

    def run(self) -> str:
        """Post; return the status and the beginning of the answer.

        Busy or TimedOut when another attempt may help, Refused when it can't, BadConfig for a secret file.
        """
        body = self._context.to_json(hook=self._spec.name).rstrip(b"\n")
        headers = self._headers(body)
        url = urlsplit(self._spec.target)
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection = self._connection = self._connect(url.scheme, url.hostname or "", url.port)
        try:
            connection.connect()
            if self._aborted:  # while there was no socket yet that could have been shut down
                raise TimedOut("given up while connecting")
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            said = answer.read(ANSWER_BYTES_MAX)
        except TimeoutError as error:
            raise TimedOut(f"no answer within {self._spec.timeout_s:g} s") from error
        except ssl.SSLCertVerificationError as error:
            raise Refused(f"the server's certificate is not valid: {error.verify_message}") from error
        except (OSError, http.client.HTTPException) as error:
            raise Busy(f"no answer: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        return _judge(answer.status, answer.getheader("Location") or "", said)

    def abort(self) -> None:
        """End the connection under whoever reads from it."""
        self._aborted = True
        sock = self._connection.sock if self._connection else None
        if sock is not None:
            with contextlib.suppress(OSError):  # closed already
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _connect(self, scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
        timeout_s = self._spec.timeout_s
        if scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=timeout_s)
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=trust(self._spec))

    def _headers(self, body: bytes) -> dict[str, str]:
        extra = self._spec.options.get("headers") or {}
        headers = {
            **{str(key): str(value) for key, value in extra.items()},
            "Content-Type": "application/json",
            "User-Agent": f"ckptd/{__version__}",
            "Idempotency-Key": self._context.key,
            "Ckptd-Event": self._context.event,
            "Ckptd-Timestamp": self._timestamp,
            "Connection": "close",
        }
        path = self._spec.options.get("secret_file")
        if path:
            headers["Ckptd-Signature"] = signature(secret.read(path), self._timestamp, body)
        for key, value in headers.items():
            if not _HEADER.fullmatch(key + value):
                raise BadConfig(f"the header {key!r} holds what no header may hold")
        return headers


def trust(spec: Spec) -> ssl.SSLContext:
    """Return how a server's certificate is checked: against ca_file, or what the machine trusts. Blocks. BadConfig."""
    path = spec.options.get("ca_file")
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:  # ssl.SSLError is one
        raise BadConfig(f"ca_file {path!r} can't be used: {error}") from error


def _judge(status: int, location: str, said: bytes) -> str:
    """Return what is shown of a good answer. Busy when another attempt may help, Refused when it can't."""
    shown = " ".join(said.decode("utf-8", "replace").split())[:SHOWN_CHARS_MAX]
    hundred = status // 100
    if hundred == _SUCCESS:
        return f"{status} {shown}".strip()
    if hundred == _SERVER_ERROR or status in _AGAIN:
        raise Busy(f"the server answered {status}: {shown}")
    if hundred == _REDIRECT:
        raise Refused(f"the server answered {status} and points to {location[:200]!r}: redirects are never followed")
    raise Refused(f"the server answered {status}: {shown}")
