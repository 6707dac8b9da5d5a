"""Trains a small transformer and hands a checkpoint to ckptd every few seconds.

What ckptd asks of a training script is in five lines: Experiment, prepare, load, save, log. All
else is training, and measuring what a save costs. Progress goes to standard output, one JSON
object a line, so that run.py can follow.
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from corpus import Windows, read_text
from model import WINDOW, Transformer

BATCH, LEARNING_RATE, WARM_UP_STEPS, SEED = 8, 1e-3, 30, 7


def say(event: str, **facts: Any) -> None:
    """Tell whoever follows."""
    print(json.dumps({"event": event, **facts}), flush=True)


class Training:
    """Everything that must come back for the loss curve to go on as if nothing had happened."""

    def __init__(self) -> None:
        """Start from the seed."""
        torch.manual_seed(SEED)
        self.model = Transformer()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self.windows = Windows(read_text(), WINDOW, BATCH)
        self.step = 0

    def state(self) -> dict[str, Any]:
        """Return weights, moments, place in the data, dropout's random numbers and the step."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.windows.state_dict(),
            "random": {"torch": torch.get_rng_state()},
            "progress": {"step": self.step},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.windows.load_state_dict(state["data"])
        torch.set_rng_state(state["random"]["torch"])
        self.step = int(state["progress"]["step"])

    def advance(self) -> float:
        """Take one optimizer step; return its loss."""
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, self.step / WARM_UP_STEPS)
        self.model.train()
        loss = self.model.loss(*self.windows.next())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.item())

    @torch.no_grad()
    def validate(self) -> float:
        """Return the mean loss on text never trained on; draws no random number."""
        self.model.eval()
        return float(self.model.loss(*self.windows.validation()).item())


def torch_save_s(state: dict[str, Any], path: Path) -> float:
    """Seconds that torch.save of the same state, made durable, would have stopped the training."""
    begun = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begun


def train_with_ckptd(training: Training, options: argparse.Namespace) -> None:
    """Resume from the newest verified checkpoint if there is one, then train and hand off."""
    import ckptd_client as ckptd

    config = {"batch": BATCH, "learning_rate": LEARNING_RATE, "seed": SEED}
    run = ckptd.Experiment("transformer", project="demo", dir=options.dir / "runs", config=config)
    state = run.load("latest")
    if state is None:
        run.prepare(training.state())
    else:
        training.restore(state)
        say("resumed", step=training.step)
    while training.step < options.steps:
        loss = training.advance()
        say("step", step=training.step, loss=loss)
        run.log({"loss": loss}, step=training.step)
        if training.step % options.save_every:
            continue
        metrics = {"val_loss": training.validate()}
        begun = time.perf_counter()
        run.save(training.state(), step=training.step, metrics=metrics)
        stall_s = time.perf_counter() - begun
        if training.step == options.die_after:
            os.kill(os.getpid(), signal.SIGKILL)  # no goodbye: not even the next line runs
        plain_s = torch_save_s(training.state(), options.dir / "plain.pt")
        say("saved", step=training.step, stall_s=stall_s, plain_s=plain_s, **metrics)
    run.close()


def train_alone(training: Training, options: argparse.Namespace) -> None:
    """The same training, never interrupted and never saved: the curve to compare with."""
    while training.step < options.steps:
        say("step", step=training.step + 1, loss=training.advance())
        if training.step % options.save_every == 0:
            training.validate()


def main() -> None:
    """Train on one thread: bit for bit the same wherever it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, required=True)
    parser.add_argument("--die-after", type=int, default=0, help="SIGKILL itself right after this step's hand-off")
    parser.add_argument("--alone", action="store_true", help="without ckptd: the reference curve")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    training = Training()
    say("ready")
    if options.alone:
        train_alone(training, options)
    else:
        train_with_ckptd(training, options)
    say("finished", step=training.step)


if __name__ == "__main__":
    main()
