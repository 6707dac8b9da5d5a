"""Makes the environment that the peers live in, apart from the one that ckptd lives in."""

import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).with_name("peers.txt")
REPOSITORY = Path(__file__).parents[2]
INSTALL_S_MAX = 1200.0


def read_pins() -> dict[str, list[str]]:
    """Return the requirements of each peer, in the order of the file."""
    pins = {}
    for line in PINS.read_text().splitlines():
        name, colon, requirements = line.partition(":")
        if colon and not name.startswith("#"):
            pins[name] = requirements.split()
    return pins


def _install(python: Path, requirements: list[str]) -> str:
    """Install, keeping torch at its pin; return pip's last words when it can't."""
    torch = read_pins()["torch"]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements, *torch]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S_MAX, check=False)
    except subprocess.TimeoutExpired:
        return f"pip took longer than {INSTALL_S_MAX:.0f} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]


def set_up(folder: Path) -> tuple[Path, dict[str, str]]:
    """Return the environment's python, and why each peer that could not be installed is missing.

    Installed peers are noted in a file there, so that a second run starts at once.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    missing = {}
    for name, requirements in {**read_pins(), "ckptd-client": ["-e", str(REPOSITORY / "client")]}.items():
        note = folder / f"installed-{name}"
        wanted = " ".join(requirements)
        if note.exists() and note.read_text() == wanted:
            continue
        print(f"installing {name}: {wanted}", flush=True)
        problem = _install(python, requirements)
        if problem:
            missing[name] = problem
        else:
            note.write_text(wanted)
    return python, missing
