"""Under continuous integration (CI is set) a skipped test is a failure, unless what it lacks can't be had there.

A test that is skipped proves nothing, and says so in a line that nobody reads. tests/conftest.py makes
the two hooks below pytest's own.
"""

import os

import pytest

# What a container of a CI may truly lack. Torch, safetensors and root are not on this list: they are there.
FORGIVEN = (
    "can't mount a loop device",
    "no user namespaces here",
    "no unshare",
)


def unforgiven(reports: list[pytest.TestReport]) -> list[str]:
    """Name every skip that CI must not have, with its reason."""
    found = []
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(words in reason for words in FORGIVEN):
            found.append(f"{report.nodeid}: {reason}")
    return found


def _skipped(config: pytest.Config) -> list[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return unforgiven(reporter.stats.get("skipped", [])) if reporter is not None else []


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Turn a run that would pass into one that fails."""
    if os.environ.get("CI") and exitstatus == pytest.ExitCode.OK and _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which skips made it fail."""
    if os.environ.get("CI") and (found := _skipped(config)):
        terminalreporter.section("skipped where nothing may be", red=True)
        for line in found:
            terminalreporter.line(line)
