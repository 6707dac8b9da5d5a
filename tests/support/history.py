"""A small real history for the command line: one experiment of three saves, a file that can be submitted, one that was found."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.onlooker import end, make
from tests.support.trainer import Nursery
from tests.support.writer import Writer

RULES = """
[retention]
keep_best = { metric = "val_loss", mode = "min" }
keep_last = 50

[[experiments]]
project = "short"
keep_last = 1
"""
LOSSES = {100: 0.9, 200: 0.3, 300: 0.5}


class History:
    """imagenet/resnet50 with steps 100 to 300, of which 200 is the best; `submitted` and `found` are torch files.

    The node has no fail points, of which `ckpt doctor` would rightly complain.
    """

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self._stack = ExitStack()
        self.ids: dict[int, str] = {}

    def path(self, step: int) -> Path:
        """Where a step of imagenet/resnet50 lies."""
        return self.node.runs / "imagenet" / "resnet50" / f"step_{step:010d}"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.node = make(more=RULES, prefix=("env", "-u", "CKPTD_FAIL"))
            stack.callback(end, self.node)
            self.node.start()
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ck")))
            self.nursery = stack.enter_context(Nursery(directory))
            self.writer = stack.enter_context(Writer())
            self._happen()
            self._stack = stack.pop_all()
        return self

    def _happen(self) -> None:
        node, trainer = self.node, self.nursery.trainer(self.node.environ)
        trainer.open(name="resnet50", project="imagenet", dir=str(node.runs), config={"lr": 0.1}, tags=["baseline"])
        for step, loss in LOSSES.items():
            told = {"step": step, "epoch": step / 100, "metrics": {"val_loss": loss}, "note": f"n{step}"}
            self.ids[step] = str(trainer.save(seed=step, **told)["id"])
        self.submitted = node.dir / "own" / "model_7.pt"
        self.submitted.parent.mkdir()
        self.writer.torch_save(path=self.submitted, seed=7)
        self.found = node.watch(node.dir / "watched", "old") / "run" / "model_9.pt"
        self.found.parent.mkdir()
        self.writer.torch_save(path=self.found, seed=9)
        for checkpoint in self.ids.values():
            node.wait_level(checkpoint)
        node.wait_done(self.found)
        trainer.close()
        trainer.end()
        node.wait_idle()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()
