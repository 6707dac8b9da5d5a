"""Facts to hooks: at least once over every crash, in order, and no hook ever waits for another."""

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import anyio
import pytest

from ckptd.catalog import checkpoints, eventlog, hookruns
from ckptd.clock import SystemClock
from ckptd.errors import Busy
from ckptd.events import Event
from ckptd.hooks.context import Context
from ckptd.hooks.points import HookEvent
from ckptd.hooks.registry import Registry
from ckptd.hooks.result import Finding, Level, Outcome, Run
from ckptd.hooks.spec import Kind, Priority, Spec
from ckptd.pipeline import delivery as module
from ckptd.pipeline.delivery import Delivery
from tests.support.catalog import Told, a_checkpoint, experiment, opened
from tests.support.in_process import eventually

PINNED = HookEvent.CHECKPOINT_PINNED


def a_hook(name: str, *events: HookEvent, **more) -> Spec:
    return Spec(name=name, kind=Kind.EXEC, target="/bin/true", events=events or (HookEvent.ROOT_ADDED,), **more)


@dataclass
class Hooks:
    """Stands in for the runner: notes what each hook was told, reports each run, waits where a gate is shut."""

    delivery: Delivery
    told: defaultdict[str, list[Context]] = field(default_factory=lambda: defaultdict(list))
    order: list[str] = field(default_factory=list)
    gates: dict[str, anyio.Event] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    opened: bool = False

    async def deliver(self, context: Context, spec: Spec) -> Run:
        self.order.append(spec.name)
        if spec.name in self.gates:
            await self.gates[spec.name].wait()
        self.told[spec.name].append(context)
        run = Run(
            spec.name, context.event, context.key, context.at, Outcome.OK, 0.001, findings=self.findings,
            opened=self.opened, error="it broke" if self.opened else "",
        )  # fmt: skip
        self.delivery.report(run, context)
        return run

    def are_idle(self) -> bool:
        """Whether each lane has looked and found nothing more."""
        return not any(lane.busy for lane in self.delivery._lanes.values())

    def roots(self, name: str) -> list[str]:
        return [context.data["root"] for context in self.told[name]]


@dataclass
class Place:
    """A catalog with a bus, on which deliveries start and end as daemons do."""

    path: Path
    published: Told = field(default_factory=Told)

    async def __aenter__(self) -> Self:
        self.context = opened(self.path / "catalog.sqlite", self.published)
        self.catalog = await self.context.__aenter__()
        return self

    async def __aexit__(self, *error) -> None:
        await self.context.__aexit__(*error)

    async def tell(self, *roots: str) -> None:
        """Commit one event `root.added` for each."""
        for root in roots:

            async def emit(tx, root=root) -> None:
                tx.tell("root.added", {"root": root, "kind": "watched"})

            await self.catalog.write(emit)

    @asynccontextmanager
    async def delivering(self, *specs: Spec) -> AsyncIterator[Hooks]:
        """One life of a daemon."""
        delivery = Delivery(self.catalog, self.published.bus, Registry(specs), SystemClock())
        delivery.deliverer = hooks = Hooks(delivery)
        async with anyio.create_task_group() as group:
            group.start_soon(delivery.run)
            await eventually(lambda: len(delivery._lanes) == len(specs) and hooks.are_idle())
            yield hooks
            group.cancel_scope.cancel()


@pytest.fixture
async def place(tmp_path, monkeypatch) -> AsyncIterator[Place]:
    monkeypatch.setattr(module, "RECORD_S", 0.01)
    async with Place(tmp_path) as made:
        yield made


async def test_a_hook_hears_of_every_fact_it_names_in_order_and_of_nothing_from_before_it_was_there(place):
    """M047: a new hook begins with what happens next."""
    await place.tell("/before")
    async with place.delivering(a_hook("one"), a_hook("other", PINNED)) as hooks:
        await place.tell(*[f"/r{n}" for n in range(20)])
        await eventually(lambda: len(hooks.told["one"]) == 20)
        assert hooks.roots("one") == [f"/r{n}" for n in range(20)]
        assert hooks.told["other"] == []


async def test_what_happened_while_no_daemon_ran_is_delivered_by_the_next_one(place):
    async with place.delivering(a_hook("one")) as hooks:
        await place.tell("/a")
        await eventually(lambda: hooks.roots("one") == ["/a"])
    await place.tell("/b", "/c")
    async with place.delivering(a_hook("one")) as hooks:
        await eventually(lambda: hooks.roots("one") == ["/b", "/c"])


async def test_a_fact_whose_delivery_was_not_recorded_comes_again_under_the_same_key(place, monkeypatch):
    """A hook tells a repetition by its key; the end of a daemon between delivery and commit is one."""

    async def refuses(*_) -> None:
        raise Busy("the catalog refuses")

    with monkeypatch.context() as patch:
        patch.setattr(hookruns, "record", refuses)
        async with place.delivering(a_hook("one")) as first:
            await place.tell("/a", "/b")
            await eventually(lambda: len(first.told["one"]) == 2)
    async with place.delivering(a_hook("one")) as second:
        await place.tell("/c")
        await eventually(lambda: second.roots("one") == ["/a", "/b", "/c"])
    keys = [context.key for context in first.told["one"]]
    assert [context.key for context in second.told["one"]][:2] == keys
    assert len(set(keys)) == 2


async def test_a_hook_that_hangs_delays_no_other_and_hears_everything_in_the_end(place):
    """M050, M054: each hook has its own place in the log."""
    async with place.delivering(a_hook("slow", priority=Priority.CRITICAL), a_hook("quick")) as hooks:
        hooks.gates["slow"] = anyio.Event()
        await place.tell(*[f"/r{n}" for n in range(30)])
        await eventually(lambda: len(hooks.told["quick"]) == 30)
        assert hooks.told["slow"] == []
        assert hooks.delivery.state_of("slow")[1] > 0
        hooks.gates["slow"].set()
        await eventually(lambda: hooks.roots("slow") == [f"/r{n}" for n in range(30)])


@pytest.mark.parametrize("recent_max", [3, 2048])
async def test_a_burst_that_no_queue_holds_is_read_from_the_log_and_nothing_of_it_is_lost(
    place, monkeypatch, recent_max
):
    monkeypatch.setattr(module, "QUEUED_MAX", 4)
    monkeypatch.setattr(module, "RECENT_MAX", recent_max)
    monkeypatch.setattr(module, "PAGE_MAX", 7)
    async with place.delivering(a_hook("one"), a_hook("slow")) as hooks:
        await place.tell("/first")
        await eventually(lambda: hooks.roots("one") == hooks.roots("slow") == ["/first"])
        hooks.gates["slow"] = anyio.Event()

        async def emit(tx) -> None:
            for n in range(100):
                tx.tell("root.added", {"root": f"/r{n}", "kind": "watched"})

        await place.catalog.write(emit)
        await place.tell("/last")
        await eventually(lambda: len(hooks.told["one"]) == 102)
        hooks.gates["slow"].set()
        await eventually(lambda: len(hooks.told["slow"]) == 102)
        assert hooks.roots("one") == hooks.roots("slow") == ["/first", *[f"/r{n}" for n in range(100)], "/last"]


async def test_a_hook_further_behind_than_the_log_reaches_is_told_of_it_and_goes_on(place):
    async with place.delivering(a_hook("one")) as hooks:
        await place.tell("/a")
        await eventually(lambda: hooks.roots("one") == ["/a"])
    await place.tell(*[f"/gone{n}" for n in range(10)], "/b", "/c")
    await place.catalog.write(lambda tx: eventlog.trim(tx, 2))
    async with place.delivering(a_hook("one")) as hooks:
        await eventually(lambda: hooks.roots("one") == ["/b", "/c"])
        assert hooks.delivery.state_of("one")[0]["missed"] == 10
    [missed] = [event for event in place.published.events if event.name == "hook.missed"]
    assert missed.data == {"hook": "one", "count": 10}


async def test_a_disabled_hook_hears_nothing_of_what_happens_meanwhile_and_stays_disabled_after_a_restart(place):
    """M064."""
    async with place.delivering(a_hook("one"), a_hook("mark")) as hooks:
        assert await hooks.delivery.switch("one", enabled=False)
        assert not await hooks.delivery.switch("one", enabled=False)
        await place.tell("/a")
        await eventually(lambda: hooks.told["mark"] and hooks.are_idle())
    async with place.delivering(a_hook("one"), a_hook("mark")) as hooks:
        await place.tell("/b")
        await eventually(lambda: hooks.told["mark"] and hooks.are_idle())
        assert hooks.told["one"] == []
        await hooks.delivery.switch("one", enabled=True)
        await place.tell("/c")
        await eventually(lambda: hooks.roots("one") == ["/c"])


async def test_whoever_flushes_waits_for_what_is_being_written_down_already(place, monkeypatch):
    """Else a person who asks for the log right after a run would not see it."""
    begun, go_on, done, real = anyio.Event(), anyio.Event(), anyio.Event(), hookruns.record

    async def held(tx, progress):
        begun.set()
        await go_on.wait()
        return await real(tx, progress)

    async with place.delivering(a_hook("one")) as hooks, anyio.create_task_group() as group:
        await place.tell("/a")
        await eventually(lambda: hooks.told["one"] and hooks.are_idle())
        await hooks.delivery.flush()
        monkeypatch.setattr(hookruns, "record", held)

        async def flush():
            await hooks.delivery.flush()
            done.set()

        await hooks.deliver(hooks.told["one"][0], a_hook("one"))  # as when it is asked: the log does not move
        await begun.wait()
        group.start_soon(flush)
        await anyio.wait_all_tasks_blocked()
        early = done.is_set()
        go_on.set()
    assert not early


async def test_a_hook_that_comes_while_others_wait_to_be_written_down_ends_nothing(place):
    async with place.delivering(a_hook("one")) as hooks:
        await place.tell("/a")
        await eventually(lambda: hooks.told["one"] and hooks.are_idle())
        async with hooks.delivery._recording:
            await hooks.deliver(hooks.told["one"][0], a_hook("one"))
            await anyio.sleep(20 * module.RECORD_S)
            hooks.delivery.registry.add(a_hook("two"))
            await hooks.delivery.enter()
        await place.tell("/b")
        await eventually(lambda: hooks.roots("two") == ["/b"])


async def test_a_hook_that_was_taken_out_and_comes_back_begins_anew(place):
    async with place.delivering(a_hook("one")) as hooks:
        await place.tell("/a")
        await eventually(lambda: hooks.told["one"])
    async with place.delivering(a_hook("other")):
        await place.tell("/b")
    async with place.delivering(a_hook("one")) as hooks:
        await place.tell("/c")
        await eventually(lambda: hooks.roots("one") == ["/c"])


async def test_hooks_of_one_fact_start_in_the_order_of_their_priority_and_those_of_background_last(place, monkeypatch):
    """M050: ties by registration."""
    monkeypatch.setattr(module, "BACKGROUND_S", 3600.0)
    names = {"last": Priority.BACKGROUND, "low": Priority.LOW, "first": Priority.CRITICAL, "a": Priority.NORMAL}
    specs = [*(a_hook(name, priority=priority) for name, priority in names.items()), a_hook("b"), a_hook("c")]
    async with place.delivering(*specs) as hooks:
        await place.tell("/warm")  # each lane has caught up by itself then
        await eventually(lambda: len(hooks.order) == len(specs) and hooks.are_idle())
        hooks.order.clear()
        await place.tell("/a")
        await eventually(lambda: len(hooks.order) == len(specs))
        assert hooks.order == ["first", "a", "b", "c", "low", "last"]


async def test_background_waits_for_the_others_and_not_for_ever(place, monkeypatch):
    monkeypatch.setattr(module, "BACKGROUND_S", 0.2)
    async with place.delivering(a_hook("slow"), a_hook("later", priority=Priority.BACKGROUND)) as hooks:
        await place.tell("/warm")  # each lane has caught up by itself then
        await eventually(lambda: len(hooks.order) == 2 and hooks.are_idle())
        hooks.order.clear()
        hooks.gates["slow"] = anyio.Event()
        begun_s = anyio.current_time()
        await place.tell("/a")
        await eventually(lambda: hooks.order == ["slow", "later"])
        assert anyio.current_time() - begun_s >= module.BACKGROUND_S


async def test_background_waits_for_the_others_also_with_what_happened_while_no_daemon_ran(place, monkeypatch):
    monkeypatch.setattr(module, "BACKGROUND_S", 3600.0)
    hooks = [a_hook("later", priority=Priority.BACKGROUND), a_hook("other")]
    async with place.delivering(*hooks) as before:
        await place.tell("/warm")
        await eventually(lambda: len(before.order) == 2)
    await place.tell("/a")
    async with place.delivering(*hooks) as after:
        await eventually(lambda: len(after.order) == 2)
        assert after.order == ["other", "later"]


async def test_what_the_log_can_not_have_is_delivered_as_it_comes(place):
    """The database's own failure above all: it is told to whoever runs now."""
    async with place.delivering(a_hook("one", HookEvent.ON_DB_ERROR)) as hooks:
        place.published.bus.publish(Event("catalog.failed", SystemClock().now(), data={"error": {"code": "no_space"}}))
        await eventually(lambda: hooks.told["one"])
        assert hooks.told["one"][0].data["error"] == {"code": "no_space"}


async def test_a_hook_finds_the_metrics_of_its_checkpoint_under_their_own_names(place):
    """M057."""
    of = await experiment(place.catalog)
    staged = await place.catalog.write(
        lambda tx: checkpoints.stage(tx, a_checkpoint(of, metrics={"val_loss": 0.25}, tags=("x",)))
    )
    row = staged.checkpoint

    async def tell(tx) -> None:
        tx.tell("checkpoint.pinned", {"project": row.project, "note": "mine"}, experiment=of, checkpoint=row.id)

    async with place.delivering(a_hook("one", PINNED)) as hooks:
        await place.catalog.write(tell)
        await eventually(lambda: hooks.told["one"])
    [context] = hooks.told["one"]
    assert (context.experiment_id, context.checkpoint_id) == (of, row.id)
    assert context.data["val_loss"] == context.data["metrics"]["val_loss"] == 0.25
    assert (context.data["note"], context.data["tags"], context.data["step"]) == ("mine", ["x"], row.step)


async def test_a_finding_names_what_it_is_about_as_people_do(place):
    """A line of the log that says "1 nan" and not of which step helps nobody."""
    of = await experiment(place.catalog)
    row = (await place.catalog.write(lambda tx: checkpoints.stage(tx, a_checkpoint(of)))).checkpoint

    async def tell(tx) -> None:
        tx.tell("checkpoint.pinned", {"note": ""}, experiment=of, checkpoint=row.id)
        tx.tell("checkpoint.pinned", {"note": ""}, experiment=of)
        tx.tell("checkpoint.pinned", {"note": ""})

    async with place.delivering(a_hook("one", PINNED)) as hooks:
        hooks.findings = (Finding(Level.WARNING, "odd"),)
        await place.catalog.write(tell)
        await eventually(lambda: place.published.names.count("hook.finding") == 3)
    found = [event.data for event in place.published.events if event.name == "hook.finding"]
    called = {"project": row.project, "name": row.experiment}
    told = {"hook": "one", "level": "warning", "text": "odd", "facts": {}}
    assert found == [called | {"step": row.step} | told, called | told, told]


async def test_runs_findings_and_counts_are_kept_over_a_restart(place):
    """M058."""
    async with place.delivering(a_hook("one")) as hooks:
        hooks.findings, hooks.opened = (Finding(Level.WARNING, "odd", {"n": 1}),), True
        await place.tell("/a", "/b")
        with anyio.fail_after(30):  # told, and then written down
            while len((await place.catalog.read(lambda conn: hookruns.runs(conn, name="one")))[0]) < 2:
                await anyio.sleep(0.01)
    logged, _ = await place.catalog.read(lambda conn: hookruns.runs(conn, name="one"))
    assert [one.run.key for one in logged] == [context.key for context in hooks.told["one"]][::-1]
    assert {one.run.outcome for one in logged} == {"ok"}
    found = [event.data for event in place.published.events if event.name == "hook.finding"]
    assert found == [{"hook": "one", "level": "warning", "text": "odd", "facts": {"n": 1}}] * 2
    assert [event.data["error"] for event in place.published.events if event.name == "hook.opened"] == ["it broke"] * 2
    async with place.delivering(a_hook("one")) as hooks:
        await place.tell("/c")
        await eventually(lambda: hooks.delivery.state_of("one")[0].get("ok") == 3)


async def test_findings_about_findings_are_kept_and_not_told_so_that_two_hooks_never_go_on_for_ever(place):
    async with place.delivering(a_hook("one"), a_hook("echo", HookEvent.HOOK_FINDING)) as hooks:
        hooks.findings = (Finding(Level.INFO, "odd"),)
        await place.tell("/a")
        await eventually(lambda: len(hooks.told["echo"]) == 1)
        await place.tell("/b")
        await eventually(lambda: len(hooks.told["echo"]) == 2)
        await anyio.sleep(0.1)
    assert place.published.names.count("hook.finding") == 2


async def test_facts_wait_for_a_hook_whose_code_was_not_asked_yet_where_it_runs(place):
    spec = Spec(name="mine", kind=Kind.PYTHON, target="pack.mine:hook")
    async with place.delivering(spec) as hooks:
        await place.tell("/a")
        await anyio.sleep(0.05)
        said = {"name": "hook", "events": ["root.added"], "priority": None, "timeout_s": None}
        hooks.delivery.registry.declare("mine", [said])
        await place.tell("/b")
        await eventually(lambda: hooks.roots("mine") == ["/a", "/b"])
