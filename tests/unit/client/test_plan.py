"""The layout: what real safetensors sees, what keeps a plan, what is refused."""

import collections
import datetime as dt
import json
import math
import pathlib
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from ckptd_client import plan as plan_module
from ckptd_client.control import PAGE
from ckptd_client.errors import UnsupportedValue
from ckptd_client.flatten import flatten
from ckptd_client.plan import PlanCache, build_plan
from tests.unit.client.exact import assert_same, image, write_checkpoint

GOLDEN = Path(__file__).parents[2] / "golden" / "state"
CLIENT = Path(__file__).parents[3] / "client"
Point = collections.namedtuple("Point", "x y")  # noqa: PYI024
Point.__module__ = "test_plan"  # the name that the golden text holds, however this file is imported
sys.modules.setdefault("test_plan", sys.modules[__name__])  # and that loading it looks for


def golden_state() -> dict[str, Any]:
    """One value of every kind that state.json can hold. Only ever added to."""
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    ordered = collections.OrderedDict([("weight", weight), (3, "three")])
    ordered._metadata = collections.OrderedDict([("", {"version": 1})])
    return {
        "plain": [None, True, False, 0, -1, 1 << 62, 0.1, -0.0, 1e300, "text\n\ud800", {}],
        "wide": [1 << 63, -(1 << 64), 10**40],
        "floats": [math.nan, math.inf, -math.inf, struct.unpack("<d", b"\x01\0\0\0\0\0\xf8\x7f")[0]],
        "kinds": [(1, (2,)), {1, 2}, frozenset({"a"}), b"\0\xff", bytearray(b"x"), 1 - 2j, range(1, 9, 2)],
        "times": [
            dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=dt.UTC),
            dt.date(2026, 1, 2),
            dt.timedelta(days=-1, microseconds=5),
        ],
        "paths": [pathlib.PosixPath("/a/b"), pathlib.PurePosixPath("c")],
        "maps": [
            {True: "bool"},
            {1: "int", None: 0, (1, "a"): 2.5},
            collections.OrderedDict(a=1),
            collections.defaultdict(list, a=[1]),
            collections.Counter("aab"),
            collections.deque([1, 2], maxlen=5),
        ],
        "types": [torch.float8_e4m3fn, torch.device("cuda:1"), torch.Size([2, 3]), np.dtype("<i4")],
        "scalars": [np.float32(1.5), np.bool_(True), np.datetime64("2026-01-02", "D"), np.str_("é")],
        "model": ordered,
        "tied": {"again": weight, "parameter": torch.nn.Parameter(weight, requires_grad=False)},
        "strided": torch.arange(6, dtype=torch.int16).reshape(2, 3).t(),
        "raw": [torch.tensor([1 + 2j], dtype=torch.complex128), np.array(["ab", "c"]), np.array([1.5], ">f4")],
        "array": np.arange(4, dtype=np.uint16).reshape(2, 2),
        "empty": [torch.zeros(0, 3), torch.tensor(7), np.zeros((2, 0))],
        "point": Point(1, torch.tensor([1.0])),
        "a.b": {"c": torch.tensor(1)},
        "A/b": {"c": torch.tensor(2), "d": {"e.f": torch.tensor(3), "e": {"f": torch.tensor(4)}}},
    }


def state_json(state: Any) -> str:
    arena, files = image(state)
    return bytes(arena.buffer[files[-1]["offset"] :][: files[-1]["size_bytes"]]).decode("ascii")


def test_the_text_of_every_kind_of_value_is_the_golden_one() -> None:
    """Old checkpoints must stay readable: a stored text is never edited, only added to."""
    assert json.loads(state_json(golden_state())) == json.loads((GOLDEN / "every_kind.json").read_text())


def test_safetensors_reads_every_file(tmp_path: Path) -> None:
    """M004: files load in any tool, bit-exact."""
    types = [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    ]
    model = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in types}
    model["scalar"] = torch.tensor(1.5)
    model["none"] = torch.zeros(0, 2)
    path = write_checkpoint(tmp_path / "c", {"model": model, "step": 5}) / "model.safetensors"
    loaded = safetensors.torch.load_file(path)
    assert_same({name: loaded[name] for name in model}, model)
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(model)
        assert file.metadata()["format"] == "pt"


def test_types_that_safetensors_has_no_name_for_still_give_files_that_it_reads(tmp_path: Path) -> None:
    rare = {"wide": torch.ones(2, dtype=torch.complex128), "scale": torch.ones(4).to(torch.float8_e8m0fnu)}
    path = write_checkpoint(tmp_path / "c", {"model": rare}) / "model.safetensors"
    assert set(safetensors.torch.load_file(path)) == set(rare)


def test_tensor_data_starts_on_a_page_and_has_no_holes() -> None:
    state = {"model": {f"t{n}": torch.zeros(n, dtype=torch.int8 if n % 2 else torch.float64) for n in range(9)}}
    plan = build_plan(state)
    (file,) = plan.files
    assert (file.offset % PAGE, len(file.header) % PAGE, plan.arena_bytes % PAGE) == (0, 0, 0)
    ends = [at + size for at, size in sorted(plan.places) if size]
    starts = [at for at, size in sorted(plan.places) if size]
    assert starts == [file.offset + len(file.header), *ends[:-1]]
    assert all(
        at % 8 == 0 for (at, _), leaf in zip(plan.places, flatten(state).leaves, strict=True) if leaf.itemsize == 8
    )


def test_each_top_level_key_with_tensors_has_its_file() -> None:
    one = torch.ones(1)
    state = {"model": {"w": one}, "Model": {"w": one + 1}, "../x y": {"w": one + 2}, "bare": one + 3, "step": 1}
    paths = [file.path for file in build_plan(state).files]
    assert paths == ["model.safetensors", "Model-2.safetensors", "_x_y.safetensors", "tensors.safetensors"]


def test_many_top_level_keys_share_one_file() -> None:
    state = {f"layer{n}": {"w": torch.ones(1) * n} for n in range(plan_module.FILES_MAX + 1)}
    assert [file.path for file in build_plan(state).files] == ["tensors.safetensors"]


def test_changed_values_keep_the_plan_and_a_changed_structure_does_not() -> None:
    """A warm save builds nothing; a plan for another structure would mix tensors up."""
    cache = PlanCache(4)

    def state(*, lr: float = 0.1, history: int = 3, shape: int = 2, tied: bool = False) -> Any:
        weight = torch.rand(shape)
        other = weight if tied else torch.rand(shape)
        return {"m": {"a": weight, "b": other}, "o": {"lr": lr, "history": [1.5] * history}, "extra": {lr: 1}}

    first = cache.get(state())
    assert cache.get(state(lr=0.2)) is first
    assert cache.get(state(history=100)) is first  # a container without tensors may grow
    assert cache.get(state(shape=3)) is not first
    assert cache.get(state(tied=True)) is not first
    assert cache.get(state()) is first


def test_equal_keys_of_different_types_are_different_structures() -> None:
    cache = PlanCache(4)
    plans = [cache.get({key: {"w": torch.ones(1)}}) for key in (1, True, 1.0, "1")]
    assert len({id(plan) for plan in plans}) == 4


def test_a_plan_is_made_anew_when_plain_values_outgrow_its_room() -> None:
    cache = PlanCache(4)
    small, large = ({"m": torch.ones(1), "log": "x" * size} for size in (10, 200_000))
    plan = cache.get(small)
    assert cache.get(large).arena_bytes > plan.arena_bytes
    assert cache.get(small).state_room_bytes > plan.state_room_bytes  # and stays large: the size is stable


def test_the_least_recently_used_plan_goes_first() -> None:
    cache = PlanCache(2)
    states = [{"m": torch.ones(n)} for n in (1, 2, 3)]
    first = cache.get(states[0])
    second = cache.get(states[1])
    assert cache.get(states[0]) is first
    cache.get(states[2])
    assert cache.get(states[0]) is first
    assert cache.get(states[1]) is not second


class Opaque:
    """A class that no format but pickle keeps."""


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: {"optimizer": {"param_groups": [{"lr": Opaque()}]}}, 'state["optimizer"]["param_groups"][0]["lr"]'),
        (lambda: {"f": lambda: None}, 'state["f"]'),
        (lambda: {"m": [torch.eye(2).to_sparse()]}, 'state["m"][0]'),
        (lambda: {"m": torch.empty(2, device="meta")}, 'state["m"]'),
        (lambda: {"m": torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8)}, 'state["m"]'),
        (lambda: {3: np.array([object()])}, "state[3]"),
        (lambda: {"s": {1, Opaque}}, 'state["s"]'),
        (lambda: {"t": {"dense": torch.eye(2), "sparse": torch.eye(2).to_sparse_csr()}}, 'state["t"]["sparse"]'),
        (lambda: {"n": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)}, 'state["n"]'),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: some of these are old or new
def test_what_cannot_be_kept_is_named_by_its_path(make: Callable[[], Any], where: str) -> None:
    with pytest.raises(UnsupportedValue) as caught:
        build_plan(make())
    assert caught.value.where == where
    assert where in str(caught.value)


def test_the_error_points_at_the_torch_format() -> None:
    with pytest.raises(UnsupportedValue, match='format="torch"'):
        build_plan({"x": Opaque()})


def test_a_state_that_contains_itself_is_refused() -> None:
    state: dict[str, Any] = {"m": torch.ones(1)}
    state["self"] = [state]
    with pytest.raises(UnsupportedValue, match="holds itself"):
        build_plan(state)


def test_a_path_through_an_object_with_state_dict_says_so() -> None:
    class Sampler:
        def state_dict(self) -> dict[str, Any]:
            return {"rng": Opaque()}

    with pytest.raises(UnsupportedValue) as caught:
        build_plan({"sampler": Sampler()})
    assert caught.value.where == 'state["sampler"].state_dict()["rng"]'


def test_a_header_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "HEADER_BYTES_MAX", 3 * PAGE)
    state = {"model": {f"layer{n}": torch.ones(1) * n for n in range(200)}}
    with pytest.raises(UnsupportedValue, match=r"the header of model\.safetensors"):
        build_plan(state)


def test_plain_values_over_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "STATE_BYTES_MAX", 1000)
    with pytest.raises(UnsupportedValue, match="arrays"):
        build_plan({"order": list(range(1000))})


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format"):
        build_plan({}, "pickle")


MODULES = ["plan", "arena", "restore", "errors", "flatten", "typed", "decode", "dtypes"]
MODULES += ["fill", "find", "readback", "header", "torchzip"]


def test_the_client_imports_with_the_standard_library_only() -> None:
    """M031: no torch, no numpy, and fast. -I -S: no site-packages, so anything else would fail."""
    imports = "; ".join(f"import ckptd_client.{name}" for name in MODULES)
    code = f"""
import sys, time
sys.path.insert(0, {str(CLIENT)!r})
start = time.process_time()
{imports}
print(time.process_time() - start)
assert not {{"torch", "numpy", "safetensors", "xxhash"}} & set(sys.modules)
"""
    command = [sys.executable, "-I", "-S", "-c", code]
    took = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(4)]
    assert min(float(one) for one in took) < 0.5


def test_a_state_without_torch_and_numpy_can_be_planned() -> None:
    """M031: framework-neutral, so no framework is imported to save plain values."""
    code = f"""
import sys
sys.path.insert(0, {str(CLIENT)!r})
from ckptd_client.plan import build_plan
from ckptd_client.arena import MappedArena, copy_state
plan = build_plan({{"step": 3}})
copy_state(plan, {{"step": 3}}, MappedArena.anonymous(plan.arena_bytes))
assert not {{"torch", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
