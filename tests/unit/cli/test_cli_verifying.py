"""verify: through the daemon, and of a directory by its own manifest with no daemon at all."""

import hashlib
import json

import pytest
import xxhash

from ckptd.cli.verifying import _ranges
from ckptd.errors import Missing, NotFound

MIB = 1 << 20
ID = "6f1c0e3a9b7d4c52a1e8f00d5b6c7a89"


def _record(name, body):
    return {
        "path": name,
        "size_bytes": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
        "xxh3": [xxhash.xxh3_64_hexdigest(body[at : at + MIB]) for at in range(0, len(body), MIB)],
    }


@pytest.fixture
def managed(tmp_path):
    """A managed checkpoint's directory: 3.5 MiB of a tensor, some state, and the manifest."""
    directory = tmp_path / "imagenet" / "resnet50" / "step_0000001000"
    directory.mkdir(parents=True)
    size = 3 * MIB + MIB // 2
    header = json.dumps({"fc.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    bodies = {
        "model.safetensors": len(header).to_bytes(8, "little") + header + bytes(range(256)) * (size // 256),
        "state.json": b'{"v":1}',
    }
    for name, body in bodies.items():
        (directory / name).write_bytes(body)
    manifest = {"v": 1, "checkpoint": ID, "project": "imagenet", "experiment": "resnet50", "step": 1000}
    manifest["files"] = [_record(name, body) for name, body in bodies.items()]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_a_whole_directory_is_ok_without_a_daemon(run, managed):
    ran = run("verify", str(managed))
    assert ran.code == 0
    assert ran.out.startswith(f"ok       imagenet/resnet50 step 1000 {ID}  3.5 MiB")


def test_a_flipped_byte_is_exit_code_4_and_names_file_mib_and_tensor(run, managed):
    """M011: the damage is named, down to the MiB and the tensor."""
    with (managed / "model.safetensors").open("r+b") as file:
        file.seek(2 * MIB + 5)
        byte = file.read(1)
        file.seek(2 * MIB + 5)
        file.write(bytes([byte[0] ^ 1]))
    ran = run("verify", str(managed), "--json")
    assert ran.code == 4
    assert ran.json["ok"] is False
    (damage,) = ran.json["results"][0]["damage"]
    assert (damage["file"], damage["kind"], damage["mib"], damage["tensors"]) == (
        "model.safetensors",
        "digest",
        [2],
        ["fc.weight"],
    )
    assert "model.safetensors: digest MiB 2 in fc.weight" in run("verify", str(managed)).out


def test_a_missing_and_a_short_file_are_exit_code_4(run, managed):
    (managed / "state.json").unlink()
    with (managed / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    ran = run("verify", str(managed), "--json")
    assert ran.code == 4
    assert {(d["file"], d["kind"]) for d in ran.json["results"][0]["damage"]} == {
        ("state.json", "missing"),
        ("model.safetensors", "size"),
    }


def test_a_relative_path_is_taken_from_here(run, managed, monkeypatch):
    monkeypatch.chdir(managed.parent)
    assert run("verify", "./step_0000001000").code == 0
    monkeypatch.chdir(managed)
    assert run("verify", ".").code == 0


def test_a_manifest_can_not_lead_out_of_its_directory(run, managed):
    """A manifest is a file like any other: its paths are not believed."""
    (managed.parent / "secret").write_bytes(b"x")
    manifest = json.loads((managed / "manifest.json").read_text())
    manifest["files"] = [_record("../secret", b"x")]
    (managed / "manifest.json").write_text(json.dumps(manifest))
    ran = run("verify", str(managed))
    assert ran.code == 2
    assert "ok  " not in ran.out


@pytest.mark.parametrize("body", ["", "{", "[]", '{"files": 1}', '{"files": [{"path": "x"}]}', "[" * 100_000])
def test_a_damaged_manifest_is_an_error_and_never_ok(run, managed, body):
    (managed / "manifest.json").write_text(body)
    ran = run("verify", str(managed))
    assert ran.code == 7
    assert "manifest" in ran.out
    assert "[invalid_format]" in ran.out


def test_a_manifest_that_says_a_thing_twice_is_not_believed(run, managed):
    """S2: two readers could see two lists of files."""
    whole = (managed / "manifest.json").read_text()
    (managed / "manifest.json").write_text(whole.replace("{", '{"files": [], ', 1))
    ran = run("verify", str(managed))
    assert (ran.code, "[invalid_format]" in ran.out) == (7, True)


def test_a_directory_without_a_manifest_is_exit_code_3(run, tmp_path):
    ran = run("verify", str(tmp_path))
    assert ran.code == 3
    assert "manifest.json" in ran.out


def test_a_selector_is_verified_by_the_daemon(run, daemon):
    ran = run("verify", "latest", "-p", "imagenet")
    assert ran.code == 4
    assert "model.safetensors: digest MiB 3 in fc.weight" in ran.out
    assert daemon.asked("verify") == [{"selector": "latest", "project": "imagenet"}]


def test_all_walks_the_list_and_one_lost_file_does_not_hide_the_rest(run, daemon):
    row = daemon.replies["list"]["checkpoints"][0]
    daemon.replies["list"]["checkpoints"] = [
        {**row, "checkpoint": f"{n:032x}", "state": state}
        for n, state in enumerate(["live", "corrupt", "trashed", "live"])
    ]
    good = {**daemon.replies["verify"]["results"][0], "ok": True, "damage": []}
    daemon.replies["verify"] = [{"results": [good]}, Missing("gone"), {"results": [good]}]
    ran = run("verify", "--all", "-e", "resnet50", "--json")
    assert ran.code == 4
    assert [asked["selector"] for asked in daemon.asked("verify")] == [f"{n:032x}" for n in (0, 1, 3)]
    assert [result["ok"] for result in ran.json["results"]] == [True, False, True]
    assert ran.json["results"][1]["error"]["code"] == "missing"
    assert daemon.asked("list")[0]["name"] == "resnet50"


def test_jsonl_prints_each_result_as_it_comes(run, daemon):
    lines = run("verify", "latest", "best", "--jsonl").out.splitlines()
    assert [json.loads(line)["v"] for line in lines] == [1, 1]


def test_damage_outweighs_what_could_not_be_looked_at(run, daemon):
    daemon.replies["verify"] = [daemon.replies["verify"], NotFound("no such")]
    assert run("verify", "latest", "nothing").code == 4


@pytest.mark.parametrize("words", [["verify"], ["verify", "latest", "--all"]])
def test_verify_of_nothing_or_of_two_minds_is_a_usage_error(run, daemon, words):
    assert run(*words).code == 2


def test_damaged_mib_are_written_as_ranges():
    assert _ranges([9, 3, 4, 5]) == "3-5, 9"
