"""Tensors and numbers in what `opcodes.describe` returns for a torch state. Nothing is called.

Walks are bounded in nodes, depth and name length: a stream of a few bytes can describe a structure
that contains itself a billion times.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ckptd.worker.formats.dtypes import from_torch
from ckptd.worker.formats.opcodes import Made, Name, Stored, is_dict, pairs_of

_NODES_MAX = 2_000_000
_DEPTH_MAX = 64
_NAME_MAX = 1024
_DIMENSIONS_MAX = 64
_WRAPPERS_MAX = 8
_KEYS_MAX = 100
_COUNT_BITS = 63
_EPOCH_MAX = 1 << 53
_STEP_KEYS = ("global_step", "step", "iteration", "iter", "num_steps", "steps")
_EPOCH_KEYS = ("epoch", "current_epoch", "epochs")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: `key` names its storage ("" when it has none), offset and extent are in elements."""

    dtype: str
    shape: list[int]
    key: str = ""
    offset: int = 0
    extent: int = 0


def tensors(root: object) -> Iterator[tuple[str, Tensor]]:
    """Yield (dotted name, tensor) in the order of the state; what is no tensor is passed over."""
    stack: list[tuple[str, object, int]] = [("", root, 0)]
    seen: set[int] = set()
    nodes = 0
    while stack and nodes < _NODES_MAX:
        name, value, depth = stack.pop()
        nodes += 1
        if (tensor := tensor_of(value)) is not None:
            yield name, tensor
        elif depth < _DEPTH_MAX and id(value) not in seen:
            children = list(_children(name, value))
            if children:
                seen.add(id(value))  # alive as long as the root is, so the id stays its own
            stack.extend((child, item, depth + 1) for child, item in reversed(children))


def _children(name: str, value: object) -> Iterator[tuple[str, object]]:
    prefix = f"{name[:_NAME_MAX]}." if name else ""
    if is_dict(value):
        for key, item in pairs_of(value):
            yield prefix + (key[:_NAME_MAX] if isinstance(key, str) else _plain(key)), item
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield f"{prefix}{index}", item


def _plain(key: object) -> str:
    return str(key) if isinstance(key, int) and key.bit_length() < _COUNT_BITS else "?"


def tensor_of(value: object) -> Tensor | None:
    """Return the tensor that `value` would have made, None when it is none."""
    for _ in range(_WRAPPERS_MAX):
        if not isinstance(value, Made) or not isinstance(value.target, Name) or not isinstance(value.args, tuple):
            return None
        match value.target.text, value.args:
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (data, *_):
                value = data
            case "torch._tensor._rebuild_from_type_v2", (function, _, args, *_):
                value = Made(function, args)
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2", (
                storage,
                offset,
                size,
                stride,
                *_,
            ):
                return _stored(storage, None, (offset, size, stride))
            case "torch._utils._rebuild_tensor_v3", (storage, offset, size, stride, _, _, dtype, *_):
                return _stored(storage, dtype, (offset, size, stride))
            case "torch._utils._rebuild_meta_tensor_no_storage", (dtype, size, *_):
                shape = numbers(size)
                return Tensor(dtype_of(dtype), shape) if shape is not None else None
            case _:
                return None
    return None


def _stored(storage: object, dtype: object, layout: tuple[object, object, object]) -> Tensor | None:
    """Describe a tensor over a persistent storage: ("storage", type, key, location, element count)."""
    offset, shape, strides = layout[0], numbers(layout[1]), numbers(layout[2])
    match storage:
        case Stored(key=(_, kind, str(key), *_)):
            pass
        case _:
            return None
    if shape is None or strides is None or len(shape) != len(strides) or type(offset) is not int or offset < 0:
        return None
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if all(shape) else 0
    return Tensor(dtype_of(kind if dtype is None else dtype), shape, key, offset, extent)


def dtype_of(value: object) -> str:
    """Return the element type that a global names, "?" when it names none."""
    return from_torch(value.name) if isinstance(value, Name) else "?"


def numbers(value: object) -> list[int] | None:
    """Return a shape or stride as a list; None when it is no short list of counts."""
    if isinstance(value, Made) and value.is_a("torch.Size") and isinstance(value.args, tuple) and value.args:
        value = value.args[0]
    if not isinstance(value, tuple | list) or len(value) > _DIMENSIONS_MAX or not all(map(_is_count, value)):
        return None
    return list(value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << _COUNT_BITS


def top_level(root: object) -> tuple[list[str], int | None, float | None]:
    """Return (the first keys, step, epoch) as the state's own top level tells them."""
    found = {key: item for key, item in pairs_of(root) if isinstance(key, str)}
    steps = (found[key] for key in _STEP_KEYS if _is_count(found.get(key)))
    epochs = (found[key] for key in _EPOCH_KEYS if type(found.get(key)) in (int, float))
    step, epoch = next(steps, None), next(epochs, None)
    number = float(epoch) if isinstance(epoch, int | float) and abs(epoch) < _EPOCH_MAX else None
    return [key[:_NAME_MAX] for key in list(found)[:_KEYS_MAX]], step if isinstance(step, int) else None, number
