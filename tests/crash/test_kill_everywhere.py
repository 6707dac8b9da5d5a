"""Every process is killed at every named step of a checkpoint's way; each save arrives once, whole, verified.

The supervisor, the daemon, its workers and the trainers are the real ones. A point that is armed must be
reached (`wait_fired`), or the test proves nothing. The supervisor starts the next daemon by itself, with
the same environment: the plan of fail points lies in a file and an entry is taken out before it acts.
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.support import payload, victims
from tests.support.battlefield import PROJECT, Battlefield, Saved
from tests.support.node import eventually
from tests.support.signals import standing_still
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# Reached in the daemon, once an arena is leased. catalog.commit:n is the n-th transaction from then on: the
# save's own rows, the claim of its job, and each stage's end.
DAEMON = [
    *(f"catalog.commit:{n}" for n in range(1, 8)),
    "catalog.committed",
    "recv.header",
    "job.committed",
    "ack.accepted",
    "catalog.durable",
    "ack.durable",
    "arena.released",
    "verify.recorded",
    "link.recorded",
]
# Reached in the worker; the state has two files of arrays and state.json.
WORKER = [
    "copy.tmp_created",
    "copy.allocated",
    "copy.chunk",
    "copy.chunk:3",
    "copy.fsynced",
    "copy.fsynced:3",
    "manifest.written",
    "manifest.fsynced",
    "dir.fsynced",
    "publish.renamed",
    "parent.fsynced",
    "verify.read",
    "link.made",
]
# Of a checkpoint that is retired, in the daemon and in the worker; then of one whose grace is over.
RETIRE = ["retain.planned", "retain.tombstone", "retain.moved", "retain.trashed", "retain.trash_fsynced"]
MARK = ["mark.written", "mark.fsynced", "mark.renamed", "mark.dir_fsynced"]
AMEND = ["amend.written", "amend.fsynced", "amend.renamed", "amend.dir_fsynced"]
DROP = ["retain.purging", "retain.purged", "retain.unlink", "retain.recorded"]
IN_DAEMON = {"retain.planned", "retain.tombstone", "retain.moved", "retain.purging", "retain.purged", "retain.recorded"}
# Before there is memory to copy into; then while the spool is taken in.
EARLY = ["arena.sealed", "fdstore.pushed", "arena.lent", "catalog.commit", "catalog.committed"]
SPOOLED = ["spool.admitted", "spool.removed", "catalog.durable"]
POINTS = (*DAEMON, *WORKER, *RETIRE, *MARK, *AMEND, *DROP, *EARLY, *SPOOLED)
# Moments of save() at which its own process dies, by whether anything was promised by then.
BEFORE_COMMIT = ["mid_copy", "before_flip", "torn"]
AFTER_COMMIT = ["before_message", "after"]


@pytest.fixture(scope="module")
def battlefield(nurseries: dict[bool, Nursery]) -> Iterator[list[Battlefield]]:
    made: list[Battlefield] = []
    yield made
    for field in made:
        field.__exit__(None, None, None)


@pytest.fixture
def field(battlefield: list[Battlefield], nursery: Nursery) -> Iterator[Battlefield]:
    if not battlefield:
        made = Battlefield(nursery)
        made.__enter__()
        battlefield.append(made)
    found = battlefield[0]
    found.node.disarm()
    yield found
    found.assert_promises()
    print(found.node.tail())


@pytest.mark.parametrize("point", DAEMON)
def test_a_daemon_killed_at_any_step_loses_and_doubles_nothing(field: Battlefield, point: str) -> None:
    """F1, I1. The trainer lives on and is told of every rung, each once it is true."""
    trainer, name = field.ready_trainer("daemon")
    first = field.save(trainer)
    field.node.wait_level(first.id)
    field.node.wait_idle()
    assert trainer.prepare(seed=1)["ready"]
    field.node.arm(point)
    saved = field.save(trainer, 2)
    field.node.wait_fired()
    field.kills["daemon"] += 1
    field.assert_arrived(name, first, saved)
    told = trainer.wait(id=saved.id)
    assert (told["level"], told["error"]) == ("verified", None)
    field.assert_never_lower(told["pushes"])
    trainer.close()
    trainer.quit()
    field.assert_memory_returned()


@pytest.mark.parametrize("point", EARLY)
def test_a_daemon_killed_before_it_has_lent_memory_costs_nothing(field: Battlefield, point: str) -> None:
    """The first save of an experiment meets a daemon that dies while it opens it or makes its arena."""
    field.node.arm(point)
    trainer, name = field.trainer("early")
    saved = field.save(trainer)
    field.node.wait_fired()
    field.kills["daemon"] += 1
    trainer.flush()
    field.assert_arrived(name, saved)
    trainer.quit()
    field.assert_memory_returned()


@pytest.mark.parametrize(("point", "action"), victims.by_turns(WORKER))
def test_a_worker_or_its_daemon_killed_at_any_step_of_the_disk_loses_nothing(
    field: Battlefield, point: str, action: str
) -> None:
    """F1, F24. "kill" is the worker's death, "kill-parent" the daemon's while its worker is at that step."""
    trainer, name = field.ready_trainer("worker")
    field.node.arm(point, action)
    saved = field.save(trainer)
    field.node.wait_fired()
    field.kills["worker" if action == "kill" else "daemon"] += 1
    field.assert_arrived(name, saved)
    told = trainer.wait(id=saved.id)
    assert told["level"] == "verified"
    field.assert_never_lower(told["pushes"])
    trainer.quit()
    field.assert_memory_returned()


@pytest.mark.parametrize("point", RETIRE)
def test_a_retirement_killed_at_any_step_ends_in_the_trash(field: Battlefield, point: str) -> None:
    """I3, I4. The row says so first, the rename follows, if need be by the next daemon; the newest stays all the time."""
    trainer, name = field.ready_trainer("retired")
    first = field.save(trainer, 1)
    field.node.wait_level(first.id)
    field.node.wait_idle()
    field.node.arm(point)
    second = field.save(trainer, 2)
    field.node.wait_fired()
    field.kills["daemon" if point in IN_DAEMON else "worker"] += 1
    eventually(lambda: field.final_names(name) == ["step_0000000002"], "the first to leave its name")
    field.node.wait_level(second.id)
    field.node.wait_idle()
    states = [(row["checkpoint"], row["state"]) for row in field.node.rows(PROJECT, name)]
    assert states == [(first.id, "trashed"), (second.id, "live")]
    payload.check_saved(field.node.runs / ".ckptd-trash" / first.id, first.seed)
    payload.check_saved(field.directory(name) / "step_0000000002", second.seed)
    trainer.quit()


@pytest.mark.parametrize("point", DROP)
def test_the_end_of_a_retired_checkpoint_killed_at_any_step_is_still_its_end(field: Battlefield, point: str) -> None:
    """I3, I4. Emptying the trash is upkeep: each daemon begins with it."""
    trainer, name = field.ready_trainer("dropped")
    first = field.save(trainer, 1)
    field.node.wait_level(first.id)
    # Armed before there is anything to drop: the first daemon's own upkeep may come to it.
    field.node.arm(point)
    second = field.save(trainer, 2)
    eventually(lambda: field.final_names(name) == ["step_0000000002"], "the first to be retired")
    field.node.wait_idle()
    if not field.node.fired():
        field.node.kill_daemon()
        field.kills["daemon"] += 1
    field.node.wait_fired()
    field.kills["daemon" if point in IN_DAEMON else "worker"] += 1
    if point not in IN_DAEMON:
        field.node.kill_daemon()
    eventually(lambda: (field.node.row(first.id) or {}).get("state") == "dropped", "the first to be dropped")
    states = [(row["checkpoint"], row["state"]) for row in field.node.rows(PROJECT, name)]
    assert states == [(first.id, "dropped"), (second.id, "live")]
    assert not list(field.node.runs.glob(f".ckptd-trash/{first.id}*"))
    assert trainer.load(selector="latest", seed=second.seed)["same"]
    trainer.quit()


@pytest.mark.parametrize(("point", "action"), victims.by_turns(MARK))
def test_a_root_whose_mark_is_written_goes_on_whoever_dies_of_it(field: Battlefield, point: str, action: str) -> None:
    """F1, F14. A new mark says in whose place it stands: the daemon that never heard of it takes it for its own."""
    trainer, name = field.ready_trainer("marked")
    first = field.save(trainer, 1)
    field.node.wait_level(first.id)
    field.node.wait_idle()
    mark = field.node.runs / ".ckptd-root"
    before = json.loads(mark.read_text())["root"]
    mark.unlink()
    field.node.arm(point, action)
    saved = field.save(trainer, 2)
    field.node.wait_fired()
    field.kills["worker" if action == "kill" else "daemon"] += 1
    field.node.wait_level(saved.id)
    field.node.wait_idle()
    after = json.loads(mark.read_text())
    assert (after["root"] != before, after["instead_of"]) == (True, before)
    assert not list(field.node.runs.glob("..ckptd-root*"))
    payload.check_saved(field.directory(name) / "step_0000000002", saved.seed)
    trainer.quit()


@pytest.mark.parametrize(("point", "action"), victims.by_turns(AMEND))
def test_a_metric_said_late_reaches_the_disk_whoever_dies_on_its_way(
    field: Battlefield, point: str, action: str
) -> None:
    """I5. Its job is made with the row; the manifest is never touched."""
    trainer, name = field.ready_trainer("said-late")
    saved = field.save(trainer, 1)
    field.node.wait_level(saved.id)
    field.node.wait_idle()
    before = (field.directory(name) / "step_0000000001/manifest.json").read_bytes()
    field.node.arm(point, action)
    with suppress(ConnectionError, OSError):
        field.node.ask("checkpoint.metrics", checkpoint=saved.id, metrics={"val_loss": 0.5})
    field.node.wait_fired()
    field.kills["worker" if action == "kill" else "daemon"] += 1
    late = field.directory(name) / "step_0000000001/late.json"
    eventually(lambda: late.exists() and json.loads(late.read_text())["metrics"] == {"val_loss": 0.5}, "late.json")
    field.node.wait_idle()
    assert (field.directory(name) / "step_0000000001/manifest.json").read_bytes() == before
    assert not list(late.parent.glob(".late.json*"))
    trainer.quit()


@pytest.mark.parametrize("moment", BEFORE_COMMIT)
def test_a_trainer_killed_before_its_commit_leaves_nothing(field: Battlefield, moment: str) -> None:
    """F2. Nothing was promised; its memory comes back, and no half of it is taken for a save."""
    trainer, name = field.ready_trainer("unsaid")
    trainer.dies_of("save", seed=field.seed(), step=1, die=moment)
    field.kills["trainer"] += 1
    field.assert_memory_returned()
    assert field.node.rows(PROJECT, name) == []
    assert field.final_names(name) == []


@pytest.mark.parametrize("moment", AFTER_COMMIT)
@pytest.mark.parametrize("others", ["alone", "with the daemon"])
def test_a_trainer_killed_after_its_commit_has_saved(field: Battlefield, moment: str, others: str) -> None:
    """F2. "with the daemon": it dies first, so that no message was ever heard and the next one finds the arena."""
    trainer, name = field.ready_trainer("said")
    killed = [field.node.daemon_pid] if others != "alone" else []
    saved = field.save_and_die(trainer, name, moment, victims=killed)
    field.kills["daemon"] += len(killed)
    field.assert_arrived(name, saved)
    field.assert_memory_returned()


@pytest.mark.parametrize(
    "point", ["job.committed", "catalog.durable", "ack.durable", "copy.chunk", "publish.renamed", "verify.read"]
)
def test_a_trainer_and_whoever_works_for_it_may_die_together(field: Battlefield, point: str) -> None:
    """The save is in memory that only the supervisor holds, and a row at most: it arrives."""
    trainer, name = field.ready_trainer("both")
    field.node.arm(point)
    saved = field.save_and_die(trainer, name, "after")
    field.node.wait_fired()
    field.kills["daemon" if point in DAEMON else "worker"] += 1
    field.assert_arrived(name, saved)
    field.assert_memory_returned()


@pytest.mark.parametrize("moment", ["spooling", "spooled"])
def test_a_trainer_killed_while_it_spools_leaves_a_whole_image_or_none(field: Battlefield, moment: str) -> None:
    """P2, P3. The daemon is stopped, not dead: its socket takes connections and nobody answers."""
    trainer, name = field.trainer("spooling")
    trainer.stats()
    pid = field.node.daemon_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        trainer.begin("save", seed=(seed := field.seed()), step=1, die=moment)
        trainer.wait_dead()
    finally:
        os.kill(pid, signal.SIGCONT)
    field.kills["trainer"] += 1
    if moment == "spooled":
        row = field.only_row(name)

        field.assert_arrived(name, Saved(row["checkpoint"], seed, 1))
    else:
        eventually(lambda: not list(field.node.spool.iterdir()), "the half image to be swept")
        assert field.node.rows(PROJECT, name) == []


@pytest.mark.parametrize("point", SPOOLED)
def test_a_daemon_killed_while_it_takes_the_spool_in_takes_it_in_once(field: Battlefield, point: str) -> None:
    """The image stays until what it holds is durable elsewhere."""
    trainer, name = field.ready_trainer("spooled")
    supervisor = field.node.supervisor
    assert supervisor is not None
    with standing_still([supervisor.pid]):  # a next daemon would lend memory for the third, and nothing be spooled
        field.node.kill_daemon()
        field.node.arm(point)
        saves = [field.save(trainer, step, on_overlap="spool") for step in (1, 2, 3)]
    field.node.wait_fired()
    field.kills["daemon"] += 2
    trainer.flush()
    field.assert_arrived(name, *saves)
    trainer.quit()
    field.assert_memory_returned()
