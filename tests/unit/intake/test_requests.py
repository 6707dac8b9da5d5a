"""What comes over the wire is a request or a coded error, whatever the bytes (M019; reliability S2, S3)."""

import json
import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import BadPath, BadRequest, CkptdError, UnsupportedVersion
from ckptd.intake import descriptor, manifest
from ckptd.intake import requests as ask
from ckptd_client import wire

GOLDEN = Path(__file__).parents[2] / "golden/wire"
IDS = st.text("0123456789abcdef", min_size=32, max_size=32)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
OPS = sorted(str(kind.__struct_config__.tag) for kind in ask.ALL)
FIELDS = sorted({name for kind in ask.ALL for name in kind.__struct_fields__})


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_a_coded_error(frame):
    try:
        ask.decode(frame)
    except CkptdError as error:
        assert error.to_wire()["code"] in {"bad_request", "unsupported_version"}
    ask.request_id(frame)


@settings(max_examples=500)
@given(st.sampled_from(OPS), st.dictionaries(st.sampled_from(FIELDS), JSON | IDS, max_size=6))
def test_any_fields_of_any_op_are_a_request_or_a_coded_error(op, fields):
    frame = json.dumps({"v": 1, "id": 1, **fields, "op": op}).encode("utf-8", "surrogatepass")
    try:
        request = ask.decode(frame)
    except CkptdError as error:
        assert error.message
    else:
        assert type(request).__struct_config__.tag == op


@pytest.mark.parametrize(
    "frame",
    [
        b"[" * 100_000,
        b'{"op":"experiment.open","id":1,"config":' + b'{"a":' * 90_000,
        b'{"op":"metrics","id":1,"experiment":"%s","points":[["a",%s,1,1]]}' % (b"a" * 32, b"9" * 40),
        b'{"op":"metrics","id":1,"experiment":"%s","points":[["a",1,1,1e300]]}' % (b"a" * 32),
        b'{"op":"experiment.beat","id":1,"experiment":"%s","step":%s}' % (b"a" * 32, b"9" * 30),
        b'{"op":"events","id":1,"since_seq":99999999999999999999}',
        b'{"op":"submit","id":1,"path":"\\ud800","checkpoint":"%s"}' % (b"a" * 32),
        b'{"op":"nothing","id":1}',
        b'{"op":"commit","id":1}',
        b"\xff\xfe",
        b"NaN",
        b"",
    ],
)
def test_hostile_frames_are_refused_and_name_their_reason(frame):
    with pytest.raises(BadRequest) as caught:
        ask.decode(frame)
    assert caught.value.message


def test_free_objects_may_not_nest_deeper_than_frames():
    deep: object = 0
    for _ in range(wire.DEPTH_MAX + 2):
        deep = {"a": deep}
    frame = json.dumps({"op": "submit", "id": 1, "path": "/a", "checkpoint": "a" * 32, "meta": deep}).encode()
    with pytest.raises(BadRequest, match="meta nests deeper"):
        ask.decode(frame)


def test_a_wrong_field_is_named():
    """M019: one error that says which field, and what is wrong with it."""
    with pytest.raises(BadRequest, match=r"limit"):
        ask.decode(b'{"op":"list","id":1,"limit":0}')


def test_another_version_is_refused_as_such():
    with pytest.raises(UnsupportedVersion):
        ask.decode(b'{"op":"status","id":1,"v":2}')


def test_unknown_fields_of_a_newer_client_are_ignored():
    assert isinstance(ask.decode(b'{"op":"status","id":1,"colour":"red"}'), ask.Status)


# -- frames of the past --------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_a_frame_of_an_older_client_still_decodes_to_what_it_meant(path):
    """Stored frames are only ever added: a trainer that runs for weeks outlives its daemon's version."""
    stored = json.loads(path.read_text())
    request = ask.decode(json.dumps(stored["frame"]).encode())
    meant = json.loads(msgspec.json.encode(request))
    assert {key: meant[key] for key in stored["means"]} == stored["means"]


def test_every_op_has_a_stored_frame():
    stored = {json.loads(path.read_text())["frame"]["op"] for path in GOLDEN.glob("*.json")}
    assert stored >= set(OPS)


# -- descriptors and manifests --------------------------------------------------------------------


def a_descriptor(**more) -> dict:
    experiment = {"id": "e" * 32, "project": "p", "name": "n", "dir": "/runs"}
    return {
        "checkpoint": "c" * 32,
        "experiment": {**experiment, **more.pop("experiment", {})},
        "files": [{"path": "model.safetensors", "offset": 4096, "size_bytes": 100}],
        **more,
    }


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"files": []}, BadRequest),
        ({"files": [{"path": "a", "offset": 0, "size_bytes": 1}]}, BadRequest),
        ({"files": [{"path": "a", "offset": 4097, "size_bytes": 1}]}, BadRequest),
        ({"files": [{"path": "a", "offset": 4096, "size_bytes": -1}]}, BadRequest),
        ({"files": [{"path": "a", "offset": 4096, "size_bytes": 1 << 40}]}, BadRequest),
        ({"files": [{"path": "a", "offset": 4096, "size_bytes": 1}] * 2}, BadRequest),
        ({"files": [{"path": "../a", "offset": 4096, "size_bytes": 1}]}, BadPath),
        ({"files": [{"path": "manifest.json", "offset": 4096, "size_bytes": 1}]}, BadPath),
        ({"files": [{"path": ".hidden", "offset": 4096, "size_bytes": 1}]}, BadPath),
        ({"experiment": {"name": "a/b"}}, BadPath),
        ({"experiment": {"project": ".."}}, BadPath),
        ({"experiment": {"project": "a\nb"}}, BadPath),
        ({"experiment": {"project": "\u202eb"}}, BadPath),
        ({"experiment": {"name": "\u00e9" * 128}}, BadPath),
        ({"step": -1}, BadRequest),
        ({"segment": 0}, BadRequest),
        ({"format": "x" * 33}, BadRequest),
        ({"metrics": {"loss": "low"}}, BadRequest),
    ],
)
def test_a_descriptor_that_lies_about_its_arena_is_refused(more, error):
    """S11, S12: names become paths, offsets become reads; both are checked before anything believes them."""
    with pytest.raises(error):
        descriptor.decode(json.dumps(a_descriptor(**more)).encode(), 1 << 20)


def test_a_whole_descriptor_keeps_what_it_says():
    """M028: notes and metadata come through as they were given."""
    said = a_descriptor(
        step=3, epoch=1.5, metrics={"loss": "NaN", "acc": 0.5}, note="\u2603", meta={"a": [1, {"b": None}]}
    )
    found = descriptor.decode(json.dumps(said).encode(), 1 << 20)
    assert (found.step, found.epoch, found.note, found.meta) == (3, 1.5, "\u2603", {"a": [1, {"b": None}]})
    assert math.isnan(wire.from_number(found.metrics["loss"]))


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(a_descriptor(step=1, meta={}, segment=1))), JSON, max_size=4))
def test_any_descriptor_is_taken_or_refused_with_a_code(more):
    try:
        descriptor.decode(json.dumps({**a_descriptor(), **more}).encode("utf-8", "surrogatepass"), 1 << 20)
    except CkptdError as error:
        assert error.code in {"bad_request", "bad_path"}


@pytest.mark.parametrize("path", ["", "a", "/a/../b", "/a/./b", "//a", "/a//b", "/a\0b"])
def test_directories_that_are_not_plain_absolute_paths_are_refused(path):
    with pytest.raises(BadPath):
        descriptor.check_directory(path)


@settings(max_examples=100)
@given(JSON)
def test_any_manifest_on_disk_is_one_or_none(value):
    try:
        msgspec.convert(value, manifest.Manifest)
    except msgspec.ValidationError as error:
        assert str(error)
