"""Pickle streams as descriptions: nothing is imported, nothing is called, whatever the stream says.

A small stack machine over pickletools.genops. Where an unpickler would look up a name, this one
keeps a Name; where it would call something, it keeps a Made that says what would have been called
with what. Values are never hashed, compared or printed here: a stream of a few bytes can describe
a structure whose walk takes for ever, while holding it takes memory in proportion to the stream.
"""

import io
import pickletools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ckptd.worker.formats.source import broken

BYTES_MAX = 64 << 20  # stream length: a state of 100,000 tensors takes about 20 MB
OPCODES_MAX = 8_000_000


@dataclass(frozen=True, slots=True)
class Name:
    """A global that the stream names."""

    module: str
    name: str

    @property
    def text(self) -> str:
        """Return "module.name"."""
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Made:
    """What a call would have made: of `target`, from `args`, with what was put into it afterwards."""

    target: object
    args: object = ()
    state: object = None
    pairs: list[tuple[object, object]] = field(default_factory=list)
    items: list[object] = field(default_factory=list)

    def is_a(self, *names: str) -> bool:
        """Say whether the target is one of these "module.name" texts."""
        return isinstance(self.target, Name) and self.target.text in names


@dataclass(slots=True, eq=False)
class Pairs:
    """A dict, as the pairs that were put into it: keys may be anything."""

    pairs: list[tuple[object, object]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A persistent id: data that lies outside of the stream."""

    key: object


_DICTS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict")
_PLAIN = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def describe(stream: bytes) -> object:
    """Return what the stream describes, in plain values, Names, Mades, Pairs and Stored.

    InvalidFormat  not a pickle stream, too long, or it uses its stack wrongly
    """
    if len(stream) > BYTES_MAX:
        raise broken("invalid_format", f"pickle stream of {len(stream)} bytes, {BYTES_MAX} at most")
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a text is the stream's business, not a warning of ours
            for count, (opcode, arg, _) in enumerate(pickletools.genops(io.BytesIO(stream))):
                if opcode.name == "STOP":
                    return machine.stack.pop()
                if count > OPCODES_MAX:
                    raise broken("invalid_format", f"pickle stream of more than {OPCODES_MAX} opcodes")
                machine.step(opcode.name, arg)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise broken("invalid_format", f"not a pickle stream: {type(error).__name__}") from error
    raise broken("truncated", "the pickle stream has no end")


def pairs_of(value: object) -> Iterator[tuple[object, object]]:
    """Yield the pairs of anything that is a dict; nothing for everything else."""
    if isinstance(value, Pairs | Made) and is_dict(value):
        yield from value.pairs


def is_dict(value: object) -> bool:
    """Say whether `pairs_of` has a meaning for `value`."""
    return isinstance(value, Pairs) or (isinstance(value, Made) and value.is_a(*_DICTS))


def fields_of(value: object) -> dict[str, Any]:
    """Return the attributes that the stream gives an object; {} when it gives none that can be read."""
    state = value.state if isinstance(value, Made) else None
    match state:
        case (None, slots):
            state = slots
        case (attributes, _):
            state = attributes
    return {key: item for key, item in pairs_of(state) if isinstance(key, str)}


class _Machine:
    """The stack, the marks and the memo of one stream."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:
        if name in _PLAIN:
            self.stack.append(arg)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _STEPS:
            _STEPS[name](self, arg)
        elif name not in {"PROTO", "FRAME"}:
            raise broken("invalid_format", f"pickle opcode {name} is not one this reader knows")

    def mark(self, _: Any) -> None:
        self._below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def drop(self, _: Any) -> None:
        self.since_mark()

    def collect(self, kind: Callable[[list[Any]], Any]) -> None:
        items = self.since_mark()
        self.stack.append(kind(items))

    def put(self, index: int) -> None:
        self._memo[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self._memo[index])

    def pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def tuple_of(self, count: int) -> None:
        self.stack.append(tuple(self.last(count)))

    def named(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self.stack.append(Name(module, name))

    def stack_named(self, _: Any) -> None:
        module, name = self.last(2)
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError
        self.stack.append(Name(module, name))

    def made(self, _: Any) -> None:
        target, args = self.last(2)
        self.stack.append(Made(target, args))

    def made_with_names(self, _: Any) -> None:
        target, args, named = self.last(3)
        self.stack.append(Made(target, args, named))

    def instance(self, arg: str) -> None:
        args = tuple(self.since_mark())
        module, _, name = arg.partition(" ")
        self.stack.append(Made(Name(module, name), args))

    def object_of(self, _: Any) -> None:
        target, *args = self.since_mark()
        self.stack.append(Made(target, tuple(args)))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Made):
            self.stack[-1].state = state

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Made):
            target.items.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise TypeError

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, Made | Pairs) or len(items) % 2:
            raise TypeError
        target.pairs.extend(zip(items[::2], items[1::2], strict=True))

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError(count)
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def dict_of(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append(Pairs())
        self.update(items)


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.drop,
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": lambda m, _: m.collect(tuple),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "LIST": lambda m, _: m.collect(list),
    "APPEND": lambda m, _: m.extend(m.last(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "EMPTY_DICT": lambda m, _: m.stack.append(Pairs()),
    "DICT": _Machine.dict_of,
    "SETITEM": lambda m, _: m.update(m.last(2)),
    "SETITEMS": lambda m, _: m.update(m.since_mark()),
    "EMPTY_SET": lambda m, _: m.stack.append([]),
    "ADDITEMS": lambda m, _: m.extend(m.since_mark()),
    "FROZENSET": lambda m, _: m.collect(list),
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.stack_named,
    "REDUCE": _Machine.made,
    "NEWOBJ": _Machine.made,
    "NEWOBJ_EX": _Machine.made_with_names,
    "INST": _Machine.instance,
    "OBJ": _Machine.object_of,
    "BUILD": _Machine.build,
    "PERSID": lambda m, arg: m.stack.append(Stored(arg)),
    "BINPERSID": lambda m, _: m.stack.append(Stored(m.stack.pop())),
    "EXT1": lambda m, arg: m.stack.append(Name("copyreg", f"extension {arg}")),
    "EXT2": lambda m, arg: m.stack.append(Name("copyreg", f"extension {arg}")),
    "EXT4": lambda m, arg: m.stack.append(Name("copyreg", f"extension {arg}")),
}
