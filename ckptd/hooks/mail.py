"""One mail about one fact, through a server. Blocking; runs in a thread of letter.py.

Encrypted unless the server is this machine; certificates are checked. The Message-ID comes from the
context's key, so a mail that is sent twice can be recognised.
"""

import contextlib
import hashlib
import smtplib
import socket
import ssl
from email.message import EmailMessage
from urllib.parse import urlsplit

from ckptd.errors import BadConfig, Busy, CkptdError, Refused, TimedOut
from ckptd.hooks import accept, secret
from ckptd.hooks.context import Context
from ckptd.hooks.spec import Spec
from ckptd.hooks.webhook import trust

SUBJECT_CHARS_MAX = 200
LINE_CHARS_MAX = 500
_GREETING, _PASSING = 220, 4  # a code; the hundreds of those after which another attempt may help
_PORTS = {"smtp": 25, "smtps": 465}


class Mailing:
    """One attempt to send."""

    def __init__(self, spec: Spec, context: Context) -> None:
        """Send `context` to the hook's addresses."""
        self._spec = spec
        self._context = context
        self._server: smtplib.SMTP | None = None

    def run(self) -> str:
        """Send; return how many took it. Busy or TimedOut when another attempt may help, Refused or BadConfig else."""
        try:
            return self._send()
        except TimeoutError as error:
            raise TimedOut(f"no answer within {self._spec.timeout_s:g} s") from error
        except ssl.SSLCertVerificationError as error:
            raise Refused(f"the server's certificate is not valid: {error.verify_message}") from error
        except smtplib.SMTPException as error:
            if isinstance(error.__context__, TimeoutError):  # smtplib calls it a connection that was closed
                raise TimedOut(f"no answer within {self._spec.timeout_s:g} s") from error
            raise _judge(error) from error
        except OSError as error:
            raise Busy(f"no answer: {type(error).__name__}: {error}") from error
        finally:
            if self._server is not None:
                self._server.close()

    def abort(self) -> None:
        """End the connection under whoever reads from it."""
        sock = self._server.sock if self._server else None
        if sock is not None:
            with contextlib.suppress(OSError):  # closed already
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _send(self) -> str:
        url, options = urlsplit(self._spec.target), self._spec.options
        host, port = url.hostname or "", url.port or _PORTS[url.scheme]
        message = letter(self._spec, self._context)
        # Our own name is not looked up: a resolver may hang for longer than any timeout here.
        timeout_s, name = self._spec.timeout_s, socket.gethostname()
        server: smtplib.SMTP
        if url.scheme == "smtps":
            server = smtplib.SMTP_SSL(local_hostname=name, timeout=timeout_s, context=trust(self._spec))
        else:
            server = smtplib.SMTP(local_hostname=name, timeout=timeout_s)
        self._server = server
        server._host = host  # type: ignore[attr-defined]  # noqa: SLF001 - what TLS checks the certificate against
        code, said = server.connect(host, port)
        if code != _GREETING:
            raise smtplib.SMTPConnectError(code, said)
        if url.scheme == "smtp" and options.get("starttls", not accept.is_here(host)):
            server.starttls(context=trust(self._spec))
        if options.get("user"):
            path = options.get("password_file")
            if not path:
                raise BadConfig("options.user needs options.password_file")
            server.login(str(options["user"]), secret.read(path).decode())
        refused = server.send_message(message)
        with contextlib.suppress(smtplib.SMTPException, OSError):  # it is delivered, however they part
            server.quit()
        if refused:
            raise Refused(f"refused for {', '.join(sorted(refused))}, taken for the others")
        return f"taken for {message['To']}"


def letter(spec: Spec, context: Context) -> EmailMessage:
    """Return the mail. BadConfig for addresses that are none."""
    options, data = spec.options, context.data
    to = options["to"]
    about = "/".join(str(data[key]) for key in ("project", "name") if data.get(key))
    step = f" step {data['step']}" if data.get("step") is not None else ""
    subject = f"{options.get('subject', '[ckptd]')} {context.event} {about}{step}"
    message = EmailMessage()
    try:
        message["From"] = str(options["sender"])
        message["To"] = ", ".join(to) if isinstance(to, list | tuple) else str(to)
        message["Subject"] = " ".join(subject.split())[:SUBJECT_CHARS_MAX]
    except ValueError as error:
        raise BadConfig(f"options: {error}") from error
    message["Message-ID"] = f"<{hashlib.sha256(f'{spec.name} {context.key}'.encode()).hexdigest()[:40]}@ckptd>"
    message["Auto-Submitted"] = "auto-generated"  # so that nobody's absence is answered to the daemon
    lines = [f"{key}: {value}"[:LINE_CHARS_MAX] for key, value in context.to_wire().items() if key != "data" and value]
    lines += [f"{key}: {value}"[:LINE_CHARS_MAX] for key, value in data.items()]
    message.set_content("\n".join(" ".join(line.split()) for line in lines) + "\n")
    return message


def _judge(error: smtplib.SMTPException) -> CkptdError:
    if isinstance(error, smtplib.SMTPServerDisconnected):
        return Busy(f"no answer: {error}")
    codes = [error.smtp_code] if isinstance(error, smtplib.SMTPResponseException) else []
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        codes = [code for code, _ in error.recipients.values()]
    text = f"the mail server answered {type(error).__name__}: {error}"
    return Busy(text) if codes and all(code // 100 == _PASSING for code in codes) else Refused(text)
