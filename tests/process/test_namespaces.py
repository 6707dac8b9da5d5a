"""A daemon that can't see who asks: it has a pid namespace of its own, as a container has. Saves still arrive, whole."""

import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import ckptd_client as ckptd
from tests.support.node import Node
from tests.support.saving import state

PATIENCE_S = 60.0


def another_namespace() -> tuple[str, ...]:
    """A command prefix that runs a program where no process outside of it can be seen; skips where that can't be had."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare")
    plain = (unshare, "--pid", "--fork", "--kill-child", "--mount-proc")
    for prefix in (plain, (*plain, "--user", "--map-root-user")):
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    pytest.skip("no user namespaces here, and no right to make a pid namespace")


def test_a_trainer_in_another_pid_namespace_saves_through_the_spool_and_loads_from_the_disk(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Memory that was lent to it would be lent on when its connection breaks, whoever still writes there."""
    node.prefix = another_namespace()
    node.start()
    for name, value in node.environ.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING), ckptd.Experiment("net", project="far", dir=Path(node.runs)) as run:
        for step in (1, 2):
            handle = run.save(state(step), step=step)
            assert handle.wait("verified", timeout=PATIENCE_S), handle.error
            assert handle.spooled
        assert node.status()["arenas"]["leased"] == 0
        loaded = run.load("latest")
    assert torch.equal(loaded["model"]["w"], state(2)["model"]["w"])
    assert "--pid=host" in caplog.text, "what to do about it is said where somebody reads it"
