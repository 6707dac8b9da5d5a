"""systemd itself, as one user's service manager, over the units that ckptd ships: no fake, no PID 1.

It runs in a mount namespace of its own whose /run says that systemd was booted, which is all that its
user instance asks for. The shipped units are used as they are, with a drop-in as their comments describe.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.support.node import eventually

UNITS = Path(__file__).parents[2] / "systemd" / "user"
MANAGER = Path("/lib/systemd/systemd")
ANSWER_S = 60.0
# The namespace's own /run, as sd_booted(3) looks for it; then the manager takes this process's place. Before that every
# file system on a loop device leaves the namespace: kept in it, one that another test shuts down would never end.
LAUNCH = (
    "grep ^/dev/loop /proc/mounts | cut -d' ' -f2 | xargs -r -n1 umount -l; "
    "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system && "
    f"exec {MANAGER} --user --unit=ckptd.socket --log-target=console"
)


@dataclass
class RealManager:
    """with RealManager(short_directory) as manager: manager.control("start", "ckptd")"""

    dir: Path
    drop_in: dict[str, str] = field(default_factory=dict)  # settings of [Service]
    _process: subprocess.Popen[bytes] | None = None

    @property
    def environ(self) -> dict[str, str]:
        """What every process here gets: the manager, the daemon, trainers, commands."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("CKPTD_", "XDG_", "DBUS_"))}
        places = {
            f"XDG_{name}": str(self.dir / name.partition("_")[0].lower())
            for name in ("RUNTIME_DIR", "CONFIG_HOME", "STATE_HOME")
        }
        return (
            clean
            | places
            | {"DBUS_SESSION_BUS_ADDRESS": f"unix:path={self.dir}/none", "CKPTD_SOCKET": str(self.socket)}
        )

    @property
    def socket(self) -> Path:
        """Where the socket unit listens."""
        return self.dir / "runtime" / "ckptd.sock"

    @property
    def log(self) -> Path:
        """What the manager and its services print."""
        return self.dir / "manager.log"

    @property
    def pid(self) -> int:
        """The service's main process; 0 for none."""
        return int(self.control("show", "-p", "MainPID", "--value", "ckptd.service"))

    def __enter__(self) -> Self:
        units = self.dir / "config" / "systemd" / "user"
        shutil.copytree(UNITS, units)
        for name in ("runtime", "state"):
            (self.dir / name).mkdir(mode=0o700)
        more = units / "ckptd.service.d"
        more.mkdir()
        command = f"{Path(sys.executable).with_name('ckptd')} --log-format json"
        settings = "".join(f"{key}={value}\n" for key, value in self.drop_in.items())
        (more / "here.conf").write_text(
            f"[Service]\nExecStart=\nExecStart={command}\nStandardError=append:{self.dir}/daemon.log\n{settings}"
        )
        with self.log.open("wb") as log:
            words = ["unshare", "--mount", "sh", "-c", LAUNCH]
            self._process = subprocess.Popen(
                words, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        private = self.dir / "runtime" / "systemd" / "private"
        eventually(lambda: private.exists() or self._process.poll() is not None, "the manager to answer")
        return self

    def __exit__(self, *_: object) -> None:
        """It stops every service that it started, and goes."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(ANSWER_S)

    @property
    def runs(self) -> bool:
        """Whether it came up; its log says why not."""
        return self._process is not None and self._process.poll() is None

    def control(self, *words: str) -> str:
        """Run systemctl; AssertionError with what it printed when it fails."""
        command = ["systemctl", "--user", "--no-pager", *words]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=ANSWER_S, check=False)
        assert done.returncode == 0, (
            f"{words}: {done.stdout}{done.stderr}{self.log.read_text(errors='replace')[-4000:]}"
        )
        return done.stdout.strip()

    def ckpt(self, *words: str) -> str:
        """Run a command against the service; AssertionError when it fails."""
        command = [str(Path(sys.executable).with_name("ckpt")), *words]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=ANSWER_S, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout
