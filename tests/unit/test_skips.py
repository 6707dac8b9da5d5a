"""A skipped test must not look like a passed one where everything that it needs is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(directory: Path, body: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run one test file with the hooks, as tests/conftest.py has them."""
    (directory / "test_it.py").write_text(f"import pytest\n\n{body}\n")
    clean = {key: value for key, value in os.environ.items() if key != "CI"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.support.skips",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
    ]
    return subprocess.run(
        [*command, str(directory)], cwd=ROOT, env={**clean, **environ}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "body",
    [
        "def test_it():\n    pytest.skip('torch is not installed')",
        "pytest.importorskip('a_module_that_nobody_has')\n\ndef test_it():\n    pass",
    ],
    ids=["one test", "a whole file"],
)
def test_a_skip_fails_a_run_of_the_ci_and_no_other(tmp_path, body):
    passes = "\n\ndef test_beside():\n    pass"
    found = run(tmp_path, body + passes, CI="true")
    assert found.returncode in {1, 5}, found.stdout  # 5: the whole file was skipped
    assert "skipped where nothing may be" in found.stdout
    assert "skipped where nothing may be" not in run(tmp_path, body + passes).stdout


def test_what_a_container_can_not_have_is_forgiven(tmp_path):
    body = 'def test_it():\n    pytest.skip("can\'t mount a loop device: no such file")'
    assert run(tmp_path, body, CI="true").returncode == 0


def test_a_tool_that_could_not_be_installed_is_forgiven_only_when_that_was_said(tmp_path):
    body = 'def test_it():\n    pytest.skip("no libfaketime")'
    assert run(tmp_path, body, CI="true").returncode == 1
    assert run(tmp_path, body, CI="true", CKPTD_CI_WITHOUT_TOOLS="faketime").returncode == 0


def test_a_failure_stays_a_failure(tmp_path):
    body = "def test_it():\n    pytest.skip('x')\n\ndef test_beside():\n    raise ValueError"
    assert run(tmp_path, body, CI="true").returncode == 1
