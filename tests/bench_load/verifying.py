"""Reading back: how close the verification of large checkpoints comes to bare SHA-256 on every core."""

import hashlib
import json
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench_load.outcome import Outcome, percentile, told
from tests.bench_load.plant import Plant, planted
from tests.bench_load.scale import Scale
from tests.bench_load.swarm import Talker

SHARE = 0.85
ROUNDS = 3
BLOCK = 8 << 20
RAW_S = 2.0
READY_S = 120.0


def measure(scale: Scale) -> Iterator[Outcome]:
    """Return the rows of this file."""
    cores = os.cpu_count() or 1
    with planted(scale.folder) as plant:
        plant.start()
        saved = [_checkpoint(plant, number, scale.verify_bytes) for number in range(cores)]
        verified, hashed, read = [], [], []
        for _ in range(ROUNDS):
            hashed.append(_together([_hash] * cores))
            read.append(_together([lambda path=path: _read(path) for path, _ in saved]))
            verified.append(_verify(plant, [checkpoint for _, checkpoint in saved], scale.verify_bytes))
    best, disk, ours = (percentile(rates, 0.5) for rates in (hashed, read, verified))
    yield Outcome(
        what=f"verifying {cores} checkpoints of {scale.verify_bytes >> 20:,} MiB side by side",
        target=f"≥ {SHARE:.0%} of SHA-256 on {cores} cores",
        measured=f"{ours / best:.0%}: {ours / 1e9:.2f} of {best / 1e9:.2f} GB/s",
        met=ours / best >= SHARE,
        runs=ROUNDS,
        note="medians; bytes are read from the disk, past the page cache, and digested twice (SHA-256 and the damage map)",
    )
    yield told(
        "the disk's share in it",
        f"{disk / 1e9:.2f} GB/s",
        ROUNDS,
        "the same files read with O_DIRECT by as many threads, nothing else done",
    )


def _checkpoint(plant: Plant, number: int, size_bytes: int) -> tuple[Path, str]:
    """Write a whole safetensors file of noise, hand it over, wait until it is verified."""
    path = plant.dir / f"large_{number}.safetensors"
    header = json.dumps({"w": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(size_bytes // BLOCK):
            file.write(os.urandom(BLOCK))
        os.fsync(file.fileno())
    checkpoint = plant.ckpt("submit", str(path), "--project", "large", "--experiment", f"run-{number}")["checkpoint"]
    plant.wait_level(checkpoint, patience_s=READY_S)
    return path, checkpoint


def _together(works: list[Callable[[], int]]) -> float:
    """Run works that return how many bytes they went through, one thread each; return bytes per second of all."""
    done: list[int] = []
    threads = [threading.Thread(target=lambda work=work: done.append(work())) for work in works]
    begun_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - begun_s)


def _hash() -> int:
    body, done, begun_s = memoryview(bytearray(BLOCK)), 0, time.perf_counter()
    while time.perf_counter() - begun_s < RAW_S:
        hashlib.sha256(body).digest()
        done += BLOCK
    return done


def _read(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system without it: from the page cache, if the file is there
        fd = os.open(path, os.O_RDONLY)
    done = 0
    with mmap.mmap(-1, BLOCK) as buffer:
        while count := os.preadv(fd, [buffer], done):
            done += count
            if count < BLOCK:
                break
    os.close(fd)
    return done


def _verify(plant: Plant, checkpoints: list[str], size_bytes: int) -> float:
    """Have all of them read back at once; return bytes per second."""
    talkers = [Talker(plant.socket, plant.runs, number) for number in range(len(checkpoints))]
    begun_s = time.perf_counter()
    for talker, checkpoint in zip(talkers, checkpoints, strict=True):
        talker.send("verify", selector=checkpoint)
    for talker in talkers:
        answered = False
        while not answered:
            for found in talker.receive():
                assert found["ok"], found
                assert found["results"][0]["ok"], found
                answered = True
    took_s = time.perf_counter() - begun_s
    for talker in talkers:
        talker.close()
    return len(checkpoints) * size_bytes / took_s
