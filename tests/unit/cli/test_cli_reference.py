"""The pages made from the verbs are current, and what the command line says is what the daemon understands."""

import json
from pathlib import Path

import pytest

from ckptd import errors
from ckptd.cli import reference
from ckptd.intake import requests
from ckptd_client import wire
from tests.support.documented_wire import documented

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("page", "text"), [(reference.CLI, reference.render_cli()), (reference.EXIT_CODES, reference.render_exit_codes())]
)
def test_the_stored_page_is_what_is_generated(page, text):
    """`python -m ckptd.cli.reference` writes it again."""
    assert (ROOT / page).read_text() == text


def test_every_exit_code_of_an_error_is_explained():
    explained = reference.render_exit_codes()
    for cls in errors.BY_CODE.values():
        (row,) = [line for line in explained.splitlines() if line.startswith(f"| {cls.exit_code} | ")]
        assert f"`{cls.code}`" in row


@pytest.mark.parametrize("op", sorted(documented()[0]))
def test_a_documented_request_is_one_that_the_daemon_decodes(op):
    request = {"id": 1, **documented()[0][op]}
    request = {name: value for name, value in request.items() if value is not None}
    assert requests.decode(wire.encode(request)).__struct_config__.tag == op


def test_every_request_the_command_line_sends_is_one_that_the_daemon_decodes(run, daemon, tmp_path):
    """Fields are checked by the daemon's own decoder, so that neither side drifts from the other."""
    lines = [
        ["status"], ["ls", "--all", "--tag", "t"], ["experiments", "p"], ["show", "latest"], ["path", "best"],
        ["log"], ["log", "--since", "5"], ["log", "--audit"], ["submit", str(tmp_path), "-m", "a=inf"],
        ["wait", "latest"], ["verify", "latest"], ["pin", "latest", "--note", "x"], ["unpin", "latest"],
        ["unveto", "latest", "--note", "x"],
        ["rm", "latest", "--yes"], ["retention", "plan", "p/n"], ["retention", "apply", "--yes"], ["doctor"],
        ["roots"], ["roots", "add", "/x", "-p", "p"], ["watch-root", "/x"], ["rebuild", "/x"], ["reload"],
        ["ls", "--summary"], ["grid", "--tag", "t"], ["recovery", "p/n"], ["stop"],
    ]  # fmt: skip
    for words in lines:
        run(*words)
    ops = {request["op"] for request in daemon.requests}
    assert ops >= {"status", "list", "experiments", "show", "resolve", "events", "audit", "submit", "wait", "verify"}
    assert ops >= {"pin", "unpin", "unveto", "remove", "retention", "doctor", "roots", "root.add", "rebuild", "reload"}
    assert "stop" in ops
    for request in daemon.requests:
        requests.decode(json.dumps(request).encode())
