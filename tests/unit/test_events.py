"""The bus: bounded, in order, and nobody who publishes waits."""

from datetime import UTC, datetime

import anyio
import pytest

from ckptd import errors
from ckptd.events import EVENTS, MISSED, Bus, Event

AT = datetime(2030, 1, 1, tzinfo=UTC)


def numbered(n: int) -> Event:
    return Event("checkpoint.staged", AT, checkpoint="c", data={"step": n})


async def test_every_subscriber_gets_every_event_in_order():
    bus = Bus()
    async with bus.subscribe() as one, bus.subscribe() as two:
        for n in range(3):
            bus.publish(numbered(n))
        for subscriber in (one, two):
            assert [(await anext(subscriber)).data["step"] for _ in range(3)] == [0, 1, 2]


async def test_a_slow_subscriber_loses_the_oldest_and_is_told_how_many():
    bus = Bus()
    async with bus.subscribe(queued_max=3) as slow:
        for n in range(10):
            bus.publish(numbered(n))
        missed = await anext(slow)
        assert (missed.name, missed.data) == (MISSED, {"count": 7})
        assert [(await anext(slow)).data["step"] for _ in range(3)] == [7, 8, 9]
        bus.publish(numbered(10))
        assert (await anext(slow)).data["step"] == 10


async def test_a_subscriber_wakes_when_something_is_published():
    bus = Bus()
    seen = []

    async def read(events) -> None:
        seen.append(await anext(events))

    async with bus.subscribe() as events, anyio.create_task_group() as group:
        group.start_soon(read, events)
        await anyio.wait_all_tasks_blocked()
        assert seen == []
        bus.publish(numbered(1))
    assert seen == [numbered(1)]


async def test_who_left_gets_nothing_and_costs_nothing():
    bus = Bus()
    async with bus.subscribe():
        pass
    bus.publish(numbered(1))
    assert bus._subscriptions == []


async def test_publishing_without_subscribers_is_fine():
    Bus().publish(numbered(1))


@pytest.mark.parametrize(
    "event", [Event("checkpoint.exploded", AT), Event("checkpoint.staged", AT, data={"colour": "red"})]
)
async def test_an_undeclared_event_or_key_is_a_bug(event):
    with pytest.raises(errors.Bug):
        Bus().publish(event)


def test_every_declared_name_is_noun_verb_and_says_what_it_means():
    for name, declared in EVENTS.items():
        noun, _, verb = name.partition(".")
        assert noun.isidentifier(), name
        assert verb.isidentifier(), name
        assert declared.meaning
        assert len(set(declared.keys)) == len(declared.keys)


def test_an_event_travels_as_plain_json_values():
    wire = Event("checkpoint.staged", AT, "e", "c", {"step": 1}, 7).to_wire()
    assert wire == {
        "name": "checkpoint.staged",
        "at": "2030-01-01T00:00:00+00:00",
        "experiment": "e",
        "checkpoint": "c",
        "data": {"step": 1},
        "seq": 7,
    }
