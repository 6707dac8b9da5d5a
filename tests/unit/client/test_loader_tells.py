"""What a load tells the daemon: how it went, in one message that nobody waits for; and what it never reads around."""

from types import SimpleNamespace
from typing import Any

import pytest

from ckptd_client import loader as module
from ckptd_client.errors import CorruptCheckpoint, Refused
from ckptd_client.loader import Loader, Wanted
from ckptd_client.reads import Reads

ID = "6f1c0e3a9b7d4c52a1e8f00d5b6c7a89"
LATEST = Wanted("latest", None, None, fallback=False, verify=True)


class Session(SimpleNamespace):
    """A session with a daemon that answers `attach` with `reply`, or raises it."""

    def __init__(self, reply: Any) -> None:
        super().__init__(told=[], resumed_from=None, experiment="e" * 32, connection=self, reply=reply)
        self.reads = Reads(self)  # type: ignore[arg-type]

    def wait_open(self, _timeout_s: float) -> bool:
        return True

    def request(self, _op: str, _timeout_s: float, **_fields: Any) -> Any:
        if isinstance(self.reply, Exception):
            raise self.reply
        return dict(self.reply)

    def tick_within(self, _delay_s: float) -> None:
        """It has no connection's thread."""

    def tell(self, op: str, **fields: Any) -> bool:
        self.told.append((op, fields))
        return False  # no daemon takes it: a load is none the worse for that

    def said(self, op: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.told if name == op]


@pytest.fixture
def session() -> Session:
    return Session({"checkpoint": ID, "path": "/data/run/step_1", "files": [], "hot": False})


def test_a_load_that_worked_is_told_with_its_time(session, monkeypatch):
    """M048."""
    monkeypatch.setattr(module.restore, "read_checkpoint", lambda *_, **__: {"w": 1})
    assert Loader(session).load(LATEST) == {"w": 1}
    [told] = session.said("loaded")
    assert (told["checkpoint"], told["ok"], told["hot"], told["error"]) == (ID, True, False, "")
    assert told["ms"] >= 0


def test_a_load_that_failed_is_told_and_raises_as_it_would_without_a_daemon(session, monkeypatch):
    """M048: the message is cut to what a frame has room for."""

    def damaged(*_: Any, **__: Any) -> None:
        raise CorruptCheckpoint("/data/run/step_1", "model.safetensors", "x" * 10_000)

    monkeypatch.setattr(module.restore, "read_checkpoint", damaged)
    with pytest.raises(CorruptCheckpoint):
        Loader(session).load(LATEST)
    [told] = session.said("loaded")
    assert told["ok"] is False
    assert told["error"].startswith("CorruptCheckpoint: ")
    assert len(told["error"]) == module.ERROR_CHARS_MAX


@pytest.mark.parametrize("act", ["load", "path"])
def test_what_a_hook_forbids_is_not_read_around_it_from_the_disk(monkeypatch, act):
    """M057: another refusal means that the disk is asked; this one does not."""
    session = Session(Refused("vetoed", "hook 'gate': not now"))
    asked: list[str] = []
    monkeypatch.setattr(Loader, "_on_disk", lambda _self, selector: asked.append(selector))
    with pytest.raises(Refused, match="not now"):
        Loader(session).load(LATEST) if act == "load" else Loader(session).path("latest")
    assert asked == []
