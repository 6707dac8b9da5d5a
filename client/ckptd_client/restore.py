"""From stored bytes back to the state: the same types, the same bits, the same ties.

`read_checkpoint` is the cold way (disk, digested), `map_checkpoint` the hot one (the arena, no byte read).
Both make tensors as views of one block of memory per file, so nothing is copied after the reading.
"""

import io
import json
import math
import mmap as mmap_module
import os
import weakref
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from ckptd_client.decode import Decoder, references
from ckptd_client.dtypes import framework, numpy_dtype, torch_dtype
from ckptd_client.errors import CorruptCheckpoint, MissingPart
from ckptd_client.fill import fill
from ckptd_client.find import MANIFEST, Found, find_checkpoint, newest_intact, read_manifest, stripped_files
from ckptd_client.header import Entry, parse_header
from ckptd_client.plan import STATE_FILE
from ckptd_client.readback import Order, read_files

__all__ = ["Found", "find_checkpoint", "map_checkpoint", "read_checkpoint"]

Views = Dict[str, memoryview]


def read_checkpoint(  # noqa: PLR0913  # the flags of a load are independent of one another
    path: str,
    files: Optional[Sequence[Mapping[str, Any]]] = None,
    *,
    verify: bool = True,
    into: Any = None,
    keys: Optional[Sequence[Any]] = None,
    mmap: bool = False,
    weights_only: bool = True,
) -> Any:
    """Load the checkpoint at `path` from the disk and return its state.

    files  what it consists of ({"path", "size_bytes", "sha256"}); None: what its manifest.json says
    verify  compare each file that is read with its SHA-256
    into   fill this state in place (tensors copied into, load_state_dict called) and return it; a mapping
           asks for the keys it has
    keys   load only these top-level keys, and read only their files
    mmap   map the files copy-on-write instead of reading them: for states larger than memory
    weights_only  as in torch.load, for format="torch"

    Blocks for the slower of reading and digesting. CorruptCheckpoint names file and place and offers the
    newest intact checkpoint beside it. MissingPart: a key or file that was asked for is not there.
    StateMismatch: `into` does not fit, and was not changed.
    """
    if files is None:
        found = read_manifest(path)
        if found is None:
            raise MissingPart(f"{path} has no readable {MANIFEST}", MANIFEST, path)
        files = found.files
    listed = {file["path"]: dict(file) for file in files}

    def open_files(names: Sequence[str]) -> Views:
        missing = [name for name in names if name not in listed]
        if missing:
            raise MissingPart(_why_missing(path, missing[0]), missing[0], path)
        order = Order(path, [listed[name] for name in names], verify, mmap)
        return {name: memoryview(memory)[: listed[name]["size_bytes"]] for name, memory in read_files(order).items()}

    try:
        return _Restore(path, open_files, weights_only=weights_only).state(listed, keys, into)
    except CorruptCheckpoint as error:
        error.newest_good = newest_intact(os.path.dirname(os.path.abspath(path)), path)
        raise


def _why_missing(path: str, name: str) -> str:
    if name not in stripped_files(path):
        return f"{path} has no {name}"
    return (
        f"{name} was taken out of {path} to save space: load the rest with keys=[...], bring it back with "
        "`ckpt restore` while the trash holds it, or load a newer checkpoint"
    )


def map_checkpoint(  # noqa: PLR0913  # as above
    fd: int,
    files: Sequence[Mapping[str, Any]],
    *,
    keys: Optional[Sequence[Any]] = None,
    into: Any = None,
    on_release: Optional[Callable[[], None]] = None,
    weights_only: bool = True,
) -> Any:
    """Load a checkpoint from the arena behind `fd`, read-only as it may be: mapped, with no byte read.

    Tensors are views; writing to one copies its page for this process alone. `files` are the descriptor's
    ({"path", "offset", "size_bytes"}); `fd` may be closed afterwards. `on_release()` is called once, when
    nothing uses the mapping any more (at the latest at exit), from whatever thread let go of it: until then
    the arena must not be lent to anybody. It is called too when this raises.
    """
    listed = {file["path"]: file for file in files}
    end = max(file["offset"] + file["size_bytes"] for file in files)
    try:
        memory = mmap_module.mmap(fd, end, mmap_module.MAP_PRIVATE, mmap_module.PROT_READ | mmap_module.PROT_WRITE)
    except BaseException:
        if on_release is not None:
            on_release()
        raise
    if on_release is not None:
        weakref.finalize(memory, on_release)
    whole = memoryview(memory)

    def open_files(names: Sequence[str]) -> Views:
        missing = [name for name in names if name not in listed]
        if missing:
            raise MissingPart(f"the arena has no {missing[0]}", missing[0])
        return {name: whole[listed[name]["offset"] :][: listed[name]["size_bytes"]] for name in names}

    # own: an optimizer keeps the tensors it is given, which would keep the arena for as long as it lives
    return _Restore("arena", open_files, weights_only=weights_only).state(listed, keys, into, own=True)


class _Restore:
    """One load. `open_files` gives the bytes of files by name."""

    def __init__(self, path: str, open_files: Callable[[Sequence[str]], Views], *, weights_only: bool) -> None:
        self._path = path
        self._open = open_files
        self._weights_only = weights_only
        self._names: List[str] = []
        self._views: Views = {}
        self._headers: Dict[str, Dict[str, Entry]] = {}
        self._made: Dict[Tuple[str, str, str], Any] = {}

    def state(self, listed: Mapping[str, Any], keys: Optional[Sequence[Any]], into: Any, *, own: bool = False) -> Any:
        """Load all, or the given top-level keys, or what `into` has."""
        if keys is None and isinstance(into, Mapping):
            keys = list(into) or None
        state = self._typed(keys) if STATE_FILE in listed else self._foreign(listed, keys)
        return state if into is None else fill(into, state, own=own)

    def _typed(self, keys: Optional[Sequence[Any]]) -> Any:
        """Load what plan.py laid out: state.json tells which tensor of which file goes where."""
        raw = self._open([STATE_FILE])[STATE_FILE]
        try:
            document = json.loads(bytes(raw))
            self._names, tree = document["files"], document["tree"]
            if document["v"] != 1:
                raise CorruptCheckpoint(self._path, STATE_FILE, f"version {document['v']}, this client reads 1")
            if keys is not None:
                tree = self._only(tree, keys)
            needed = sorted({body[0] for body in references(tree)})
            self._views = self._open([self._names[number] for number in needed])
            return Decoder(self._tensor).value(tree)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CorruptCheckpoint(self._path, STATE_FILE, f"not well-formed: {error!r}") from error

    def _only(self, tree: Any, keys: Sequence[Any]) -> Any:
        """Cut the tree down to some top-level keys; ties into other files keep working."""
        name, body = next(iter(tree.items())) if isinstance(tree, dict) else ("", [])
        decoder = Decoder(self._tensor)
        if name == "dict":
            have: Dict[Any, Any] = {key: [key, node] for key, node in tree[name].items()}
        elif name in ("items", "ordered"):
            pairs = body if name == "items" else body[0]
            have = {decoder.value(pair[0]): pair for pair in pairs}
        else:
            raise MissingPart("the state is no mapping, so it has no parts to choose from", str(keys), self._path)
        for key in keys:
            if key not in have:
                known = ", ".join(map(repr, have))
                raise MissingPart(f"the checkpoint has no part {key!r}; it has {known}", str(key), self._path)
        pairs = [have[key] for key in keys]
        return {"dict": dict(pairs)} if name == "dict" else {name: pairs if name == "items" else [pairs]}

    def _tensor(self, tag: str, body: List[Any]) -> Any:
        """Make the value of a tensor node; the same node again gives the same object, so ties come back."""
        file, name = self._names[body[0]], body[1]
        more = body[2] if len(body) > len(("file", "name")) else {}
        made = self._made.get((tag, file, name))
        if made is None:
            header = self._headers.get(file)
            if header is None:
                header = self._headers[file] = self._header(file)
            if name not in header:
                raise CorruptCheckpoint(self._path, file, f"it has no tensor {name!r}")
            make = _array if tag == "array" else _tensor
            base_tag = "array" if tag == "array" else "tensor"
            made = self._made.get((base_tag, file, name))
            if made is None:
                made = make(self._views[file], header[name], more)
                self._made[base_tag, file, name] = made
            if tag == "parameter":
                made = framework("torch").nn.Parameter(made, requires_grad=more.get("requires_grad", True))
            self._made[tag, file, name] = made
        return made

    def _header(self, file: str) -> Dict[str, Entry]:
        try:
            return parse_header(self._views[file])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptCheckpoint(self._path, file, f"no whole safetensors file: {error}") from error

    def _foreign(self, listed: Mapping[str, Any], keys: Optional[Sequence[Any]]) -> Any:
        """Load files that another writer made: torch zips and safetensors, by name where there are several."""
        names = [name for name in listed if name.endswith((".safetensors", ".pt", ".pth", ".ckpt", ".bin"))]
        if not names:
            raise MissingPart(f"{self._path} has no file that this client can read", STATE_FILE, self._path)
        self._views = self._open(names)
        loaded = {name: self._file(name) for name in names}
        state = loaded[names[0]] if len(names) == 1 else loaded
        if keys is None:
            return state
        for key in keys:
            if not isinstance(state, Mapping) or key not in state:
                raise MissingPart(f"the checkpoint has no part {key!r}", str(key), self._path)
        return {key: state[key] for key in keys}

    def _file(self, name: str) -> Any:
        if name.endswith(".safetensors"):
            make = _tensor if _has_torch() else _array
            return {key: make(self._views[name], entry, {}) for key, entry in self._header(name).items()}
        torch = framework("torch")
        with _Reader(self._views[name]) as file:
            return torch.load(file, map_location="cpu", weights_only=self._weights_only)


class _Reader(io.RawIOBase):
    """A file over bytes in memory, for torch.load: reads copy no more than they return."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, len(self._data))[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        count = max(0, min(len(view), len(self._data) - self._at))
        view[:count] = self._data[self._at : self._at + count]
        self._at += count
        return count


def _has_torch() -> bool:
    try:
        framework("torch")
    except ImportError:
        return False
    return True


def _tensor(view: memoryview, entry: Entry, more: Mapping[str, Any]) -> Any:
    """Make a torch tensor over the bytes of one entry; it keeps the memory alive."""
    torch = framework("torch")
    dtype = torch_dtype(entry.dtype, more.get("dtype"))
    if dtype is None:
        raise MissingPart(f"this torch has no type for {more.get('dtype', entry.dtype)}", entry.dtype)
    shape = more.get("shape", entry.shape)
    if entry.start == entry.end:
        return torch.empty(shape, dtype=dtype)
    count = math.prod(shape)
    return torch.frombuffer(view, dtype=dtype, count=count, offset=entry.start).reshape(shape)


def _array(view: memoryview, entry: Entry, more: Mapping[str, Any]) -> Any:
    """Make a NumPy array over the bytes of one entry; it keeps the memory alive."""
    numpy = framework("numpy")
    dtype = numpy_dtype(entry.dtype, more.get("dtype"))
    if dtype is None:
        raise MissingPart(f"NumPy has no type for {entry.dtype}: import torch to load it", entry.dtype)
    shape = tuple(more.get("shape", entry.shape))
    if entry.start == entry.end:
        return numpy.empty(shape, dtype)
    return numpy.frombuffer(view, dtype, math.prod(shape), entry.start).reshape(shape)
