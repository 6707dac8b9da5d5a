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
    "nothing can be mounted here",
    "no FUSE here",
    "strace attaches to nothing here",
    "the kernel has no PR_SET_MDWE",
)
# Tools that are not Python's: .ci/run installs them, and says in this variable when it could not.
WITHOUT_TOOLS = "CKPTD_CI_WITHOUT_TOOLS"
FORGIVEN_WITHOUT_TOOLS = (
    "no libfaketime",
    "no systemd-analyze",
    "no systemd-sysusers",
    "no systemd-tmpfiles",
    "needs root and FUSE",
    "needs root and mkfs",
    "needs root and strace",
)


def unforgiven(reports: list[pytest.TestReport]) -> list[str]:
    """Name every skip that CI must not have, with its reason."""
    found = []
    forgiven = FORGIVEN + (FORGIVEN_WITHOUT_TOOLS if os.environ.get(WITHOUT_TOOLS) else ())
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(words in reason for words in forgiven):
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
