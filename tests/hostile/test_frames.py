"""Frames against the parser that reads them in the daemon: any bytes are a request or a coded error (S1, S2, S3)."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import BadRequest, UnsupportedVersion
from ckptd.intake import descriptor, service
from ckptd.intake import requests as ask
from ckptd_client import wire
from tests.hostile import frame_noise
from tests.support import tally
from tests.support.in_process import Wire, daemon, eventually, open_fds

HANG_S, GROWTH_BYTES_MAX = 10.0, 20 << 20  # of the processor: what is not linear takes hours
BATCH = 100
SEEDS = frame_noise.good()
SUBMIT = b'{"v":1,"id":7,"op":"submit","path":"/a","checkpoint":"%s","meta":%%s}' % (b"a" * 32)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=30,
)


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- lengths: S1 ----------------------------------------------------------------------------------


def test_a_frame_is_refused_by_its_length_before_more_of_it_is_kept():
    """S1: whatever length a peer has in mind, one byte beyond the limit is the last that is held."""
    splitter, part = wire.Splitter(), b"x" * 65536
    for fed in range(len(part), wire.FRAME_BYTES_MAX + 1, len(part)):
        assert splitter.feed(part) == []
        assert splitter.waiting_bytes == fed
    with pytest.raises(wire.FrameError) as caught:
        splitter.feed(b"x")
    assert caught.value.code == "frame_too_large"


def test_frames_of_no_length_are_passed_over_and_a_full_one_is_taken():
    """S1: empty lines are nothing; exactly the limit is allowed, one more is not."""
    assert wire.Splitter().feed(b"\n\n\n{}\n\n") == [b"{}"]
    full = b"x" * wire.FRAME_BYTES_MAX
    assert wire.Splitter().feed(full + b"\n") == [full]
    with pytest.raises(wire.FrameError, match="frame over"):
        wire.Splitter().feed(full + b"x\n")


async def test_a_length_in_front_as_other_protocols_send_it_is_no_frame(short_dir):
    """S1: 2^31 and 2^64-1 as binary lengths are bytes of a line that is no JSON: one answer, no memory."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        before = rss_bytes()
        for number in (0, 1 << 31, (1 << 64) - 1):
            await line.raw(number.to_bytes(8, "big") + b"{}\n")
            assert (await line.reply(None))["error"]["code"] == "bad_request"
        assert rss_bytes() - before < 8 << 20
        await line.ask("status")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=8), st.data())
def test_however_a_stream_is_cut_the_frames_are_the_same(lines, data):
    """S3: packets end anywhere."""
    stream = b"".join(line.replace(b"\n", b"") + b"\n" for line in lines)
    splitter, found, rest = wire.Splitter(), [], stream
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        found += splitter.feed(rest[:size])
        rest = rest[size:]
    assert found == [line for line in stream.split(b"\n") if line]
    assert splitter.waiting_bytes == 0


# -- meaning: S2 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (b'{"v":1,"id":1,"id":2,"op":"status"}', "twice"),
        (b'{"v":1,"id":1,"op":"stop","op":"status"}', "op|twice"),
        (SUBMIT % b'{"a":1,"a":2}', "twice"),
        (SUBMIT % b'{"b":[{"a":1,"\\u0061":2}]}', "twice"),
        (b'{"v":1,"id":1,"op":"status","colour":{"a":1,"a":2}}', "twice"),
        (b'{"v":1,"id":1,"op":"status","colour":' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper"),
        (SUBMIT % (b'{"a":' * 90_000 + b"1" + b"}" * 90_000), "."),
        (SUBMIT % (b"[" * 500_000 + b"]" * 500_000), "."),
        (SUBMIT % b'{"a":NaN}', "."),
        (SUBMIT % b'{"a":-Infinity}', "."),
        (SUBMIT % (b'{"a":' + b"9" * 100_000 + b"}"), "."),
        (b'{"v":1,"id":' + b"9" * 400 + b',"op":"status"}', "id"),
        (b'{"v":1,"id":1,"op":"list","limit":"many"}', "limit"),
        (b'{"v":1,"id":1,"op":["status"]}', "op"),
        (b'{"v":1,"id":1,"op":"status"}trailing', "."),
        (b'{"v":1,"id":1,"op":"sta\xfftus"}', "."),
        (b'{"v":1,"id":1,"op":"submit","path":"/a\\ud800","checkpoint":"%s"}' % (b"a" * 32), "."),
    ],
    ids=lambda value: value[:40].decode(errors="replace") if isinstance(value, bytes) else value,
)
def test_a_frame_that_could_be_read_in_two_ways_or_in_none_is_refused(frame, says):
    """S2: a key twice, a bomb of depth, what JSON does not know, a wrong type: refused, the field named where one is."""
    with pytest.raises(BadRequest) as caught:
        ask.decode(frame)
    assert re.search(says, caught.value.message)


@pytest.mark.parametrize(
    ("whole", "twice"),
    [
        (b'"checkpoint":', b'"checkpoint":"%s","checkpoint":' % (b"d" * 32)),
        (b'"name": "n"', b'"name": "m", "name": "n"'),
        (b'"offset": 4096', b'"offset": 8192, "off\\u0073et": 4096'),
        (b'"b": null', b'"b": 1, "b": null'),
        (b'"step": 3', b'"colour": {"a": 1, "a": 2}, "step": 3'),
    ],
)
def test_a_descriptor_with_a_key_twice_is_refused(whole, twice):
    """S2: wherever it is, in fields that this daemon does not know as well."""
    raw = frame_noise.DESCRIPTOR
    assert descriptor.decode(raw, frame_noise.ARENA_BYTES).step == 3
    assert whole in raw
    with pytest.raises(BadRequest, match="descriptor: a key occurs twice"):
        descriptor.decode(raw.replace(whole, twice), frame_noise.ARENA_BYTES)


def test_another_version_is_told_which_one_is_spoken():
    with pytest.raises(UnsupportedVersion, match="version 1"):
        ask.decode(b'{"v":2,"id":1,"op":"status"}')


@pytest.mark.parametrize(
    "frame",
    [
        SUBMIT % (b'{"a":[' + b"{}," * 300_000 + b"{}]}"),
        SUBMIT % (b"{" + b",".join(b'"%d":1' % n for n in range(90_000)) + b"}"),
        SUBMIT % (b'{"a":"' + b'\\"' * 500_000 + b'"}'),
        b'{"v":1,"id":1,"op":"list","x":[' + b'"",' * 300_000 + b'""]}',
        b"[" * wire.FRAME_BYTES_MAX,
        b'"' * wire.FRAME_BYTES_MAX,
        b'{"v":1,"id":1,"op":"list","x":"' + b"\\" * 1_000_000,
    ],
    ids=["objects", "keys", "escapes", "texts", "brackets", "quotes", "backslashes"],
)
def test_the_worst_megabyte_costs_its_decoder_less_than_a_second(frame):
    """S2: 10^5 keys, 3 x 10^5 objects, nothing but brackets: all are read in time proportional to their length."""
    assert len(frame) <= wire.FRAME_BYTES_MAX
    began_s = time.thread_time()
    frame_noise.swallow(frame)
    assert time.thread_time() - began_s < HANG_S


@pytest.mark.parametrize("letter", ["\u00e9", "\x7f", "\U0001f600", '\\"'])
async def test_an_error_that_would_repeat_a_whole_frame_is_cut(short_dir, letter):
    """S2: the answer names what was wrong, in JSON that is six times as long; it must fit into a frame itself."""
    text = letter.encode() * (1_000_000 // len(letter.encode()))
    frames = [b'{"v":1,"id":7,"op":"%s"}\n', b'{"v":1,"id":7,"op":"experiment.open","resume":"%s"}\n']
    async with daemon(short_dir, front=False) as node:
        line = Wire.to(node.directory / "s")  # not even greeted
        for frame in frames:
            await line.raw(frame % text)
            error = (await line.reply(7))["error"]
            assert (error["code"], len(error["message"]) < 5000) == ("bad_request", True)
        line.close()
        async with node.connect() as other:
            await other.ask("status")


async def test_a_large_frame_is_decoded_beside_the_event_loop_and_a_small_one_on_it(short_dir, monkeypatch):
    """S2: a megabyte of objects takes a tenth of a second, which no other peer has to wait."""
    real, where = ask.decode, {}

    def decode(frame):
        where[len(frame) > service.INLINE_BYTES_MAX] = threading.current_thread() is threading.main_thread()
        return real(frame)

    monkeypatch.setattr(ask, "decode", decode)
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        await line.raw(SUBMIT % (b'{"a":[' + b"{}," * 340_000 + b'{}],"a":1}') + b"\n")
        assert (await line.reply(7))["error"]["code"] == "bad_request"
        await line.ask("status")
    assert where == {True: False, False: True}


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_the_depth_that_is_counted_is_the_depth_that_a_parser_finds(value):
    """S2: the count looks at brackets only, and must see none in a string and miss none outside."""

    def depth_of(item):
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else None
        return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)

    padded = [value, *[[] for _ in range(wire.DEPTH_MAX)], '\\"[{"\\\\']
    for wrap in range(wire.DEPTH_MAX - 3, wire.DEPTH_MAX + 2):
        nested: object = padded
        for _ in range(wrap):
            nested = [nested]
        raw = json.dumps(nested).encode()
        if depth_of(nested) > wire.DEPTH_MAX:
            with pytest.raises(wire.FrameError):
                wire.check_depth(raw)
        else:
            wire.check_depth(raw)


@settings(max_examples=200, deadline=None)
@given(JSON, st.text(max_size=6))
def test_a_key_that_occurs_twice_anywhere_is_found(value, key):
    name = json.dumps(key)
    wire.check_keys(json.dumps({"a": value}).encode())
    with pytest.raises(wire.FrameError, match="twice"):
        wire.check_keys(f'{{"a":[{json.dumps(value)},{{{name}:1,{name}:2}}]}}'.encode())


# -- noise: S3 ------------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 1 << 32))
def test_a_damaged_frame_is_a_request_or_a_coded_error(seed):
    """S3: hypothesis names the seed of a frame that is neither."""
    rng = random.Random(seed)
    frame_noise.swallow(frame_noise.damaged(rng, SEEDS))
    frame_noise.swallow_descriptor(frame_noise.damaged(rng, [frame_noise.DESCRIPTOR, *SEEDS]))
    frame_noise.swallow_reply(frame_noise.damaged(rng, SEEDS))


def swallow_many(count: int, seed: int) -> None:
    """Feed at least `count` frames; no crash, no frame over HANG_S, no growth. Counts them."""
    rng = random.Random(seed)
    for _ in range(2000):  # caches fill
        frame_noise.swallow(frame_noise.damaged(rng, SEEDS))
    before, fed, refused, slowest_s = rss_bytes(), 0, 0, 0.0
    while fed < count:
        batch = [frame_noise.damaged(rng, SEEDS) for _ in range(BATCH)]
        for data in batch:
            began_s = time.thread_time()
            taken, bad = frame_noise.swallow(data)
            slowest_s = max(slowest_s, time.thread_time() - began_s)
            fed, refused = fed + taken, refused + bad
        frame_noise.swallow_descriptor(frame_noise.damaged(rng, [frame_noise.DESCRIPTOR]))
    grown = rss_bytes() - before
    tally.add("fuzzed frames", fed)
    tally.add("violations", (slowest_s > HANG_S) + (grown > GROWTH_BYTES_MAX))
    assert slowest_s <= HANG_S, f"seed {seed}: a frame took {slowest_s:.2f} s"
    assert grown <= GROWTH_BYTES_MAX, f"seed {seed}: grew by {grown} bytes"
    assert 0.3 * fed < refused < fed, "damage that is always refused, or never, tests nothing"


def test_ten_thousand_damaged_frames_crash_hang_and_leak_nothing():
    """S3, short form."""
    swallow_many(10_000, seed=random.SystemRandom().randrange(1 << 32))


@pytest.mark.faults
@pytest.mark.timeout(280)
def test_a_million_damaged_frames_crash_hang_and_leak_nothing():
    """S3, long form."""
    swallow_many(1_000_000, seed=random.SystemRandom().randrange(1 << 32))


async def talk(node, count: int, seed: int) -> None:
    """Send damaged frames over a live socket, some connections long; the daemon answers each honest question between."""
    rng, sent, broken = random.Random(seed), 0, 0
    harmless = frame_noise.good(ending=False)
    line: Wire | None = None
    while sent < count:
        if line is None:
            line = Wire.to(node.directory / "s")
            await line.ask("hello", versions=[1], client="noise")
        batch = [frame_noise.damaged(rng, harmless) for _ in range(BATCH)]
        sent += len(batch)
        try:
            await line.raw(b"".join(data + b"\n" for data in batch))
            line._last = 10**9 + sent
            number = await line.send("watch", checkpoints=[])
            assert (await line.reply(number))["ok"]
        except (ConnectionError, wire.FrameError) as error:
            broken += 1
            assert broken <= count // 20, f"seed {seed}: {error}"
        bugs = [reply for reply in line._replies if not reply["ok"] and reply["error"]["code"] == "bug"]
        assert bugs == [], f"seed {seed}"
        line._replies.clear()
        if rng.random() < 0.2 or broken:
            line.close()
            line = None
    if line is not None:
        line.close()
    tally.add("fuzzed frames", sent)


async def _live(directory, count: int) -> None:
    before = open_fds()
    async with daemon(directory, front=False) as node:
        await talk(node, count, seed=random.SystemRandom().randrange(1 << 32))
        async with node.connect() as line:
            assert (await line.ask("status"))["ok"]
        await eventually(lambda: not node.parts.listener.peers)
    await eventually(lambda: open_fds() <= before + 2)  # an earlier test's threads may have some in hand


async def test_a_live_daemon_answers_through_damaged_frames(short_dir):
    """S3, short form: real socket, real handlers, a catalog behind them; no answer is a defect of ours."""
    await _live(short_dir, 1_000)


@pytest.mark.faults
@pytest.mark.timeout(280)
async def test_a_live_daemon_answers_through_twenty_thousand_damaged_frames(short_dir):
    """S3, long form."""
    await _live(short_dir, 20_000)


def fuzz(runs: int) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs atheris for coverage-guided frames")
    command = [sys.executable, "-m", "tests.hostile.fuzz_frames", f"-atheris_runs={runs}"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"Done {runs}" in done.stderr
    tally.add("fuzzed frames", runs)


@pytest.mark.timeout(1000)
def test_coverage_leads_a_fuzzer_to_no_defect_in_ten_thousand_frames():
    """S3, short form."""
    fuzz(10_000)


@pytest.mark.faults
@pytest.mark.timeout(1000)
def test_coverage_leads_a_fuzzer_to_no_defect_in_two_hundred_thousand_frames():
    """S3, long form."""
    fuzz(200_000)
