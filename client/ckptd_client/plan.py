"""The layout of a checkpoint in an arena: made once for a structure, used by every save of it.

    control page | model.safetensors | optimizer.safetensors | ... | state.json + room | room for the descriptor

Each file starts on a PAGE boundary and each header is padded with spaces so that tensor data starts on
one too. Tensors are packed without holes, as the format asks, the widest items first: so every tensor
is aligned for its type.
"""

import collections
import json
import re
from typing import Any, Dict, Hashable, Iterator, List, NamedTuple, Optional, Tuple

from ckptd_client.control import PAGE, round_up
from ckptd_client.dtypes import RAW, item_bytes
from ckptd_client.errors import UnsupportedValue
from ckptd_client.flatten import HOLE, TIED, FlatState, flatten
from ckptd_client.torchzip import FILE as TORCH_FILE
from ckptd_client.torchzip import measure
from ckptd_client.typed import MAPPINGS, compose, encode_flat, quote

HEADER_BYTES_MAX = 16 << 20  # what the daemon's parser reads; the format itself ends at 100 MB
STATE_BYTES_MAX = 64 << 20  # text of plain values; more belongs into arrays
FILES_MAX = 64  # more top-level keys with tensors than this share one file
STEM_CHARS_MAX = 100
DESCRIPTOR_ROOM_BYTES = 256 << 10  # config, facts, metrics and notes of one save
STATE_ROOM_BYTES = 64 << 10  # what plain values may grow by, beside a quarter of their size
PLANS_MAX = 8  # structures of one experiment that are remembered: a full state, weights only, an EMA, ...

STATE_FILE = "state.json"
TENSORS_STEM = "tensors"

_HOLE_MARK = "\0"  # neither mark can occur in JSON text
_LEAF_MARK = "\1"


class FilePlan(NamedTuple):
    """One safetensors file: where it lies in the arena, and its header, padding included."""

    path: str
    offset: int
    size_bytes: int
    header: bytes


class Plan(NamedTuple):
    """Where each header and tensor of one structure lies in an arena, and state.json without its values.

    key          hashable; equal for states of equal structure
    arena_bytes  size of the arena to lease, a multiple of PAGE: files, room for state.json and the descriptor
    data_bytes   bytes of tensors in it
    files        the safetensors files, in the order of their offsets
    places       offset in the arena and size of each leaf, in the walk's order
    fragments    state.json around the text of the plain values: always one more than there are holes
    state_room_bytes  how large state.json may become under this plan
    """

    key: Hashable
    format: str
    arena_bytes: int
    data_bytes: int
    files: Tuple[FilePlan, ...]
    places: Tuple[Tuple[int, int], ...]
    fragments: Tuple[str, ...]
    state_offset: int
    state_room_bytes: int

    def state_bytes(self, flat: FlatState) -> int:
        """Return the size of state.json for these values."""
        return sum(map(len, self.fragments)) + sum(map(len, flat.holes))


def build_plan(state: Any, format: str = "safetensors") -> Plan:  # noqa: A002  the word everybody uses
    """Lay out `state`, a nested state or its `flatten(state)`.

    UnsupportedValue names the path of what can't be kept. format="torch" takes any picklable state and
    serialises it once to learn its size.
    """
    if format == "torch":
        return _torch_plan(state)
    if format != "safetensors":
        raise ValueError(f'format must be "safetensors" or "torch", not {format!r}')
    flat = flatten(state)
    return _Layout(flat).plan()


class PlanCache:
    """Plans by structure; the least recently used is dropped after `max_entries`. Not for two threads at once."""

    def __init__(self, max_entries: int = PLANS_MAX) -> None:
        """Start empty."""
        self._max = max_entries
        self._plans: collections.OrderedDict[Hashable, Plan] = collections.OrderedDict()

    def get(self, state: Any, format: str = "safetensors") -> Plan:  # noqa: A002  the word everybody uses
        """Return the plan for `state`: the one made before when its structure is known.

        Pass `flatten(state)` here and to copy_state, and the state is walked once instead of twice.
        A plan whose room the plain values have outgrown is made anew, with more.
        """
        if format != "safetensors":
            return build_plan(state, format)
        flat = flatten(state)
        key = structure_key(flat)
        plan = self._plans.get(key)
        if plan is None or plan.state_bytes(flat) > plan.state_room_bytes:
            plan = self._plans[key] = build_plan(flat)
        self._plans.move_to_end(key)
        if len(self._plans) > self._max:
            self._plans.popitem(last=False)
        return plan


def structure_key(flat: FlatState) -> Hashable:
    """Return what two states must have in common to share a plan."""
    return tuple(flat.tokens)


class _Leaf(NamedTuple):
    kind: str
    element: str
    shape: Tuple[int, ...]
    size_bytes: int
    top: Optional[str]  # the top-level key it lies under; None: it is itself a top-level value
    path: Tuple[str, ...]


class _Layout:
    """Makes one plan: a pass over the tokens finds the leaves and the text, then files are filled."""

    def __init__(self, flat: FlatState) -> None:
        self._flat = flat
        self._tokens: Iterator[Any] = iter(flat.tokens)
        self._leaves: List[_Leaf] = []
        self._names: List[Tuple[int, str]] = []  # of each leaf: file number, name in it

    def plan(self) -> Plan:
        text = self._text((), None)
        stems = self._assign_files()
        files, places, end = self._pack(stems)
        text = re.sub(f"{_LEAF_MARK}(\\w+),(\\d+){_LEAF_MARK}", self._node, text)
        names = encode_flat([file.path for file in files])
        fragments = tuple(f'{{"v":1,"files":{names},"tree":{text}}}\n'.split(_HOLE_MARK))
        size = sum(map(len, fragments)) + sum(map(len, self._flat.holes))
        if size > STATE_BYTES_MAX:
            reason = f"plain values of {size} bytes as text, {STATE_BYTES_MAX} at most"
            raise UnsupportedValue(reason, hint="turn long lists into arrays or tensors")
        room = round_up(size + size // 4 + STATE_ROOM_BYTES)
        return Plan(
            key=structure_key(self._flat),
            format="safetensors",
            arena_bytes=end + room + DESCRIPTOR_ROOM_BYTES,
            data_bytes=sum(leaf.size_bytes for leaf in self._leaves),
            files=tuple(files),
            places=tuple(places),
            fragments=fragments,
            state_offset=end,
            state_room_bytes=room,
        )

    def _text(self, path: Tuple[str, ...], top: Optional[str]) -> str:
        """Read one token tree; give its text, with marks for holes and leaves."""
        token = next(self._tokens)
        if token is HOLE:
            return _HOLE_MARK
        if token[0] == TIED:
            return f"{_LEAF_MARK}{token[1]},{token[2]}{_LEAF_MARK}"
        if token[0] in MAPPINGS:
            names = token[2] if token[2] is not None else [text.strip('"') for text in token[3]]
            if token[1] is True:
                names = (*names, "_metadata")
            return compose(token, [self._child(path, top, str(name)) for name in names])
        if token[0] not in ("tensor", "parameter", "frozen", "array"):
            return compose(token, [self._child(path, top, str(index)) for index in range(token[2])])
        kind, element, shape = token
        size = item_bytes(kind, element)
        for length in shape:
            size *= length
        self._leaves.append(_Leaf(kind, element, tuple(shape), size, top, path))
        return f"{_LEAF_MARK}{kind},{len(self._leaves) - 1}{_LEAF_MARK}"

    def _child(self, path: Tuple[str, ...], top: Optional[str], name: str) -> str:
        """Read a child called `name`. The first name below the root is the file's, the rest the tensor's."""
        if top is None and path:
            top, path = path[0], ()
        return self._text((*path, name), top)

    def _assign_files(self) -> List[str]:
        """Give each leaf its file and name; return the files' stems by number."""
        tops = dict.fromkeys(leaf.top for leaf in self._leaves)
        shared = len(tops) > FILES_MAX
        stems: List[str] = []
        numbers: Dict[Optional[str], int] = {}
        taken: Dict[int, Dict[str, int]] = {}
        for leaf in self._leaves:
            top = None if shared else leaf.top
            if top not in numbers:
                numbers[top] = len(stems)
                stems.append(_unused(_stem(top), stems))
            number = numbers[top]
            path = (leaf.top, *leaf.path) if shared and leaf.top is not None else leaf.path
            names = taken.setdefault(number, {"__metadata__": 1})
            self._names.append((number, _unique(".".join(path), names)))
        return stems

    def _pack(self, stems: List[str]) -> Tuple[List[FilePlan], List[Tuple[int, int]], int]:
        """Place leaves in files and files in the arena; also return where the last file ends, rounded up."""
        files: List[FilePlan] = []
        places: List[Tuple[int, int]] = [(0, 0)] * len(self._leaves)
        offset = PAGE
        for number, stem in enumerate(stems):
            members = [index for index, (file, _) in enumerate(self._names) if file == number]
            members.sort(key=lambda index: -_alignment(self._leaves[index]))
            header = self._header(stem, members)
            at = offset + len(header)
            for index in members:
                size = self._leaves[index].size_bytes
                places[index] = (at, size)
                at += size
            files.append(FilePlan(stem + ".safetensors", offset, at - offset, header))
            offset = round_up(at)
        return files, places, offset

    def _header(self, stem: str, members: List[int]) -> bytes:
        entries: Dict[str, Any] = {"__metadata__": {"format": "pt", "writer": "ckptd"}}
        at = 0
        for index in members:
            leaf = self._leaves[index]
            raw = leaf.element.startswith(RAW)
            entries[self._names[index][1]] = {
                "dtype": "U8" if raw else leaf.element,
                "shape": [leaf.size_bytes] if raw else leaf.shape,
                "data_offsets": [at, at + leaf.size_bytes],
            }
            at += leaf.size_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        if len(text) + PAGE > HEADER_BYTES_MAX:
            reason = f"the header of {stem}.safetensors takes {len(text)} bytes, {HEADER_BYTES_MAX} at most"
            raise UnsupportedValue(reason, hint="spread the tensors over several top-level keys")
        size = round_up(8 + len(text)) - 8
        return size.to_bytes(8, "little") + text.ljust(size)

    def _node(self, match: "re.Match[str]") -> str:
        """Write the node of one leaf: [file number, name] and what the file itself does not say."""
        kind, index = match.group(1), int(match.group(2))
        leaf = self._leaves[index]
        number, name = self._names[index]
        more: Dict[str, Any] = {}
        if leaf.element.startswith(RAW):
            more = {"dtype": leaf.element[len(RAW) :], "shape": leaf.shape}
        if kind == "frozen":
            kind, more["requires_grad"] = "parameter", False
        rest = "," + encode_flat(more) if more else ""
        return f'{{"{kind}":[{number},{quote(name)}{rest}]}}'


def _torch_plan(state: Any) -> Plan:
    size = measure(state)
    arena_bytes = PAGE + round_up(size) + DESCRIPTOR_ROOM_BYTES
    return Plan(
        key=("torch", arena_bytes),
        format="torch",
        arena_bytes=arena_bytes,
        data_bytes=size,
        files=(FilePlan(TORCH_FILE, PAGE, size, b""),),
        places=(),
        fragments=(),
        state_offset=PAGE + round_up(size),
        state_room_bytes=0,
    )


def _alignment(leaf: _Leaf) -> int:
    """Return the largest power of two, 16 at most, that divides an item: the order of packing."""
    size = item_bytes(leaf.kind, leaf.element)
    return min(size & -size, 16)


def _stem(top: Optional[str]) -> str:
    """Make a file name's stem of a top-level key: letters, digits and ._- only, no leading dot."""
    if top is None:
        return TENSORS_STEM
    return re.sub(r"[^A-Za-z0-9._-]", "_", top).lstrip(".")[:STEM_CHARS_MAX] or TENSORS_STEM


def _unused(stem: str, stems: List[str]) -> str:
    """Number a stem that is taken, also where only the case differs: some file systems fold it."""
    taken = {other.lower() for other in stems}
    candidate, count = stem, 1
    while candidate.lower() in taken:
        count += 1
        candidate = f"{stem}-{count}"
    return candidate


def _unique(name: str, taken: Dict[str, int]) -> str:
    """Number a tensor name that is taken ("a.b" may be one key or two); keep it valid UTF-8."""
    name = name.encode("utf-8", "backslashreplace").decode("utf-8") or "tensor"
    candidate = name
    while candidate in taken:
        taken[name] = taken.get(name, 1) + 1
        candidate = f"{name}#{taken[name]}"
    taken[candidate] = 1
    return candidate
