"""Answers in memory are what a read would say, whatever happened before (M084, M085, M086)."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.catalog.edition import PROGRESS, Edition
from ckptd.query.answers import ENTRY_BYTES, Answers

OPERATIONS = 10_000


class Model:
    """A database that says how often each key was written, and a cache in front of it that is not ours."""

    def __init__(self) -> None:
        self.rows: dict[bytes, int] = {}
        self.edition = 0

    def write(self, key: bytes) -> None:
        self.rows[key] = self.rows.get(key, 0) + 1
        self.edition += 1

    def read(self, key: bytes) -> bytes:
        return b"%s=%d " % (key, self.rows.get(key, 0)) * (1 + len(key) % 7)


def test_ten_thousand_random_operations_and_no_stale_read():
    """M084, M086: a written value is in the next read; the cache is worth something all the same."""
    dice = random.Random(4)
    model, cache, now_s = Model(), Answers(entries_max=12, bytes_max=12 * ENTRY_BYTES), 0.0
    ends: dict[bytes, float] = {}
    for _ in range(OPERATIONS):
        now_s += dice.choice((0.0, 0.01, 0.5))
        key = b"k%d" % dice.randrange(20)
        if dice.random() < 0.05:
            model.write(key)
            continue
        found = cache.get(key, model.edition, now_s)
        if found is None:
            lives_s = dice.choice((0.1, 1.0, 30.0))
            ends[key] = now_s + lives_s
            begun = model.edition
            if dice.random() < 0.1:
                model.write(key)  # a commit in the middle of the read, seen by it or not
            cache.put(key, begun, model.read(key), ends[key])
        else:
            assert found == model.read(key)
            assert now_s < ends[key], "it lived longer than it was given"
        assert cache.bytes_used <= cache.bytes_max
        assert len(cache) <= cache.entries_max
    assert cache.hits > OPERATIONS / 10
    assert cache.hits + cache.misses < OPERATIONS


@given(
    st.lists(st.tuples(st.binary(max_size=3), st.integers(0, 4000)), max_size=60),
    st.integers(1, 8),
    st.integers(0, 20_000),
)
@settings(max_examples=100)
def test_neither_entries_nor_bytes_are_ever_exceeded(puts, entries_max, bytes_max):
    """M085: bytes, not only entries."""
    cache = Answers(entries_max, bytes_max)
    for key, size in puts:
        cache.put(key, 0, b"x" * size, 1.0)
        assert cache.bytes_used <= bytes_max
        assert len(cache) <= entries_max
        known = [key for key in {key for key, _ in puts} if cache.get(key, 0, 0.0) is not None]
        assert cache.bytes_used == sum(ENTRY_BYTES + len(k) + len(cache.get(k, 0, 0.0) or b"") for k in known)


def test_the_one_unused_for_longest_goes_first():
    cache = Answers(2, 1 << 20)
    cache.put(b"a", 0, b"1", 9.0)
    cache.put(b"b", 0, b"2", 9.0)
    assert cache.get(b"a", 0, 0.0) == b"1"
    cache.put(b"c", 0, b"3", 9.0)
    assert [cache.get(key, 0, 0.0) for key in (b"a", b"b", b"c")] == [b"1", None, b"3"]


def test_a_time_to_live_is_the_entrys_own_and_setting_it_again_begins_anew():
    """M084: by the time that it is told, which is monotonic."""
    cache = Answers(8, 1 << 20)
    cache.put(b"a", 0, b"1", 5.0)
    cache.put(b"b", 0, b"2", 50.0)
    assert cache.get(b"a", 0, 4.9) == b"1"
    cache.put(b"a", 0, b"1", 20.0)
    assert cache.get(b"a", 0, 19.9) == b"1"
    assert cache.get(b"a", 0, 20.0) is None
    assert cache.get(b"b", 0, 20.0) == b"2"


def test_an_answer_of_another_edition_is_none_also_of_a_later_one():
    cache = Answers(8, 1 << 20)
    cache.put(b"a", 3, b"1", 9.0)
    assert cache.get(b"a", 4, 0.0) is None
    cache.put(b"a", 4, b"2", 9.0)
    assert cache.get(b"a", 3, 0.0) is None, "whoever asks saw an older edition"


def test_an_answer_too_large_for_the_cache_is_not_kept_and_the_old_one_is_gone():
    cache = Answers(8, 1000)
    cache.put(b"a", 0, b"small", 9.0)
    cache.put(b"a", 0, b"x" * 2000, 9.0)
    assert cache.get(b"a", 0, 0.0) is None
    assert cache.bytes_used == 0


# -- the edition that they go by --------------------------------------------------------------------


def counted(*statements: str) -> set[str]:
    edition = Edition()
    for statement in statements:
        edition.note(statement)
    edition.bump()
    return set(edition._committed)


def test_every_statement_that_may_change_a_table_counts_for_it():
    assert counted("INSERT INTO pin (a) VALUES (?)") == {"pin"}
    assert counted('UPDATE "checkpoint" SET x=?') == {"checkpoint"}
    assert counted("delete from lease where 1") == {"lease"}
    assert counted("INSERT OR IGNORE INTO tag VALUES (1)") == {"tag"}
    assert counted("SELECT 1", "BEGIN IMMEDIATE", "SAVEPOINT a", "PRAGMA x") == set()


def test_a_statement_that_nobody_foresaw_counts_for_every_table():
    assert counted("WITH x AS (SELECT 1) DELETE FROM pin") == {"*"}
    assert counted("DROP TABLE pin") == {"*"}
    edition = Edition()
    before = edition.of(frozenset({"pin"}))
    edition.note("VACUUM")
    edition.bump()
    assert edition.of(frozenset({"pin"})) > before


def test_how_far_an_experiment_is_counts_apart_and_only_that():
    where = " WHERE experiment.id = ?"
    assert counted("UPDATE experiment SET last_step=?, heartbeat_at=?" + where) == {PROGRESS}
    assert counted("UPDATE experiment SET status=?, last_step=?, heartbeat_at=?" + where) == {"experiment"}
    assert counted("UPDATE experiment SET last_step=?, name=?" + where) == {"experiment"}


def test_an_edition_holds_until_it_is_bumped_and_never_goes_down():
    edition = Edition()
    edition.note("UPDATE pin SET a=1")
    assert edition.of() == 0
    edition.bump()
    edition.bump()
    assert edition.of() == 1
    assert edition.of(frozenset({"pin"})) == 0


def test_what_is_over_is_dropped_although_nobody_asks_for_it_again():
    cache = Answers(entries_max=100, bytes_max=1 << 20)
    for number in range(10):
        cache.put(b"%d" % number, 1, b"page", until_s=float(number))
    cache.sweep(4.0)
    assert [cache.get(b"%d" % number, 1, 4.0) for number in range(10)] == [None] * 5 + [b"page"] * 5
    assert (len(cache), cache.bytes_used) == (5, 5 * (1 + 4 + ENTRY_BYTES))
