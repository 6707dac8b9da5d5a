"""Keeping and retiring, end to end: a real trainer saves, the daemon decides, a reader looks at the links all the while.

Rows 1 to 5 of the thirty things to get right: the best survives every path and every restart, is decided in the
transaction that verifies, by a direction that somebody wrote down, never by NaN, never by what is not there.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.node import eventually
from tests.support.onlooker import Onlooker, end, make
from tests.support.trainer import Nursery, Trainer

pytestmark = pytest.mark.xdist_group("retention_for_real")

RULES = """
[[experiments]]
project = "all"
keep_last = 2
keep_every = 40
keep_best = { metric = "val_loss", mode = "min" }

[[experiments]]
project = "two"
keep_last = 1
keep_best = [{ metric = "accuracy", mode = "min" }, { metric = "score", mode = "max", k = 2 }]

[[experiments]]
project = "late"
keep_last = 1
keep_best = { metric = "val_loss", mode = "min" }

[[experiments]]
project = "gone"
keep_last = 1
trash_grace_s = 0

[[experiments]]
project = "free"
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Onlooker]:
    made = make(more=RULES).start()
    yield made
    end(made)


class Training:
    """One experiment of one trainer."""

    def __init__(self, node: Onlooker, trainer: Trainer, project: str, name: str) -> None:
        self.node, self.trainer, self.project, self.name = node, trainer, project, name
        self.ids: dict[int, str] = {}
        trainer.open(name=name, project=project, dir=str(node.runs))

    @property
    def dir(self) -> Path:
        return self.node.runs / self.project / self.name

    @property
    def scope(self) -> str:
        return f"{self.project}/{self.name}"

    def save(self, step: int, **given: Any) -> str:
        """Save, and wait until everything that follows from it was done."""
        made = str(self.trainer.save(seed=step, step=step, **given)["id"])
        self.ids[step] = made
        eventually(lambda: self.node.row(made), "its row")
        self.node.wait_level(made)
        self.node.wait_idle()
        return made

    def on_disk(self) -> list[int]:
        """The steps whose directories stand."""
        return sorted(
            int(p.name.removeprefix("step_")) for p in self.dir.iterdir() if not p.is_symlink() and p.is_dir()
        )

    def link(self, name: str) -> int | None:
        """The step that a link points to, None when there is no link. Its target is whole."""
        try:
            target = os.readlink(self.dir / name)
        except FileNotFoundError:
            return None
        manifest = json.loads((self.dir / target / "manifest.json").read_bytes())
        return int(manifest["step"])

    def named(self, name: str) -> int | None:
        """The step that a link names, whether its target stands or a person took it away a moment ago."""
        try:
            return int(os.readlink(self.dir / name).rpartition("step_")[2])
        except FileNotFoundError:
            return None

    def path(self, selector: str) -> int | None:
        """The step that `ckpt path` names, None when it says that there is none."""
        said = self.node.run("path", f"{self.scope}@{selector}")
        assert said.code in {0, 3}, said.err
        return int(Path(said.out.strip()).name.removeprefix("step_")) if said.code == 0 else None

    def row(self, step: int) -> dict[str, Any]:
        found = self.node.row(self.ids[step])
        assert found is not None
        return found


@pytest.fixture
def training(node: Onlooker, nursery: Nursery, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Start a trainer with an experiment of its own in a project."""
    trainer = nursery.trainer(node.environ)
    yield lambda project: Training(node, trainer, project, request.node.name[:100])
    print(node.tail())


class Reader:
    """Looks through the links of an experiment as fast as it can, and remembers what it saw."""

    def __init__(self, directory: Path, *names: str) -> None:
        self._directory, self._names = directory, names
        self.seen: dict[str, list[str]] = {name: [] for name in names}
        self.dangling: list[str] = []
        self.looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            for name in self._names:
                self._look(self._directory / name)
            self.looks += 1
            time.sleep(0.0005)  # two cores: whoever writes must get on as well

    def _look(self, link: Path) -> None:
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            if self.seen[link.name]:
                self.dangling.append(f"{link.name} went away")
            return
        try:
            found = json.loads((self._directory / target / "manifest.json").read_bytes())["checkpoint"]
        except FileNotFoundError:
            # Retired between our two looks is no harm, as long as the link had moved on by then.
            if os.readlink(link) == target:
                self.dangling.append(f"{link.name} -> {target}")
            return
        if self.seen[link.name][-1:] != [found]:
            self.seen[link.name].append(found)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def expected(losses: dict[int, float], last: int, every: int) -> list[int]:
    """What the rules of project "all" keep, said once more in the plainest way."""
    steps = sorted(losses)
    best = min(losses, key=lambda step: (losses[step], step))
    return sorted({*steps[-last:], *(step for step in steps if step % every == 0), best})


def test_the_rules_are_a_union_and_the_links_never_dangle(training: Any, node: Onlooker) -> None:
    """Every save retires something; a reader beside it finds a whole, verified checkpoint behind each link at any time."""
    run: Training = training("all")
    losses = dict(
        zip(
            range(10, 170, 10),
            [5.0, 4.0, 4.5, 3.0, 3.5, 3.6, 2.0, 9.0, 8.0, 2.5, 1.0, 7.0, 6.0, 1.5, 0.5, 4.0],
            strict=True,
        )
    )
    kept: list[int] = []
    with Reader(run.dir, "latest", "best") as reader:
        for step, loss in losses.items():
            run.save(step, metrics={"val_loss": loss})
            looks = reader.looks
            eventually(lambda looks=looks: reader.looks >= looks + 2, "a look through the links")
            kept = expected({s: losses[s] for s in [*kept, step]}, 2, 40)
            assert run.on_disk() == kept
            assert (run.link("latest"), run.link("best")) == (step, min(kept, key=lambda s: losses[s]))
    assert reader.dangling == []
    assert reader.looks > len(losses)
    assert reader.seen["latest"] == list(run.ids.values())
    assert reader.seen["best"] == [run.ids[step] for step in (10, 20, 40, 70, 110, 150)]
    verified = {event["checkpoint"] for event in node.events("checkpoint.verified")}
    assert {*reader.seen["latest"], *reader.seen["best"]} <= verified
    gone = [step for step in losses if step not in kept]
    assert {run.row(step)["state"] for step in gone} == {"trashed"}
    in_trash = set(os.listdir(node.runs / ".ckptd-trash"))
    assert {run.ids[step] for step in gone} <= in_trash


def test_whoever_hears_of_a_verified_checkpoint_finds_the_best_decided(training: Any, node: Onlooker) -> None:
    """Asked the moment the event arrives: flags and level are one transaction."""
    run: Training = training("all")
    heard: list[tuple[str, str]] = []
    with node.following() as events:
        for step, loss in ((1, 3.0), (2, 2.0), (3, 4.0), (4, 1.0)):
            made = run.trainer.save(seed=step, step=step, metrics={"val_loss": loss})["id"]
            for event in events:
                if event["event"] == "checkpoint.verified" and event["checkpoint"] == made:
                    heard.append((made, node.experiment(run.project, run.name)["best"][0]["checkpoint"]))
                    break
    ids = [made for made, _ in heard]
    assert [best for _, best in heard] == [ids[0], ids[1], ids[1], ids[3]]


def test_the_direction_is_what_the_configuration_says_not_what_the_name_suggests(training: Any) -> None:
    run: Training = training("two")
    for step, accuracy, score in ((1, 0.9, 1.0), (2, 0.1, 3.0), (3, 0.5, 2.0), (4, 0.7, 0.0)):
        run.save(step, metrics={"accuracy": accuracy, "score": score})
    assert run.path("best:accuracy") == 2
    assert run.path("best:score") == 2
    assert run.on_disk() == [2, 3, 4]  # best by accuracy and score, second by score, last
    assert [run.link(name) for name in ("best", "best_accuracy", "best_score")] == [2, 2, 2]
    assert run.path("best:loss") is None  # nobody said what is good there


def test_nan_infinity_and_a_missing_metric_are_never_best_and_are_kept_as_they_are(
    training: Any, node: Onlooker
) -> None:
    run: Training = training("late")
    saved: dict[int, dict[str, float]] = {
        1: {"val_loss": float("nan")},
        2: {"val_loss": float("-inf")},
        3: {"loss": 0.0},
        4: {"val_loss": 7.0},
        5: {"val_loss": float("nan")},
    }
    for step, metrics in saved.items():
        run.save(step, metrics=metrics)
        assert run.path("best") == (4 if step >= 4 else None)
        assert run.link("best") == (4 if step >= 4 else None)
    assert run.on_disk() == [4, 5]
    assert run.row(1)["metrics"] == {"val_loss": "NaN"}
    assert run.row(2)["metrics"] == {"val_loss": "-Infinity"}
    shown = node.run("show", run.ids[2], "--json").json
    assert shown["checkpoint"]["metrics"] == {"val_loss": "-Infinity"}


def test_a_save_that_asks_not_to_be_best_is_not(training: Any) -> None:
    run: Training = training("late")
    run.save(1, metrics={"val_loss": 2.0})
    run.save(2, metrics={"val_loss": 1.0}, update_best=False)
    run.save(3, metrics={"val_loss": 3.0})
    assert run.path("best") == 1
    assert run.on_disk() == [1, 3]


def test_late_metrics_move_the_best_and_its_protection(training: Any, node: Onlooker) -> None:
    """Validation ended after the save: what was the best is nobody's any more and goes, link and all, with no dangling."""
    run: Training = training("late")
    run.save(1, metrics={"val_loss": 1.0})
    with Reader(run.dir, "latest", "best") as reader:
        run.save(2)
        assert (run.link("best"), run.on_disk()) == (1, [1, 2])
        told = node.ask("checkpoint.metrics", checkpoint=run.ids[2], metrics={"val_loss": 0.5})
        assert told["ok"], told
        assert run.path("best") == 2
        eventually(lambda: run.named("best") == 2, "the link to follow")
        assert run.link("best") == 2
        assert node.run("rm", "--dry-run", run.ids[2]).code == 7
        run.save(3, metrics={"val_loss": 2.0})
        assert (run.link("best"), run.on_disk()) == (2, [2, 3])
        assert node.ask("checkpoint.metrics", checkpoint=run.ids[2], metrics={"val_loss": "NaN"})["ok"]
        eventually(lambda: run.named("best") == 3, "the link to follow")
        assert run.link("best") == 3
    assert reader.dangling == []


def test_late_metrics_followed_at_once_by_a_retention_leave_no_link_dangling(training: Any, node: Onlooker) -> None:
    run: Training = training("late")
    run.save(1, metrics={"val_loss": 1.0})
    run.save(2)
    with Reader(run.dir, "latest", "best") as reader:
        told = node.ask("checkpoint.metrics", checkpoint=run.ids[2], metrics={"val_loss": 0.5})
        assert told["ok"], told
        applied = node.ask("retention", project=run.project, name=run.name, apply=True)
        assert applied["ok"], applied
        eventually(lambda: run.on_disk() == [2], "the old best to go")
        assert run.link("best") == 2
    assert reader.dangling == []


def test_the_best_survives_a_killed_daemon_and_whatever_is_retired_after_it(training: Any, node: Onlooker) -> None:
    run: Training = training("late")
    run.save(1, metrics={"val_loss": 0.1})
    for step in (2, 3):
        run.save(step, metrics={"val_loss": 5.0})
    node.kill_daemon()
    assert run.path("best") == 1
    run.save(4, metrics={"val_loss": 0.2})
    node.kill_daemon()
    run.save(5, metrics={"val_loss": 9.0})
    assert node.ask("retention", project=run.project, name=run.name, apply=True)["ok"]
    assert (run.on_disk(), run.path("best"), run.link("best"), run.link("latest")) == ([1, 5], 1, 1, 5)
    assert node.experiment(run.project, run.name)["best"][0]["step"] == 1


def test_a_pin_holds_against_every_rule_until_it_is_lifted(training: Any, node: Onlooker) -> None:
    run: Training = training("late")
    run.save(1)
    assert node.run("pin", run.ids[1], "--note", "table 3").code == 0
    run.save(2)
    run.save(3)
    assert run.on_disk() == [1, 3]
    plan = node.run("retention", "plan", run.scope, "--json").json["plans"][0]
    assert {entry["step"]: entry["why"] for entry in plan["keep"]}[1] == [f"pin of uid {os.getuid()}: table 3"]
    refused = node.run("rm", "--yes", run.ids[1])
    assert refused.code == 7
    assert "pin" in refused.err
    assert node.run("unpin", run.ids[1]).code == 0
    assert node.run("retention", "apply", "--yes", "-q", run.scope).out == f"{run.ids[1]}\n"
    assert run.on_disk() == [3]


def test_without_rules_nothing_is_ever_deleted(training: Any, node: Onlooker) -> None:
    run: Training = training("free")
    for step in range(1, 5):
        run.save(step, metrics={"val_loss": float(step)})
    assert node.run("retention", "apply", "--yes", "-q", run.scope).out == ""
    assert run.on_disk() == [1, 2, 3, 4]


def test_a_best_that_is_deleted_by_hand_gives_way_to_the_next_one(training: Any, node: Onlooker) -> None:
    """F27: noticed within one reconcile; flags and links follow, and what is the best now is protected."""
    run: Training = training("all")
    for step, loss in ((40, 1.0), (80, 2.0), (120, 3.0)):
        run.save(step, metrics={"val_loss": loss})
    for gone in (40, 120):
        os.rename(run.dir / f"step_{gone:010d}", node.dir / f"{run.name}-{gone}")
    node.wait_state(run.ids[40], "missing")
    node.wait_state(run.ids[120], "missing")
    assert (run.path("best"), run.path("latest")) == (80, 80)
    eventually(lambda: (run.named("best"), run.named("latest")) == (80, 80), "the links to follow")
    assert (run.link("best"), run.link("latest")) == (80, 80)
    os.rename(run.dir / f"step_{80:010d}", node.dir / f"{run.name}-80")
    node.wait_state(run.ids[80], "missing")
    assert (run.path("best"), run.path("latest")) == (None, None)
    eventually(lambda: not os.path.lexists(run.dir / "best") and not os.path.lexists(run.dir / "latest"), "no link")


def test_a_file_of_a_persons_own_under_a_links_name_stays_and_stops_nothing(training: Any, node: Onlooker) -> None:
    run: Training = training("late")
    run.dir.mkdir(parents=True)
    (run.dir / "best").write_text("mine")
    for step in (1, 2, 3):
        run.save(step, metrics={"val_loss": 1.0 / step})
    assert (run.dir / "best").read_text() == "mine"
    assert (run.link("latest"), run.on_disk()) == (3, [3])
    assert node.status()["jobs"]["parked"] == 0


def test_the_trash_is_emptied_after_its_grace_and_not_before(training: Any, node: Onlooker) -> None:
    """Grace 0 in one project, a day in another: a daemon that starts purges the one and leaves the other."""
    short: Training = training("gone")
    for step in (1, 2):
        short.save(step)
    long = Training(node, short.trainer, "late", short.name)
    for step in (1, 2):
        long.save(step)
    # The first daemon's own upkeep may have come to it already.
    assert short.row(1)["state"] in {"trashed", "dropped"}
    assert long.row(1)["state"] == "trashed"
    node.signal(signal.SIGHUP)
    node.kill_daemon()
    node.wait_state(short.ids[1], "dropped")
    left = os.listdir(node.runs / ".ckptd-trash")
    assert short.ids[1] not in left
    assert long.ids[1] in left
    assert long.row(1)["state"] == "trashed"
    assert short.on_disk() == [2]
