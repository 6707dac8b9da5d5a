"""The condition of a hook as text: `when = "data.val_loss < 0.2 and project == 'imagenet'"`.

Python's grammar, read with ast, with a short list of what may stand in it: nothing is called, nothing
is looked up but the context, and its size is bounded, so that its cost is. Names are the fields of the
context and, short, the keys of its data. What is absent is None; an order comparison with None is false.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from ckptd.hooks.context import Context

CHARS_MAX = 1000
NODES_MAX = 200
DEPTH_MAX = 20

Condition = Callable[[Context], Any]

_NAMED = {"NaN", "Infinity", "-Infinity"}  # as facts in the catalog's log write them
_FIELDS = ("event", "key", "experiment_id", "checkpoint_id")
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_EQUAL: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.Not: operator.not_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


@lru_cache(maxsize=256)
def parse(text: str) -> Callable[[Context], bool]:
    """Return the condition as a function. ValueError says what may not stand there, and where."""
    if len(text) > CHARS_MAX:
        message = f"over {CHARS_MAX} characters"
        raise ValueError(message)
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        message = f"{text!r} is no expression: {getattr(error, 'msg', None) or 'nested too deep'}"
        raise ValueError(message) from error
    if sum(1 for _ in ast.walk(tree)) > NODES_MAX:
        message = f"over {NODES_MAX} parts"
        raise ValueError(message)
    made = _make(tree.body, 0)
    return lambda context: bool(made(context))


def _make(node: ast.expr, depth: int) -> Condition:
    if depth > DEPTH_MAX:
        message = f"nested deeper than {DEPTH_MAX}"
        raise ValueError(message)
    maker = _MAKERS.get(type(node))
    if maker is None:
        message = f"column {node.col_offset + 1}: {ast.unparse(node)!r} may not stand in a condition"
        raise ValueError(message)
    return maker(node, depth + 1)


def _constant(node: ast.Constant, _depth: int) -> Condition:
    value = node.value
    if type(value) not in {str, int, float, bool, type(None)}:
        message = f"column {node.col_offset + 1}: {value!r} is no text, number, True, False or None"
        raise ValueError(message)
    return lambda _context: value


def _name(node: ast.Name, _depth: int) -> Condition:
    name = node.id
    if name in _FIELDS:
        return operator.attrgetter(name)
    if name == "data":
        return lambda context: context.data
    return lambda context: context.data.get(name)


def _attribute(node: ast.Attribute, depth: int) -> Condition:
    inner, key = _make(node.value, depth), node.attr
    return lambda context: _item(inner(context), key)


def _subscript(node: ast.Subscript, depth: int) -> Condition:
    inner, key = _make(node.value, depth), _make(node.slice, depth)
    return lambda context: _item(inner(context), key(context))


def _item(value: Any, key: Any) -> Any:
    """Return a key of a table or an element of a list; None where there is none."""
    if isinstance(value, Mapping):
        return value.get(key) if isinstance(key, str) else None
    if isinstance(value, list | tuple) and isinstance(key, int):
        return value[key] if -len(value) <= key < len(value) else None
    return None


def _list(node: ast.List | ast.Tuple, depth: int) -> Condition:
    parts = [_make(part, depth) for part in node.elts]
    return lambda context: [part(context) for part in parts]


def _bool(node: ast.BoolOp, depth: int) -> Condition:
    parts = [_make(part, depth) for part in node.values]
    if isinstance(node.op, ast.And):
        return lambda context: all(part(context) for part in parts)
    return lambda context: any(part(context) for part in parts)


def _unary(node: ast.UnaryOp, depth: int) -> Condition:
    inner = _make(node.operand, depth)
    act = _UNARY.get(type(node.op))
    if act is None:
        message = f"column {node.col_offset + 1}: {ast.unparse(node)!r} may not stand in a condition"
        raise ValueError(message)
    if isinstance(node.op, ast.Not):
        return lambda context: not inner(context)
    return lambda context: (
        None if (value := inner(context)) is None else act(value if type(value) is int else _number(value))
    )


def _binary(node: ast.BinOp, depth: int) -> Condition:
    act = _ARITHMETIC.get(type(node.op))
    if act is None:
        message = f"column {node.col_offset + 1}: {ast.unparse(node)!r} may not stand in a condition"
        raise ValueError(message)
    left, right = _make(node.left, depth), _make(node.right, depth)

    def calculate(context: Context) -> Any:
        a, b = left(context), right(context)
        if a is None or b is None:
            return None
        try:
            return act(_number(a), _number(b))
        except ZeroDivisionError:
            return math.nan

    return calculate


def _number(value: Any) -> float:
    """Return a number to calculate with. Floats, so that no product grows without end. TypeError for anything else."""
    if isinstance(value, int | float) or (isinstance(value, str) and value in _NAMED):
        return float(value)
    message = f"{value!r} is no number"
    raise TypeError(message)


def _compare(node: ast.Compare, depth: int) -> Condition:
    first = _make(node.left, depth)
    links = [(_comparison(op), _make(right, depth)) for op, right in zip(node.ops, node.comparators, strict=True)]

    def compare(context: Context) -> bool:
        left = first(context)
        for holds, right in links:
            value = right(context)
            if not holds(left, value):
                return False
            left = value
        return True

    return compare


def _comparison(op: ast.cmpop) -> Callable[[Any, Any], bool]:
    order = _ORDER.get(type(op))
    if order is not None:
        return lambda a, b: a is not None and b is not None and bool(order(*_alike(a, b)))
    if isinstance(op, ast.In):
        return _contains
    if isinstance(op, ast.NotIn):
        return lambda a, b: not _contains(a, b)
    return _EQUAL[type(op)]


def _alike(a: Any, b: Any) -> tuple[Any, Any]:
    """Return both, a number that is written by its name as the number where the other is one: NaN is smaller than nothing."""
    if isinstance(a, str) and a in _NAMED and isinstance(b, int | float):
        return float(a), b
    if isinstance(b, str) and b in _NAMED and isinstance(a, int | float):
        return a, float(b)
    return a, b


def _contains(part: Any, whole: Any) -> bool:
    if isinstance(whole, str):
        return isinstance(part, str) and part in whole
    return isinstance(whole, list | tuple | Mapping) and part in whole


_MAKERS: dict[type[ast.expr], Callable[[Any, int], Condition]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    ast.Attribute: _attribute,
    ast.Subscript: _subscript,
    ast.List: _list,
    ast.Tuple: _list,
    ast.BoolOp: _bool,
    ast.UnaryOp: _unary,
    ast.BinOp: _binary,
    ast.Compare: _compare,
}
