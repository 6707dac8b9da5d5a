"""`into=`: a loaded state put into objects that exist already. All is checked before anything is changed."""

import copy
import sys
from typing import Any, Callable, List, Mapping

from ckptd_client.errors import MissingPart, StateMismatch
from ckptd_client.typed import quote

NAMES_MAX = 5  # names that one error lists


def fill(into: Any, state: Any, *, own: bool = False) -> Any:
    """Put `state` into `into` and return it; plain values in mappings and lists are replaced.

    Tensors and arrays are copied into, objects with load_state_dict() get theirs; an empty mapping takes
    all there is. MissingPart: the checkpoint lacks what `into` has. StateMismatch: it has more, or a
    tensor of another shape or type. Both name the path, and then nothing has been changed, unless
    a load_state_dict() of the caller's own refused halfway. With `own`, objects that may keep the tensors
    they load (optimizers do) get copies.
    """
    match = _Match(own=own)
    made = match.value(into, state, "state")
    for change in match.changes:
        change()
    return made


class _Match:
    """Checks a state against what it is to be put into, and notes the changes to make."""

    def __init__(self, *, own: bool) -> None:
        self.changes: List[Callable[[], Any]] = []
        self._own = own
        self._torch: Any = sys.modules.get("torch")
        self._numpy: Any = sys.modules.get("numpy")

    def value(self, into: Any, state: Any, where: str) -> Any:
        """Check one value; return what belongs in its place."""
        if self._torch is not None and isinstance(into, self._torch.Tensor):
            _check_array(into, state, where, self._torch.Tensor)
            self.changes.append(lambda: self._copy(into, state))
            return into
        if self._numpy is not None and isinstance(into, self._numpy.ndarray):
            _check_array(into, state, where, self._numpy.ndarray)
            self.changes.append(lambda: self._numpy.copyto(into, state))
            return into
        if callable(getattr(into, "load_state_dict", None)):
            self._stateful(into, state, where)
            return into
        if isinstance(into, Mapping) and isinstance(state, Mapping):
            return self._mapping(into, state, where)
        if isinstance(into, (list, tuple)) and isinstance(state, (list, tuple)):
            return self._sequence(into, state, where)
        return state

    def _copy(self, into: Any, state: Any) -> None:
        with self._torch.no_grad():
            into.copy_(state)

    def _stateful(self, into: Any, state: Any, where: str) -> None:
        is_module = self._torch is not None and isinstance(into, self._torch.nn.Module)
        if is_module:  # its load_state_dict would change what fits before it refuses what doesn't
            _check_module(into.state_dict(), state, where)
        keeps = self._own and not is_module

        def load() -> None:
            try:
                into.load_state_dict(copy.deepcopy(state) if keeps else state)
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                raise StateMismatch(f"{type(into).__name__}.load_state_dict refused it: {error}", where) from error

        self.changes.append(load)

    def _mapping(self, into: Any, state: Mapping[Any, Any], where: str) -> Any:
        if len(into):
            _check_keys(into, state, where)
        made = {
            key: self.value(into[key], value, _at(where, key)) if key in into else value for key, value in state.items()
        }
        self.changes.append(lambda: into.update(made))
        return into

    def _sequence(self, into: Any, state: Any, where: str) -> Any:
        if len(into) != len(state):
            raise StateMismatch(f"{len(into)} items here, {len(state)} in the checkpoint", where)
        made = [self.value(item, state[index], f"{where}[{index}]") for index, item in enumerate(into)]
        if isinstance(into, tuple):
            return tuple.__new__(type(into), made)
        self.changes.append(lambda: into.__setitem__(slice(None), made))
        return into


def _check_array(into: Any, state: Any, where: str, kind: Any) -> None:
    if not isinstance(state, kind):
        raise StateMismatch(f"a {type(into).__name__} here, a {type(state).__name__} in the checkpoint", where)
    _check_shape(into, state, where)
    if into.dtype != state.dtype:
        raise StateMismatch(f"type {into.dtype} here, {state.dtype} in the checkpoint", where)


def _check_shape(into: Any, state: Any, where: str) -> None:
    shape = tuple(getattr(state, "shape", ()))
    if tuple(into.shape) != shape:
        raise StateMismatch(f"shape {tuple(into.shape)} here, {shape} in the checkpoint", where)


def _check_module(into: Mapping[Any, Any], state: Any, where: str) -> None:
    if not isinstance(state, Mapping):
        raise StateMismatch(f"a module here, a {type(state).__name__} in the checkpoint", where)
    _check_keys(into, state, where)
    for name, value in into.items():
        if hasattr(value, "shape"):
            _check_shape(value, state[name], _at(where, name))


def _check_keys(into: Mapping[Any, Any], state: Mapping[Any, Any], where: str) -> None:
    missing = [key for key in into if key not in state]
    if missing:
        names = ", ".join(_at(where, key) for key in missing[:NAMES_MAX])
        raise MissingPart(f"the checkpoint lacks {len(missing)} of what is asked for: {names}", _at(where, missing[0]))
    more = [key for key in state if key not in into]
    if more:
        names = ", ".join(_at(where, key) for key in more[:NAMES_MAX])
        raise StateMismatch(f"the checkpoint has {len(more)} more than there is room for: {names}", where)


def _at(where: str, key: Any) -> str:
    return f"{where}[{quote(key) if isinstance(key, str) else repr(key)}]"
