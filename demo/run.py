"""The demonstration, `make demo`: a training that nothing can stop, in about two minutes.

    1  a daemon of its own, a training that saves every few seconds, a legacy script beside it that only
       knows torch.save, and the same training once more without any saving: the curve to compare with
    2  SIGKILL for the trainer, right after a save has returned
    3  it starts again from the newest verified checkpoint
    4  SIGKILL for the daemon, while it is writing a checkpoint
    5  the curve, compared number by number; the table of what became of every checkpoint

Everything is under .demo/; exit status 0 only when the curves are equal and nothing was lost.
"""

import json
import os
import queue
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

from processes import Process, Processes
from rich.console import Console
from table import Stall, fates, show

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / ".demo"
BIN = Path(sys.executable).parent
STEPS, SAVE_EVERY, KILL_TRAINER_AT, KILL_DAEMON_FROM = 320, 20, 120, 200
LEGACY_SAVES, LEGACY_EVERY_S = 4, 6.0
PATIENCE_S = 120.0
POLL_S = 0.001

CONFIG = """\
[watching]
reconcile_s = "5s"
quiet_s = "2s"

[retention]
keep_last = 3
keep_every = 100
keep_best = {{ metric = "val_loss", mode = "min", k = 1 }}

[[roots]]
path = "{legacy}"
kind = "watched"
project = "legacy"
"""

WIDTH_PIPED = 120

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH_PIPED)


class Story:
    """Runs the five acts; keeps what the trainer said."""

    def __init__(self, processes: Processes) -> None:
        """Nothing has happened yet."""
        self._processes = processes
        self._begun = time.monotonic()
        self.losses: dict[int, float] = {}
        self.stalls: dict[int, Stall] = {}
        self.daemon_killed_at: int | None = None
        self.healed = False

    def tell(self, text: str) -> None:
        """Print one line of progress."""
        console.print(f"[dim]{time.monotonic() - self._begun:5.1f} s[/]  {text}")

    def ckpt(self, *arguments: str) -> Any:
        """Ask the daemon through `ckpt`, as a person would, and return its JSON."""
        return json.loads(self._processes.call(str(BIN / "ckpt"), *arguments, "--json"))

    def start_daemon(self) -> None:
        """Start `ckptd` and wait until it answers."""
        self._processes.start(str(BIN / "ckptd"), "--config", str(DEMO / "ckptd.toml"))
        until = time.monotonic() + PATIENCE_S
        while not Path(os.environ["CKPTD_SOCKET"]).exists():
            assert time.monotonic() < until, "the daemon did not start"
            time.sleep(0.05)
        self.tell(f"daemon up: pid {self.ckpt('status')['daemon']['pid']}")

    def start_training(self, *extra: str) -> Process:
        """Start the trainer."""
        arguments = ["--dir", str(DEMO), "--steps", str(STEPS), "--save-every", str(SAVE_EVERY), *extra]
        return self._processes.start(sys.executable, str(HERE / "train.py"), *arguments)

    def start_legacy(self) -> Process:
        """Start the script that knows nothing of ckptd."""
        arguments = ["--dir", str(DEMO / "legacy"), "--saves", str(LEGACY_SAVES), "--every-s", str(LEGACY_EVERY_S)]
        return self._processes.start(sys.executable, str(HERE / "legacy.py"), *arguments)

    def follow(self, trainer: Process, *, kill_daemon: bool = False) -> None:
        """Record what the trainer says until it ends, and show its progress."""
        while (said := trainer.next(PATIENCE_S)) is not None:
            if said["event"] == "step":
                self.losses[said["step"]] = said["loss"]
                saves_next = (said["step"] + 1) % SAVE_EVERY == 0
                if kill_daemon and saves_next and said["step"] > KILL_DAEMON_FROM and self.daemon_killed_at is None:
                    self._kill_daemon_mid_publish(said["step"] + 1)
            elif said["event"] == "saved":
                self.stalls[said["step"]] = Stall(said["stall_s"], said["plain_s"])
                if self.daemon_killed_at is not None and not self.healed:
                    self._await_healing(self.daemon_killed_at)
                self.tell(
                    f"step {said['step']:4}  loss {self.losses[said['step']]:.3f}  val {said['val_loss']:.3f}  "
                    f"saved in {said['stall_s'] * 1000:5.1f} ms (torch.save + fsync {said['plain_s'] * 1000:.0f} ms)"
                )
            elif said["event"] == "resumed":
                self.tell(f"[green]resumed at step {said['step']}[/] from the newest verified checkpoint")

    def _kill_daemon_mid_publish(self, step: int) -> None:
        """SIGKILL the daemon as soon as the next checkpoint is half written: its temporary directory is there."""
        pid = self.ckpt("status")["daemon"]["pid"]
        home = DEMO / "runs" / "demo" / "transformer"
        final = home / f"step_{step:010d}"
        until = time.monotonic() + 10.0
        while time.monotonic() < until and not final.exists():
            if any(f".step_{step:010d}.ckptd-tmp-" in entry.name for entry in os.scandir(home)):
                os.kill(pid, signal.SIGKILL)
                if not final.exists():
                    self.daemon_killed_at = step
                    self.tell(f"[red]SIGKILL to the daemon[/] (pid {pid}) while it was writing step {step}")
                return
            time.sleep(POLL_S)

    def _await_healing(self, step: int) -> None:
        """See what became of the checkpoint that was half written."""
        reached = self.ckpt("wait", f"demo/transformer@step:{step}", "--level", "verified", "--timeout", "60")
        pid = self.ckpt("status")["daemon"]["pid"]
        self.tell(f"the next daemon (pid {pid}) found the arena: step {step} is [green]{reached['level']}[/]")
        self.healed = True


def prepare() -> dict[str, str]:
    """Make .demo afresh; return the environment that leads every process to its daemon."""
    shutil.rmtree(DEMO, ignore_errors=True)
    (DEMO / "legacy").mkdir(parents=True)
    (DEMO / "ckptd.toml").write_text(CONFIG.format(legacy=DEMO / "legacy"))
    socket = DEMO / "s"
    if len(bytes(socket)) > 100:  # a Unix socket's path ends at 107 bytes
        socket = Path(tempfile.mkdtemp(prefix="ckdemo")) / "s"
    return {"CKPTD_SOCKET": str(socket), "CKPTD_DIR": str(DEMO / "state"), "XDG_CONFIG_HOME": str(DEMO / "config")}


def compare(story: Story, reference: dict[int, float]) -> bool:
    """Compare the curves number by number."""
    assert story.losses.keys() == reference.keys() == set(range(1, STEPS + 1)), "some steps are missing"
    difference = max(abs(story.losses[step] - reference[step]) for step in reference)
    mark = "[green]the same curve[/]" if difference == 0 else "[red]ANOTHER curve[/]"
    console.print(
        f"\n{STEPS} losses beside those of a training that was never interrupted: largest difference "
        f"[bold]{difference:g}[/], {mark}"
    )
    return difference == 0


def collect(reference: Process) -> dict[int, float]:
    """Return the losses of the uninterrupted training."""
    losses: dict[int, float] = {}
    while (said := reference.next(PATIENCE_S)) is not None:
        if said["event"] == "step":
            losses[said["step"]] = said["loss"]
    return losses


def conclude(story: Story) -> bool:
    """Wait for the last level changes, then print the tables; say whether every save is accounted for."""
    scope = "demo/transformer"
    story.ckpt("wait", scope, "--level", "verified", "--timeout", "60")
    rows = story.ckpt("ls", scope, "--all", "--sort", "step")["checkpoints"]
    plan = story.ckpt("retention", "plan", scope)["plans"][0]
    console.print()
    events = story.ckpt("log", "--limit", "500")["events"]
    show(console, fates(rows, plan, events), story.stalls)
    console.print("\nwhat the legacy script left behind, found and verified without its help:")
    legacy = story.ckpt("ls", "legacy", "--all")["checkpoints"]
    for row in sorted(legacy, key=lambda row: row["path"]):
        console.print(f"  {Path(row['path']).name:28} {row['level']:9} {row['format']}")
    saved = {row["step"] for row in rows}
    lost = set(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)) - saved
    if lost:
        console.print(f"[red]lost: {sorted(lost)}[/]")
    return not lost and all(row["level"] == "verified" for row in rows) and len(legacy) == LEGACY_SAVES


def play(story: Story) -> bool:
    """All five acts; returns whether everything is as promised."""
    story.start_daemon()
    reference = story.start_training("--alone")
    legacy = story.start_legacy()
    trainer = story.start_training("--die-after", str(KILL_TRAINER_AT))
    story.follow(trainer)
    assert trainer.wait(PATIENCE_S) == -signal.SIGKILL
    story.tell(f"[red]SIGKILL to the trainer[/] right after its save of step {KILL_TRAINER_AT} had returned")
    reached = story.ckpt("wait", f"demo/transformer@step:{KILL_TRAINER_AT}", "--level", "verified", "--timeout", "60")
    story.tell(f"without it, that checkpoint became [green]{reached['level']}[/] all the same")
    trainer = story.start_training()
    story.follow(trainer, kill_daemon=True)
    assert trainer.wait(PATIENCE_S) == 0
    assert story.healed, "no publish was caught half-way"
    legacy.wait(PATIENCE_S)
    story.tell("waiting for the uninterrupted training, to compare")
    equal = compare(story, collect(reference))
    return conclude(story) and equal


def main() -> int:
    """Exit status 0: all promises kept."""
    environment = prepare()
    os.environ.update(environment)
    try:
        with Processes(environment, DEMO / "log.txt") as processes:
            good = play(Story(processes))
    except (AssertionError, queue.Empty, OSError, SubprocessError) as error:
        console.print(f"[red]the demo failed:[/] {type(error).__name__}: {error} (see {DEMO / 'log.txt'})")
        return 1
    finally:
        if Path(environment["CKPTD_SOCKET"]).parent != DEMO:
            shutil.rmtree(Path(environment["CKPTD_SOCKET"]).parent, ignore_errors=True)
    console.print("\n[green]nothing was lost[/]" if good else "\n[red]a promise was broken[/]")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
