"""One walk over a nested state: its tensors in order, its structure, the text of its plain values.

The walk is what Python must do for each tensor of each save, so it is written for speed: a table by
exact type, no path kept (it is put together while an error unwinds), no JSON for what only the plan
needs. A container that holds no tensor is one plain value: it may change from save to save without
changing the structure.

Structure tokens, in prefix order (hashable: together they are the plan's key):

    HOLE                                 a plain value; its text is the next of `holes`
    (kind, element type, shape)          a leaf: "tensor", "parameter", "frozen" (a parameter) or "array"
    (TIED, kind, n)                      leaf n once more: the same memory, shape and strides
    (mapping, extra, keys, key texts)    one of the last two is None; then one token tree per value
    (sequence, extra, n)                 then n token trees

`extra` is what the container has beside its items, as text (a factory, a length limit, a class), or None.
For "ordered" it is whether torch's `_metadata` follows the values as one more child.
"""

import collections
import functools
import sys
from typing import Any, Callable, Dict, Hashable, List, NamedTuple, Optional, Tuple

from ckptd_client.dtypes import numpy_type, torch_types
from ckptd_client.errors import UnsupportedValue
from ckptd_client.typed import FACTORIES, SCALARS, compose, encode_flat, list_text, numpy_scalar_text, quote, tag

DEPTH_MAX = 100  # a state nested deeper is taken for one that contains itself
LONG_LIST = 16  # a shorter list is not worth a look at its types first
HOLE = None
TIED = "tied"
_STR = {str}

Token = Hashable

SPECS_MAX = 1 << 16  # tokens of leaves that are remembered
_SPECS: Dict[str, Dict[Any, Tuple[Token, bool]]] = {"tensor": {}, "parameter": {}, "frozen": {}}


class FlatState(NamedTuple):
    """One walk over a state.

    leaves     tensors and arrays, kept alive; each memory once
    addresses  where each leaf's bytes start; 0 when they must be packed or fetched first
    tokens     the structure (see above)        holes  the text of each plain value, in order
    """

    leaves: List[Any]
    addresses: List[int]
    tokens: List[Token]
    holes: List[str]


def flatten(state: Any) -> FlatState:
    """Walk `state` once and return what a save needs; a FlatState is returned as it is.

    Plain values are taken as they are now; tensors are referred to, not copied. UnsupportedValue names
    the path of what can't be kept.
    """
    if isinstance(state, FlatState):
        return state
    walk = _Walk()
    try:
        walk.child(state)
    except UnsupportedValue as error:
        error.where = "state" + error.where
        raise
    return walk.flat


class _Walk:
    """One walk. A handler returns the text of a plain value, or None when it has written tokens."""

    def __init__(self) -> None:
        self.flat = FlatState([], [], [], [])
        self._leaves, self._addresses, self._tokens, self._holes = self.flat
        self._depth = 0
        self._seen: Dict[int, int] = {}  # address -> the first leaf there
        self._beside: Dict[int, List[int]] = {}  # address -> all leaves there, where there are several
        self._handlers: Dict[type, Callable[[Any], Optional[str]]] = {
            **SCALARS,
            dict: self._dict,
            collections.OrderedDict: self._ordered,
            collections.defaultdict: self._defaultdict,
            collections.Counter: functools.partial(self._mapping, "counter", None),
            list: functools.partial(self._sequence, "list", None),
            tuple: functools.partial(self._sequence, "tuple", None),
            collections.deque: lambda value: self._sequence("deque", encode_flat(value.maxlen), value),
            set: functools.partial(self._set, "set"),
            frozenset: functools.partial(self._set, "frozenset"),
        }
        self._torch: Any = sys.modules.get("torch")
        if self._torch is not None and hasattr(self._torch, "nn"):  # else it is just being imported
            self._types = torch_types(self._torch)
            trained, frozen = self._tensors("parameter"), self._tensors("frozen")
            self._handlers[self._torch.Tensor] = self._tensors("tensor")
            self._handlers[self._torch.nn.Parameter] = lambda value: (
                trained(value) if value.requires_grad else frozen(value)
            )
        else:
            self._torch = None
        self._numpy: Any = sys.modules.get("numpy")
        if self._numpy is not None and hasattr(self._numpy, "ndarray"):
            self._handlers[self._numpy.ndarray] = self._array
        else:
            self._numpy = None

    def child(self, value: Any) -> None:
        """Walk one value and write its tokens."""
        handler = self._handlers.get(type(value))
        text = handler(value) if handler is not None else self._other(value)
        if text is not None:
            self._tokens.append(HOLE)
            self._holes.append(text)

    def _text(self, value: Any, what: str) -> str:
        """Walk a value that must be plain: a key, or a member of a set."""
        handler = self._handlers.get(type(value))
        text = handler(value) if handler is not None else self._other(value)
        if text is None:
            raise UnsupportedValue(f"a tensor as {what}", "")
        return text

    # -- tensors ---------------------------------------------------------------------------------

    def _tensors(self, kind: str) -> Callable[[Any], None]:
        """Make the handler of tensors of one kind: a closure, since this is what runs for each of them.

        It makes nothing that the garbage collector would have to visit, and asks a tensor only what can
        differ between tensors of one type and shape.
        """
        specs, seen, beside = _SPECS[kind], self._seen, self._is_tied
        leaves, addresses, tokens = self._leaves, self._addresses, self._tokens

        def handle(value: Any) -> None:
            try:
                token, may_be_lazy = specs.get((value.dtype, value.shape)) or self._spec(value, kind)
                pointer = value.data_ptr()
                direct = value.is_cpu and value.is_contiguous()
            except RuntimeError as error:  # sparse and nested tensors have no one memory, or no one shape
                raise UnsupportedValue(f"a {value.layout} tensor of {value.dtype} has no plain bytes", "") from error
            if may_be_lazy and (value.is_neg() or value.is_conj()):
                direct = False
            at = len(leaves)
            if pointer and seen.setdefault(pointer, at) != at:
                if beside(value, kind, pointer):
                    return
            elif not direct and value.is_meta:
                raise UnsupportedValue("a tensor on the meta device has no values", "")
            tokens.append(token)
            leaves.append(value)
            addresses.append(pointer if direct else 0)

        return handle

    def _spec(self, value: Any, kind: str) -> Tuple[Token, bool]:
        """Make the token of all tensors of one type and shape, or say why there is none.

        The second part: could such a tensor be contiguous and yet negated or conjugated only on paper?
        A real one gets so by `z.conj().imag`, which strides over the real parts.
        """
        name = self._types.get(value.dtype)
        if name is None or value.layout is not self._torch.strided:
            raise UnsupportedValue(f"a {value.layout} tensor of {value.dtype} has no plain bytes", "")
        specs = _SPECS[kind]
        if len(specs) >= SPECS_MAX:
            specs.clear()
        may_be_lazy = value.dtype.is_complex or value.numel() == 1
        return specs.setdefault((value.dtype, value.shape), ((kind, name, value.shape), may_be_lazy))

    def _array(self, value: Any) -> None:
        name = numpy_type(value.dtype)
        if name is None:
            raise UnsupportedValue(f"an array of {value.dtype} has no plain bytes", "")
        pointer = value.__array_interface__["data"][0] if value.nbytes else 0
        is_new = not pointer or self._seen.setdefault(pointer, len(self._leaves)) == len(self._leaves)
        if not is_new and self._is_tied(value, "array", pointer):
            return
        self._tokens.append(("array", name, value.shape))
        self._leaves.append(value)
        self._addresses.append(pointer if value.flags.c_contiguous else 0)

    def _is_tied(self, value: Any, kind: str, pointer: int) -> bool:
        """Write a tie when a leaf at this address is the same view; else remember this one beside it.

        All leaves stay alive during the walk, so one address is one memory (CPU and GPU share one
        address space). Arrays are never tied to tensors: each comes back as its own kind.
        """
        others = self._beside.setdefault(pointer, [self._seen[pointer]])
        for index in others:
            if _same_view(self._leaves[index], value, is_array=kind == "array"):
                self._tokens.append((TIED, kind, index))
                return True
        others.append(len(self._leaves))
        return False

    # -- containers ------------------------------------------------------------------------------

    def _dict(self, value: Any) -> Optional[str]:
        return self._mapping("dict", None, value)

    def _ordered(self, value: Any) -> Optional[str]:
        extras = vars(value)
        if not extras:
            return self._mapping("ordered", None, value)
        if set(extras) != {"_metadata"}:
            raise UnsupportedValue(f"an OrderedDict with attributes of its own: {', '.join(extras)}", "")
        return self._mapping("ordered", True, value)

    def _defaultdict(self, value: Any) -> Optional[str]:
        factory = value.default_factory
        name = getattr(factory, "__name__", "")
        if factory is not None and FACTORIES.get(name) is not factory:
            raise UnsupportedValue(f"a defaultdict made by {factory!r}", "")
        return self._mapping("defaultdict", quote(name) if name else "null", value)

    def _mapping(self, name: str, extra: Any, value: Any) -> Optional[str]:
        mark, hole_mark = self._enter()
        keys: Optional[Tuple[str, ...]] = tuple(value)
        texts: Optional[Tuple[str, ...]] = None
        if not _STR.issuperset(map(type, value)):
            name = "items" if name == "dict" else name
            keys, texts = None, tuple([self._text(key, "a key") for key in value])
        token = (name, extra, keys, texts)
        self._tokens.append(token)
        key = None
        handlers, tokens, holes = self._handlers, self._tokens, self._holes
        try:
            for key, item in value.items():  # noqa: B007  # the key is for the error; this is `child` in line
                handler = handlers.get(type(item))
                text = handler(item) if handler is not None else self._other(item)
                if text is not None:
                    tokens.append(HOLE)
                    holes.append(text)
        except UnsupportedValue as error:
            error.where = f"[{quote(key) if type(key) is str else repr(key)}]" + error.where
            raise
        if extra is True:
            self.child(value._metadata)  # noqa: SLF001  where torch keeps its versions
        return self._leave(token, mark, hole_mark)

    def _sequence(self, name: str, extra: Optional[str], value: Any) -> Optional[str]:
        if len(value) > LONG_LIST and name != "deque":
            text = list_text(value)
            if text is not None:
                return text if name == "list" else tag(name, text if extra is None else f"[{extra},{text}]")
        mark, hole_mark = self._enter()
        token = (name, extra, len(value))
        self._tokens.append(token)
        index = 0
        try:
            for index, item in enumerate(value):  # noqa: B007  # the index is for the error's path
                self.child(item)
        except UnsupportedValue as error:
            error.where = f"[{index}]" + error.where
            raise
        return self._leave(token, mark, hole_mark)

    def _set(self, name: str, value: Any) -> str:
        # sorted, so that equal states have equal bytes
        return compose((name, None, len(value)), sorted([self._text(item, "a member of a set") for item in value]))

    def _enter(self) -> Tuple[int, int]:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise UnsupportedValue(f"nested deeper than {DEPTH_MAX}, or a container that holds itself", "")
        return len(self._tokens), len(self._holes)

    def _leave(self, token: Any, mark: int, hole_mark: int) -> Optional[str]:
        """Leave a container. Where each child was plain, take the tokens back: the whole is plain."""
        self._depth -= 1
        if len(self._tokens) - mark - 1 != len(self._holes) - hole_mark:
            return None
        text = compose(token, self._holes[hole_mark:])
        del self._tokens[mark:], self._holes[hole_mark:]
        return text

    # -- all other types -------------------------------------------------------------------------

    def _other(self, value: Any) -> Optional[str]:
        kind = type(value)
        if self._numpy is not None:
            if isinstance(value, self._numpy.generic):
                return numpy_scalar_text(value)
            if isinstance(value, self._numpy.dtype) and numpy_type(value) is not None:
                return tag("numpy.dtype", quote(value.str))
        if self._torch is not None:
            text = self._torch_value(value)
            if text is not None:
                return text
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            fields = encode_flat([kind.__module__, kind.__qualname__, list(kind._fields)])
            return self._sequence("namedtuple", fields[1:-1], value)
        if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
            return self._stateful(value)
        raise UnsupportedValue(f"an object of type {kind.__module__}.{kind.__qualname__} can't be kept", "")

    def _torch_value(self, value: Any) -> Optional[str]:
        torch = self._torch
        if isinstance(value, torch.Size):
            return tag("torch.Size", encode_flat(list(value)))
        if isinstance(value, torch.device):
            return tag("torch.device", quote(str(value)))
        if isinstance(value, torch.dtype):
            return tag("torch.dtype", quote(str(value).rpartition(".")[2]))
        if isinstance(value, torch.Tensor):
            kind = type(value)
            hint = "pass the local part of a distributed tensor, or the plain tensor inside of it"
            raise UnsupportedValue(f"a tensor of the class {kind.__module__}.{kind.__qualname__}", "", hint=hint)
        return None

    def _stateful(self, value: Any) -> Optional[str]:
        """Walk what an object's state_dict() gives; its own class is not kept."""
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise UnsupportedValue("a state_dict() that gives the object itself", "")
        state = value.state_dict()
        handler = self._handlers.get(type(state))
        try:
            text = handler(state) if handler is not None else self._other(state)
        except UnsupportedValue as error:
            error.where = ".state_dict()" + error.where
            raise
        self._depth -= 1
        return text


def _same_view(one: Any, other: Any, *, is_array: bool) -> bool:
    """Say whether two leaves at one address are the same memory seen in the same way."""
    if is_array:
        return hasattr(one, "strides") and (one.dtype, one.shape, one.strides) == (
            other.dtype,
            other.shape,
            other.strides,
        )
    return (
        hasattr(one, "is_neg")
        and (one.dtype, one.shape, one.stride(), one.device) == (other.dtype, other.shape, other.stride(), other.device)
        and one.is_neg() == other.is_neg()
        and one.is_conj() == other.is_conj()
    )
