"""From typed JSON nodes (typed.py writes them) back to values: the same Python types, the same bits.

Nothing here imports or calls what a file names.
"""

import base64
import collections
import datetime as dt
import struct
import sys
from typing import Any, Callable, Dict, Iterable, List, Tuple

from ckptd_client.dtypes import framework
from ckptd_client.typed import FACTORIES, NAN_BITS, PATHS

TENSOR_TAGS = ("tensor", "parameter", "array")


def _float(body: str) -> float:
    if body in ("inf", "-inf"):
        return float(body)
    bits = NAN_BITS if body == "nan" else int(body, 16)
    return float(struct.unpack("<d", struct.pack("<Q", bits))[0])


def _numpy_scalar(body: List[str]) -> Any:
    numpy = framework("numpy")
    dtype = numpy.dtype(body[0])
    data = base64.b64decode(body[1])
    if dtype.itemsize == 0 or not data:
        return numpy.zeros((), dtype)[()]
    return numpy.frombuffer(data, dtype)[0]


def _named_tuple(body: List[Any], items: List[Any]) -> Any:
    """Make a named tuple of its own class where the caller has that class, of a look-alike otherwise.

    The class is looked up among modules that are already imported and must be a named tuple with the
    same fields: a file can't make anything run.
    """
    module, name, fields = body
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and issubclass(found, tuple) and list(getattr(found, "_fields", ())) == fields:
        return tuple.__new__(found, items)
    return collections.namedtuple(name.rpartition(".")[2], fields)(*items)  # noqa: PYI024  made at run time: no types to give


Tensors = Callable[[str, List[Any]], Any]


class Decoder:
    """Turns typed nodes into values. `tensors(tag, body)` gives the value of each tensor node."""

    def __init__(self, tensors: Tensors) -> None:
        """Remember who makes tensors."""
        self._tensors = tensors

    def value(self, node: Any) -> Any:
        """Turn one node into its value. ValueError, KeyError or TypeError: the node is not well-formed."""
        if isinstance(node, list):
            return [self.value(item) for item in node]
        if not isinstance(node, dict):
            return node
        ((name, body),) = node.items()
        if name in TENSOR_TAGS:
            return self._tensors(name, body)
        if name == "dict":
            return {key: self.value(item) for key, item in body.items()}
        simple = _SIMPLE.get(name)
        if simple is not None:
            return simple(body)
        return _CONTAINERS[name](self, body)

    def pairs(self, body: Iterable[List[Any]]) -> List[Tuple[Any, Any]]:
        """Turn [[key, value], ...] into pairs."""
        return [(self.value(key), self.value(item)) for key, item in body]


_SIMPLE: Dict[str, Callable[[Any], Any]] = {
    "int": lambda body: int(body, 16),
    "float": _float,
    "bytes": base64.b64decode,
    "bytearray": lambda body: bytearray(base64.b64decode(body)),
    "datetime": dt.datetime.fromisoformat,
    "date": dt.date.fromisoformat,
    "timedelta": lambda body: dt.timedelta(*body),
    "path": lambda body: PATHS[body[0]](body[1]),
    "scalar": _numpy_scalar,
    "torch.dtype": lambda body: getattr(framework("torch"), body),
    "torch.device": lambda body: framework("torch").device(body),
    "torch.Size": lambda body: framework("torch").Size(body),
    "numpy.dtype": lambda body: framework("numpy").dtype(body),
}


def _ordered(decoder: Decoder, body: List[Any]) -> Any:
    made: Any = collections.OrderedDict(decoder.pairs(body[0]))
    if len(body) > 1:
        made._metadata = decoder.value(body[1])  # noqa: SLF001  # torch's own name for the versions of its modules
    return made


_CONTAINERS: Dict[str, Callable[[Decoder, Any], Any]] = {
    "tuple": lambda decoder, body: tuple(decoder.value(body)),
    "set": lambda decoder, body: set(decoder.value(body)),
    "frozenset": lambda decoder, body: frozenset(decoder.value(body)),
    "items": lambda decoder, body: dict(decoder.pairs(body)),
    "ordered": _ordered,
    "counter": lambda decoder, body: collections.Counter(dict(decoder.pairs(body))),
    "defaultdict": lambda decoder, body: collections.defaultdict(
        FACTORIES[body[0]] if body[0] else None, decoder.pairs(body[1])
    ),
    "deque": lambda decoder, body: collections.deque(decoder.value(body[1]), body[0]),
    "complex": lambda decoder, body: complex(decoder.value(body[0]), decoder.value(body[1])),
    "range": lambda decoder, body: range(*decoder.value(body)),
    "namedtuple": lambda decoder, body: _named_tuple(body[:3], decoder.value(body[3])),
}


def references(node: Any) -> Iterable[List[Any]]:
    """Give the body of every tensor node under `node`: [file number, name, ...]."""
    if isinstance(node, list):
        for item in node:
            yield from references(item)
    elif isinstance(node, dict):
        ((name, body),) = node.items()
        if name in TENSOR_TAGS:
            yield body
        elif name == "dict":
            for item in body.values():
                yield from references(item)
        else:
            yield from references(body)
