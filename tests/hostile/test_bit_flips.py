"""One flipped bit anywhere in a stored checkpoint, its manifest included: found, named by file and by MiB (S6, F10)."""

import random
from pathlib import Path

import pytest

from tests.support import tally
from tests.support.in_process import Training, a_tensor, daemon, eventually

MIB = 1 << 20
FILES = {
    "model.safetensors": a_tensor(1, 3 * MIB + 4321),
    "optimizer.safetensors": a_tensor(2, MIB + 99),
    "state.json": b'{"v":1,"state":{"step":7}}',
}


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def wrong(told: list[dict], name: str, at: int) -> str:
    """What is wrong with what verify told of a flip; "" when it told exactly that."""
    if [damage["file"] for damage in told] != [name]:
        return f"byte {at} of {name}: told {told}"
    return "" if told[0]["mib"] == [at // MIB] else f"byte {at} of {name}: told MiB {told[0]['mib']}"


async def flips_found(directory: Path, count: int) -> None:
    """Flip one bit at a time, ask the daemon to read the checkpoint back, flip it back."""
    seed = random.SystemRandom().randrange(1 << 32)
    rng, missed = random.Random(seed), []
    async with daemon(directory) as node, node.connect() as line:
        saved = await (await Training(line, str(node.runs)).open()).saved(1, files=FILES)
        place = Path((await line.ask("resolve", selector=saved))["path"])
    names = sorted(path.name for path in place.iterdir())
    assert names == sorted([*FILES, "manifest.json"])
    # Another daemon, without the arena: nothing is there to repair it from.
    async with daemon(directory, front=False) as node, node.connect() as line:
        for number in range(count):
            name = names[number % len(names)]
            at, bit = rng.randrange((place / name).stat().st_size), rng.randrange(8)
            flip(place / name, at, bit)
            [result] = (await line.ask("verify", selector=saved))["results"]
            problem = wrong(result["damage"], name, at)
            missed += [problem] if problem else []
            assert (result["state"], result["ok"]) == ("corrupt", False) or missed
            flip(place / name, at, bit)
        [result] = (await line.ask("verify", selector=saved))["results"]
        assert result["ok"], "every bit is back in its place"
    tally.add("bit flips", count)
    tally.add("bit flips found", count - len(missed))
    tally.add("violations", len(missed))
    assert missed == [], f"seed {seed}"


async def test_fifty_flipped_bits_are_found_in_their_file_and_mib(short_dir):
    """F10, short form."""
    await flips_found(short_dir, 52)


@pytest.mark.faults
@pytest.mark.timeout(280)
async def test_a_thousand_flipped_bits_are_all_found_in_their_file_and_mib(short_dir):
    """F10, long form."""
    await flips_found(short_dir, 1000)


@pytest.mark.parametrize("harm", ["gone", "a symlink", "cut", "another checkpoint's"])
async def test_a_manifest_that_is_not_the_one_that_was_written_is_damage(short_dir, harm):
    """I5: without it the catalog could not be made again from the disk."""
    async with daemon(short_dir) as node, node.connect() as line:
        run = await Training(line, str(node.runs)).open()
        saved, other = await run.saved(1, files=FILES), await run.saved(2, files=FILES)
        places = [Path((await line.ask("resolve", selector=one))["path"]) for one in (saved, other)]
    manifest = places[0] / "manifest.json"
    body = manifest.read_bytes()
    manifest.unlink()
    if harm == "a symlink":
        (short_dir / "m").write_bytes(body)
        manifest.symlink_to(short_dir / "m")
    elif harm == "cut":
        manifest.write_bytes(body[:-1])
    elif harm == "another checkpoint's":
        manifest.write_bytes((places[1] / "manifest.json").read_bytes())
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        [result] = (await line.ask("verify", selector=saved))["results"]
        assert ([damage["file"] for damage in result["damage"]], result["state"]) == (["manifest.json"], "corrupt")
        manifest.unlink(missing_ok=True)
        manifest.write_bytes(body)
        [result] = (await line.ask("verify", selector=saved))["results"]
        assert (result["ok"], result["state"]) == (True, "live")


async def test_a_damaged_manifest_is_written_again_from_the_hot_copy(short_dir):
    """And what the repair wrote is what the next verify compares with."""
    async with daemon(short_dir) as node, node.connect() as line:
        saved = await (await Training(line, str(node.runs)).open()).saved(1, files=FILES)
        place = Path((await line.ask("resolve", selector=saved))["path"])
        flip(place / "manifest.json", 10, 0)
        [result] = (await line.ask("verify", selector=saved))["results"]
        assert [damage["file"] for damage in result["damage"]] == ["manifest.json"]

        async def repaired() -> bool:
            shown = (await line.ask("show", selector=saved))["checkpoint"]
            return (shown["state"], shown["level"]) == ("live", "verified")

        await eventually(repaired)
        [result] = (await line.ask("verify", selector=saved))["results"]
        assert result["ok"]
